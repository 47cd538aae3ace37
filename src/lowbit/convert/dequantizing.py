"""Any model as an ordinary transformers folder: float weights under the names that save_pretrained gives them.

One tensor is in memory at a time, and fused experts are taken apart again, so that programs that read the published
checkpoint of a model read this one.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.convert.importing import cast, model_type
from lowbit.display import Displayed
from lowbit.errors import SourceError
from lowbit.interchange.files.folder_writer import FolderWriter
from lowbit.interchange.files.lock import locked
from lowbit.interchange.files.safetensors_writer import Shard, shards_of
from lowbit.interchange.hf.configs import write_config
from lowbit.interchange.hf.models import meta_model
from lowbit.interchange.hf.published import Published, Together
from lowbit.interchange.opening import check_output, open_source
from lowbit.interchange.progress import Progress, heard
from lowbit.interchange.readers.left_out import to_json
from lowbit.interchange.source import Source
from lowbit.interchange.tensors import TensorPlan, TensorSpec
from lowbit.pipeline.loading import as_dtype
from lowbit.planning.plan import MAX_SHARD, notes_on
from lowbit.version import __version__


@dataclass(frozen=True, repr=False)
class Dequantized(Displayed):
    """What was written. `error`: |w - w'| / |w| of rounding the values to `dtype`, over all tensors; 0 when nothing was rounded.

    `notes`: what of the source is not in the folder, tensors and files, a sentence each.
    """

    folder: Path
    dtype: torch.dtype
    tensors: int
    bytes: int
    error: float
    notes: tuple[str, ...] = ()

    def _brief(self) -> str:
        return f"{self.folder}, {self.dtype}, {self.bytes:,} bytes"


def dequantize_model(
    model: str | Path | Source,
    out: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    tokenizer: Any = None,
    progress: Progress | bool | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD,
) -> Dequantized:
    """Write `model`, quantized or not, as a float folder that transformers reads without lowbit.

    `dtype`: of every float tensor; None takes the type that the model's config names. WeightError when a value does not fit
    it. Nothing is at `out` before the folder is whole.

    >>> lowbit.dequantize_model(quantized, folder / "float", dtype="float32").error
    0.0
    """
    check_output(model, out)
    source = open_source(model, tokenizer=tokenizer)
    if source.config is None:
        raise SourceError(f"{source.label} has no transformers config, without which there is no ordinary folder")
    wanted = as_dtype(dtype) or model_type(source)
    names = _Names(source, wanted)
    shards = shards_of(names.stored(), max_shard_bytes)
    with (
        locked(out),
        FolderWriter(out, shards, _fingerprint(source, wanted, shards), _origin(source, wanted), overwrite) as writer,
    ):
        if not writer.finished:
            for name, made, error, norm in names.values(frozenset(writer.journal), heard(progress)):
                writer.write(name, made, error=error, norm=norm)
            writer.verify()
            source.save_assets(writer.partial)
            config = copy.deepcopy(source.config)
            config.dtype = wanted
            config.architectures = config.architectures or [source.inventory.model_class]
            write_config(config, writer.partial)
            writer.finish()
    facts = list(writer.journal.values())
    errors, norms = (sum(f[key] ** 2 for f in facts) ** 0.5 for key in ("error", "norm"))
    return Dequantized(
        Path(out),
        wanted,
        sum(len(f["sha256"]) for f in facts),
        sum(s.file_bytes for s in shards),
        errors / norms if norms else 0.0,
        (*source.merged, *map(str, source.left_out), *source.left_files()),
    )


class _Names:
    """Tensors of the model under the names, and in the pieces, that save_pretrained gives them; those of one group at a time."""

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        self._source, self._dtype = source, dtype
        extra = frozenset(source.extra)
        specs = {n: TensorSpec(n, s.shape, self._type(n)) for n, s in source.tensors.items() if n not in extra}
        self._published = Published(meta_model(source.config), specs, source.label)  # type: ignore[arg-type]
        alone = (Together((n,), {n: TensorSpec(n, source.tensors[n].shape, self._type(n))}) for n in source.extra)
        self._groups = (*self._published.groups, *alone)

    def stored(self) -> list[tuple[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]]:
        """(name of the group's first tensor, name in the file -> type and shape), in the order of the model."""
        return [(g.names[0], {k: (spec.dtype, spec.shape) for k, spec in g.pieces.items()}) for g in self._groups]

    def values(
        self, done: frozenset[str], progress: Progress | None
    ) -> Iterator[tuple[str, dict[str, Tensor], float, float]]:
        """(name of the group, tensors to write, norm of the rounding error, norm of the values)."""
        sizes = {name: spec.nbytes for name, spec in self._source.tensors.items()}
        at = 0
        for group in self._groups:
            if group.names[0] not in done:
                if progress:
                    progress(group.names[0], at, sum(sizes.values()))
                made = {name: self._rounded(name) for name in group.names}
                pieces = self._published.tensors(group, {name: tensor for name, (tensor, _, _) in made.items()})
                error, norm = (math.hypot(*(facts[i] for facts in made.values())) for i in (1, 2))
                yield group.names[0], pieces, error, norm
            at += sum(sizes[name] for name in group.names)
            if progress:
                progress(group.names[-1], at, sum(sizes.values()))

    def _rounded(self, name: str) -> tuple[Tensor, float, float]:
        """A tensor in its type, the norm of what rounding changed, and its own."""
        value = self._source.read(name)
        plan = TensorPlan(name, tuple(value.shape), "other", self._type(name), False, None, None)
        made = cast(plan, value).stored[name]
        error = 0.0 if made.dtype == value.dtype else _norm(made.double().sub_(value.double()))
        return made, error, _norm(value.double())

    def _type(self, name: str) -> torch.dtype:
        own = self._source.tensors[name].dtype
        return self._dtype if own.is_floating_point else own


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values)) if values.is_floating_point() else 0.0


def _fingerprint(source: Source, dtype: torch.dtype, shards: tuple[Shard, ...]) -> str:
    facts = {
        "dequantize": str(dtype), "source": source.identity(), "version": __version__, "torch": torch.__version__,
        "headers": [hashlib.sha256(s.header).hexdigest() for s in shards],
    }  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _origin(source: Source, dtype: torch.dtype) -> dict[str, Any]:
    """Where the values come from, as the manifest says it. No time, no path."""
    return {
        "lowbit": __version__, "dequantized": {"from": source.storage, "dtype": str(dtype).removeprefix("torch.")},
        "source": source.identity(), "notes": list(notes_on(source)),
        "left_out": to_json(source.left_out, source.left_files()),
    }  # fmt: skip
