"""What was exported, read back by other code: every weight and a few logits are compared with lowbit's own."""

from __future__ import annotations

import gc
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.convert.conversions import ConvertedFolder, allowed
from lowbit.errors import ExportError
from lowbit.interchange.exporters.exporter import Exporter
from lowbit.interchange.progress import READ_BACK, Progress
from lowbit.interchange.readers.lowbit_folder import LowbitFolder
from lowbit.interchange.source import Source

TOKENS = 16  # that the logits are compared on
_LOGITS = 3e-2  # how far they may be where weights were converted


def compared(
    kind: Exporter, folder: LowbitFolder, written: LowbitFolder, out: Path, progress: Progress | None = None
) -> tuple[dict[str, float], float | None]:
    """({weight that is not equal: its relative difference}, that of the logits) of what was written, read back by other code.

    `written` is `folder` as the exporter writes it. Every tensor must come back as it was written; one that was converted must
    also be as near to lowbit's own as its conversion states. `progress` counts from nothing: the bytes of the weights as they are
    written, and as much again for the logits where they are compared.
    """
    read = kind.reopen(out, written)
    ours, theirs = folder.dense(), written.dense()
    becomes = written.becomes if isinstance(written, ConvertedFolder) else {}
    unequal = {}
    lacking = [n for n in ours.tensors if n not in read.tensors and n not in ours.extra]
    if lacking:
        raise ExportError(
            f"{out.name}: {lacking[0]!r} is not there when the file is read back; nothing was kept of the export"
        )
    fits = _fits(ours)
    sizes = {name: t.bytes_after for name, t in folder.contents.tensors.items()}
    done, total = 0, sum(sizes.values()) * (2 if fits else 1)

    def tell(what: str) -> None:
        if progress is not None:
            progress(f"{READ_BACK}: {what}", done, total)

    for name in ours.tensors:
        if name not in read.tensors:
            continue
        tell(name)
        found = read.read(name)
        limits = [(theirs, kind.allowed(written.contents.tensors[name]))]
        if name in becomes:
            bound = limits[0][1] + allowed(folder.contents.tensors[name], becomes[name])
            limits.append((ours, bound))
        for source, limit in limits:
            apart = distance(found, source.read(name))
            if not apart <= limit:
                raise ExportError(
                    f"{out.name}: {name!r} is read back changed (|a - b| / |b| = {apart:.3g}); nothing was kept of the export"
                )
        if apart > 0:
            unequal[name] = apart
        done += sizes.get(name, 0)
    done = sum(sizes.values())
    if not fits:
        tell("all weights")
        return unequal, None
    tell("what the model says")
    theirs_say = logits_of(read)
    done += (total - done) // 2
    tell("what the model says")
    logits = distance(theirs_say, logits_of(ours))
    done = total
    tell("what the model says")
    if not logits <= max(kind.logits_allowed(written.contents), _LOGITS if unequal.keys() & becomes.keys() else 0.0):
        raise ExportError(
            f"{out.name}: the weights come back, but the logits differ by {logits:.3g} of their size: the exporter "
            "computes another model from this config; nothing was kept of the export"
        )
    return unequal, logits


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| in float64; infinite where shapes differ or a value is not finite."""
    if tuple(a.shape) != tuple(b.shape):
        return float("inf")
    a, b = a.float(), b.float()
    if torch.equal(a, b):
        return 0.0
    norm = float(b.double().norm())
    apart = float((a.double() - b.double()).norm()) / (norm or 1.0)
    return apart if apart == apart else float("inf")


def logits_of(source: Source) -> Tensor:
    """float32 [1, tokens, vocabulary]: what the float model of a source gives for a fixed row of tokens."""
    model = source.load_float()
    config: Any = source.config
    size = int(config.get_text_config().vocab_size)
    ids = torch.randint(0, size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found: Tensor = model(input_ids=ids).logits.float()
    del model
    gc.collect()
    return found


def _fits(source: Source) -> bool:
    """Whether the float model takes at most half of this machine's memory; where that is unknown, yes."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return True
    return 2 * 4 * sum(math.prod(spec.shape) for spec in source.tensors.values()) <= memory
