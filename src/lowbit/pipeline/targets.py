"""From a target to a recipe: sensitivity measured once and kept, then a format for each layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lowbit.formats import Format
from lowbit.interchange.source import Source, open_source
from lowbit.pipeline.allocation import Allocation
from lowbit.pipeline.budget import allocation
from lowbit.pipeline.calibration import LENGTH, SAMPLES, load_calibration
from lowbit.pipeline.driver import Progress
from lowbit.pipeline.recipe import Recipe
from lowbit.pipeline.sensitivity import CANDIDATES, Sensitivity, measure_sensitivity
from lowbit.pipeline.settings import Settings


def allocate(
    model: str | Path | nn.Module,
    recipe: str | Format | Recipe = "w4",
    *,
    calibration: Any = None,
    sensitivity: str | Path | Sensitivity | None = None,
    samples: int = SAMPLES,
    length: int = LENGTH,
    chat: bool = False,
    candidates: tuple[str, ...] = CANDIDATES,
    tokenizer: Any = None,
    progress: Progress | None = None,
    **target: Any,
) -> Allocation:
    """A format for each layer of `model`, so that it is as good as can be under one target; see `budget.allocation`.

    The target is one of `target_size="80MB"`, `target_bits=4.25`, `target_kl=0.02`, `fit_memory="8GB"` (with `context`
    and `sequences`: weights and KV cache together). `recipe` gives the method; its format is only a starting point.
    `sensitivity`: what `measure_sensitivity` gave, or a file: read where it exists, else measured on `calibration`
    (text as in `quantize`; None: what the model writes itself) and written. `allocation.recipe` goes to `quantize`.
    """
    source = open_source(model, tokenizer=tokenizer)
    wanted = Recipe.of(recipe).calibrated()
    found = _sensitivity(source, sensitivity, calibration, samples, length, chat, candidates, progress)
    return allocation(source, found, wanted, **target)


def _sensitivity(
    source: Source, given: str | Path | Sensitivity | None, calibration: Any, samples: int, length: int, chat: bool,
    candidates: tuple[str, ...], progress: Progress | None,
) -> Sensitivity:  # fmt: skip
    if isinstance(given, Sensitivity):
        return given
    if given is not None and Path(given).exists():
        return Sensitivity.load(given)
    text = load_calibration(calibration, None, source, samples=samples, length=length, chat=chat)
    autocast = Settings.of_this_machine().autocast
    found = measure_sensitivity(source, text.ids, candidates, autocast=autocast, progress=progress)
    if given is not None:
        found.save(given)
    return found
