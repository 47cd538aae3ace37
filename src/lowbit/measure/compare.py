"""Many recipes on one model, measured in one go against the float model."""

from __future__ import annotations

import dataclasses
import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from lowbit.errors import LowbitError, SourceError
from lowbit.interchange.files.undisturbed import temporary_folder
from lowbit.measure.backends import Backend, in_transformers
from lowbit.measure.card import Card, CardParts, TextMark
from lowbit.measure.compare_steps import CompareSteps
from lowbit.measure.environment import environment
from lowbit.measure.interleave import SpeedSettings
from lowbit.measure.quality import Progress, Quality, Reference, measure_quality
from lowbit.measure.speed import Rates, Speed, measure_speed
from lowbit.measure.streamed import Streamed, StreamedReference, stream_quality
from lowbit.measure.windows import Windows


class Built(NamedTuple):
    """A quantized model, in transformers or block by block, what is known of it, and what gives the program that runs it: transformers
    when None."""

    model: nn.Module | Streamed
    parts: CardParts
    backend: Callable[[], Backend] | None = None


Build = Callable[[str], Built]


@dataclass(frozen=True)
class CompareRow:
    """A recipe and its card, or the error that it ended with. `is_base`: the float model's row; `earlier`: measured in a run before
    this one, which was interrupted."""

    recipe: str
    card: Card | None = None
    error: str | None = None
    is_base: bool = False
    earlier: bool = field(default=False, compare=False)


def compare(
    recipes: Sequence[str],
    build: Build,
    base: nn.Module | Streamed,
    base_parts: CardParts,
    windows: Windows,
    *,
    speed: SpeedSettings | None = None,
    baseline: Callable[[int | None], Backend] | None = None,
    keep_bytes: int = 2 * 2**30,
    progress: Progress | None = None,
    on_row: Callable[[CompareRow], None] | None = None,
    steps: CompareSteps | None = None,
    kept: Mapping[int, Card] | None = None,
    built_again: bool = False,
) -> tuple[CompareRow, ...]:
    """Measure each recipe against `base`; the first row is `base` itself.

    `build` gives the quantized model, what is known about it and what runs it. A recipe that raises a LowbitError, or needs more
    memory than there is, becomes a row with the error and the others go on; any other exception is a bug and is raised.
    Speed is measured when `speed` is given, of each model in rounds interleaved with those of the base, which what `baseline`
    gives for as many threads runs (transformers, in the base's own type, when None); the base's row then has its median over the recipes. Up to `keep_bytes` of the base's logits are
    kept in a file between recipes; a base that is measured block by block keeps what its last block returned, and so must be what `build` gives. `progress` counts windows, those of the base included; `steps` tells what is at work.
    `kept`: cards from before, by the index of the recipe, -1 for the base, which are not measured again; with `built_again` the models
    that they are about are still built.
    """
    text, machine = TextMark.of(windows), environment()
    kept = kept or {}
    if steps is None:
        steps = CompareSteps(
            recipes, windows.count, lambda step: None, speed=speed is not None, kept=kept, redrawn=built_again
        )
    total = windows.count * (len(recipes) + 1)

    def quality_of(model: nn.Module | Streamed, index: int) -> Quality:
        if isinstance(reference, StreamedReference):
            assert isinstance(model, Streamed)
            return stream_quality(model, windows, base=reference, progress=_in_windows(counted(index), windows.count))
        assert isinstance(model, nn.Module)
        return measure_quality(model, windows, base=reference, progress=counted(index))

    def counted(index: int) -> Progress:
        def told(done: int, of: int) -> None:
            steps.move(done, of)
            if progress is not None:
                progress((index + 1) * windows.count + done, total)

        return told

    def measured(index: int, recipe: str) -> Card:
        card = kept.get(index)
        if card is None or built_again:
            steps.begins(index, "quantizing")
            built = build(recipe)
        if card is not None:
            return card
        steps.begins(index, "measuring")
        quality = quality_of(built.model, index)
        rates = None
        if speed is not None:
            steps.begins(index, "speed")
            rates = _speed(built, speed, baseline or _as_it_is(base), steps.move)
        return Card(built.parts, text, quality, rates, environment=machine)

    def base_measured() -> Card:
        steps.measuring_float()
        return Card(base_parts, text, quality_of(base, -1), environment=machine)

    with temporary_folder() as folder:
        reference = (
            Reference(base, windows, keep_bytes, folder)
            if isinstance(base, nn.Module)
            else StreamedReference(base, windows, folder)
        )
        base_row = CompareRow(base_parts.recipe, kept.get(-1) or base_measured(), is_base=True, earlier=-1 in kept)
        if on_row is not None:
            on_row(base_row)
        rows = []
        for index, recipe in enumerate(recipes):
            try:
                row = CompareRow(recipe, measured(index, recipe), earlier=index in kept)
            except (LowbitError, MemoryError) as error:
                steps.failed()
                row = CompareRow(recipe, error=str(error) or "not enough memory")
            if (row.error or row.earlier) and progress is not None:
                progress((index + 2) * windows.count, total)
            gc.collect()  # a model holds reference cycles, and the next one needs its memory
            rows.append(row)
            if on_row is not None:
                on_row(row)
    return (_with_speed(base_row, rows), *rows)


def _as_it_is(model: nn.Module | Streamed) -> Callable[[int | None], Backend]:
    def backend(_: int | None) -> Backend:
        if isinstance(model, Streamed):
            raise SourceError("a model that is measured block by block has no speed; open it whole")
        return in_transformers(model)

    return backend


def _in_windows(progress: Progress, windows: int) -> Progress:
    """Of blocks and windows, as so many of the windows alone."""
    return lambda done, total: progress(windows * done // max(1, total), windows)


def _speed(
    built: Built, settings: SpeedSettings, baseline: Callable[[int | None], Backend], progress: Progress
) -> Speed:
    try:
        program = _as_it_is(built.model)(None) if built.backend is None else built.backend()
        other = baseline(program.threads)
    except LowbitError as error:  # such as a model that generates no text: its quality stands
        return Speed(skipped=str(error))
    return measure_speed(program, base=other, settings=settings, progress=progress)


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
