"""From a target to a recipe: sensitivity measured once and kept, then a format for each layer."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.budget.allocation import Allocation
from lowbit.budget.choose import allocation
from lowbit.budget.fisher import text_digest
from lowbit.budget.reach import check_reach
from lowbit.budget.sensitivity import CANDIDATES, Sensitivity, measure_sensitivity
from lowbit.calibration.data import SELF, Calibration, load_calibration
from lowbit.calibration.package_text import BUILTIN
from lowbit.errors import RecipeError
from lowbit.formats import Format, parse_format
from lowbit.interchange.files.lock import locked
from lowbit.interchange.hf.running import fast_dtype
from lowbit.interchange.opening import open_checked
from lowbit.interchange.progress import TEXT, Progress, heard
from lowbit.interchange.source import Source
from lowbit.recipes.recipe import Recipe


def allocate(
    model: str | Path | nn.Module,
    recipe: str | Format | Recipe = "w4",
    *,
    calibration: Any = None,
    sensitivity: str | Path | Sensitivity | None = None,
    samples: int | None = None,
    length: int | None = None,
    chat: bool = False,
    candidates: tuple[str, ...] = CANDIDATES,
    tokenizer: Any = None,
    progress: Progress | bool | None = None,
    **target: Any,
) -> Allocation:
    """A format for each layer of `model`, so that it is as good as can be under one target; see `budget.allocation`.

    The `target` is one of `target_size="80MB"`, `target_bits=4.25`, `target_kl=0.02`, `fit_memory="8GB"` (with `context`
    and `sequences`: weights and KV cache together). `recipe` gives the method; its format is only a starting point.
    `sensitivity`: what `measure_sensitivity` gave, or a file: read where it exists, else measured on `calibration`
    (text as in `quantize`; None: the text that comes with lowbit) and written. RecipeError for a file measured on another
    text or with other candidates; a text that the model would have to write first is not compared. `samples` windows of `length` tokens
    (32 of 1024) are taken of the text; `chat` wraps documents in the model's chat template. `candidates`: formats that a layer may have.
    `progress(what, steps done, steps in all)`.
    A target that no choice of formats meets is a RecipeError with the nearest that one does, before text or a weight is
    read. `allocation.recipe` goes to `quantize`.

    >>> found = lowbit.allocate(model, target_bits=5, calibration=text, samples=4, length=128)
    >>> found.plan.linear_bits_per_weight <= 5
    True
    """
    wanted = Recipe.of(recipe).calibrated()
    names = sensitivity.candidates if isinstance(sensitivity, Sensitivity) else candidates
    source = open_checked(model, lambda headers: check_reach(headers, wanted, names, **target), tokenizer=tokenizer)
    text = {"source": calibration, "samples": samples, "length": length, "chat": chat}
    if isinstance(sensitivity, Sensitivity):
        if any(text.values()):
            raise RecipeError(
                "a sensitivity is given, so that text would not be looked at; leave calibration and its options out"
            )
        return allocation(source, sensitivity, wanted, **target)
    with nullcontext() if sensitivity is None else locked(sensitivity):
        found = _measured_or_read(source, sensitivity, text, candidates, heard(progress))
    return allocation(source, found, wanted, **target)


def _measured_or_read(
    source: Source,
    path: str | Path | None,
    text: dict[str, Any],
    candidates: tuple[str, ...],
    progress: Progress | None,
) -> Sensitivity:
    """What the file `path` holds, else measured on `text` (arguments of `load_calibration`) and kept there."""
    known = Sensitivity.load(path) if path is not None and Path(path).exists() else None
    if known is not None and (text["source"] is None or text["source"] == SELF):
        return _same(known, path, candidates, None)

    def on_token(done: int, total: int) -> None:
        if progress is not None:
            progress(TEXT, done, total)

    given = text | {"source": BUILTIN if text["source"] is None and not text["chat"] else text["source"]}
    calibration = load_calibration(tokenizer=None, model=source, on_token=on_token, **given)
    if known is not None:
        return _same(known, path, candidates, calibration)
    found = measure_sensitivity(
        source, calibration.ids, candidates, autocast=fast_dtype() != torch.float32, progress=progress,
        frame=calibration.frame,
    )  # fmt: skip
    if path is not None:
        found.save(path)
    return found


def _same(known: Sensitivity, path: Any, candidates: tuple[str, ...], text: Calibration | None) -> Sensitivity:
    """`known`, read from `path`, if it was measured with these candidates and, where it is at hand, on this text."""
    differ = []
    wanted = tuple(dict.fromkeys(str(parse_format(c)) for c in candidates))
    if set(wanted) != set(known.candidates):
        differ.append(f"with the formats {', '.join(known.candidates)} and not {', '.join(wanted)}")
    measured = known.settings.get("calibration")
    if text is not None and measured is not None and measured != text_digest(text.ids):
        differ.append(f"on another calibration text than {text.name} ({len(text.ids)} windows, {text.tokens} tokens)")
    if differ:
        raise RecipeError(
            f"the sensitivity in {path} was measured {' and '.join(differ)}; give what it was measured with, "
            "or another file (or remove this one) to measure it again"
        )
    return known
