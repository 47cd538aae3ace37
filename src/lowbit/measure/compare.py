"""Many recipes on one model, measured in one go against the float model."""

from __future__ import annotations

import dataclasses
import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from lowbit.errors import LowbitError
from lowbit.measure.backends import Backend, in_transformers
from lowbit.measure.card import Card, CardParts, TextMark
from lowbit.measure.environment import environment
from lowbit.measure.interleave import SpeedSettings
from lowbit.measure.quality import Progress, Reference, measure_quality
from lowbit.measure.speed import Rates, Speed, measure_speed
from lowbit.measure.windows import Windows


class Built(NamedTuple):
    """A quantized model in transformers, what is known of it, and what gives the program that runs it: transformers when None."""

    model: nn.Module
    parts: CardParts
    backend: Callable[[], Backend] | None = None


Build = Callable[[str], Built]


@dataclass(frozen=True)
class CompareRow:
    """A recipe and its card, or the error that it ended with. `is_base`: the float model's row."""

    recipe: str
    card: Card | None = None
    error: str | None = None
    is_base: bool = False


def compare(
    recipes: Sequence[str],
    build: Build,
    base: nn.Module,
    base_parts: CardParts,
    windows: Windows,
    *,
    speed: SpeedSettings | None = None,
    baseline: Callable[[int | None], Backend] | None = None,
    keep_bytes: int = 2 * 2**30,
    progress: Progress | None = None,
    on_row: Callable[[CompareRow], None] | None = None,
) -> tuple[CompareRow, ...]:
    """Measure each recipe against `base`; the first row is `base` itself.

    `build` gives the quantized model, what is known about it and what runs it. A recipe that raises a LowbitError
    becomes a row with the error and the others go on; any other exception is a bug and is raised.
    Speed is measured when `speed` is given, of each model in rounds interleaved with those of the base, which what `baseline`
    gives for as many threads runs (transformers, in the base's own type, when None); the base's row then has its median over the recipes. Up to `keep_bytes` of the base's logits are
    kept between recipes. `progress` counts windows, those of the base included.
    """
    reference = Reference(base, windows, keep_bytes)
    total = windows.count * (len(recipes) + 1)
    text, machine = TextMark.of(windows), environment()

    def step(finished: int) -> Progress | None:
        return None if progress is None else lambda done, _: progress(finished * windows.count + done, total)

    own = measure_quality(base, windows, base=reference, progress=step(0))
    base_row = CompareRow(base_parts.recipe, Card(base_parts, text, own, environment=machine), is_base=True)
    if on_row is not None:
        on_row(base_row)
    rows = []
    for index, recipe in enumerate(recipes):
        try:
            built = build(recipe)
            quality = measure_quality(built.model, windows, base=reference, progress=step(index + 1))
            rates = None if speed is None else _speed(built, speed, baseline or (lambda _: in_transformers(base)))
            row = CompareRow(recipe, Card(built.parts, text, quality, rates, environment=machine))
            del built
        except LowbitError as error:
            row = CompareRow(recipe, error=str(error))
            if progress is not None:
                progress((index + 2) * windows.count, total)
        gc.collect()  # a model holds reference cycles, and the next one needs its memory
        rows.append(row)
        if on_row is not None:
            on_row(row)
    return (_with_speed(base_row, rows), *rows)


def _speed(built: Built, settings: SpeedSettings, baseline: Callable[[int | None], Backend]) -> Speed:
    try:
        program = in_transformers(built.model) if built.backend is None else built.backend()
        other = baseline(program.threads)
    except LowbitError as error:  # such as a model that generates no text: its quality stands
        return Speed(skipped=str(error))
    return measure_speed(program, base=other, settings=settings)


def _with_speed(base_row: CompareRow, rows: Sequence[CompareRow]) -> CompareRow:
    """The base's row with the median of the speeds that it had in the rounds of each recipe."""
    speeds = [row.card.speed for row in rows if row.card is not None and row.card.speed is not None]
    measured = [speed for speed in speeds if speed.base is not None]
    if not measured or base_row.card is None:
        return base_row

    def median(name: str) -> float | None:
        values = [getattr(speed.base, name) for speed in measured]
        return statistics.median(values) if None not in values else None

    rates = Rates(median("decode") or 0.0, median("prefill") or 0.0, median("batch"))
    name = measured[0].base_program
    own = Speed(measured[0].settings, rates, rates, program=name, base_program=name)
    return dataclasses.replace(base_row, card=dataclasses.replace(base_row.card, speed=own))
