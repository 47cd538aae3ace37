"""The card of a model that is measured block by block, of all windows or in limited time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from lowbit.calibration.text import load_text
from lowbit.interchange.pace import Clock
from lowbit.kernels.heap import trim
from lowbit.measure.card import Card, TextMark
from lowbit.measure.card_budget import COUNTS, USUAL, Budget, is_clear, length_that_fits
from lowbit.measure.environment import environment
from lowbit.measure.files import Files
from lowbit.measure.interleave import SpeedSettings
from lowbit.measure.kept import Figures, Keeping, Kept
from lowbit.measure.own_program import memory_now, open_runs, speed_of, why_no_base, why_no_runs
from lowbit.measure.quality import Progress, Quality, quality_of
from lowbit.measure.runs import Runs
from lowbit.measure.sample import Sample
from lowbit.measure.speed import Speed
from lowbit.measure.speed_as_generated import FAILURES
from lowbit.measure.stream_forecast import Forecast, forecast
from lowbit.measure.streamed import PROGRAM, stream_figures
from lowbit.measure.time_notes import time_notes
from lowbit.measure.windows import Tokens, Windows
from lowbit.planning.measuring import OWN, ROOM

_QUICK = SpeedSettings(prompt=16, new=16, prefill=128, batch=0, repeats=1)
_QUICK_OWN = f"a quick card opens models of up to {OWN / 1e9:.1f} GB"
_QUICK_ROOM = f"a quick card keeps to {ROOM / 1e9:.2f} GB"
_ANSWER, _QUICK_ANSWER = 60, 24  # tokens at most
_REST = 4.0  # seconds in which a fresh process imports what it needs
Say = Callable[[str], None]


def streamed_card(
    files: Files, text: Any, *, windows: int | None, length: int, speed: SpeedSettings | None, prompt: str | None, say: Say,
    progress: Progress | None, keeping: Keeping,
) -> Card:  # fmt: skip
    """As `evaluate` without a budget."""
    tokens = Tokens.of(load_text(text), files.words(), files.model.module)
    cut = tokens.windows(length, windows)
    with keeping.on(tokens, length=cut.length, windows=cut.count, prompt=prompt, program=PROGRAM) as kept:
        say(_measuring(cut))
        quality = _quality(
            files, [stream_figures(files.model, cut, base=files.against, progress=progress, kept=kept)], cut
        )
        sample = rates = peak = None
        if prompt or speed is not None:
            room, whose = memory_now()
            own = _Own(files, why_no_runs(files, room, whose), say)
            sample = own.sample(prompt, _ANSWER, kept)
            if speed is not None:
                alone = None if files.base is None else why_no_base(files, room, whose)
                rates, peak = own.speed(speed, alone, progress)
        return Card(files.parts(), TextMark.of(cut), quality, rates, peak, sample, environment())


def quick_streamed_card(
    files: Files, text: Any, *, seconds: float, windows: int | None, length: int, prompt: str | None, say: Say,
    progress: Progress | None, keeping: Keeping, clock: Clock = time.perf_counter,
) -> Card:  # fmt: skip
    """As `evaluate` with `budget=seconds`. How many windows of which length are read is decided before the pass, by a forecast of its time;
    where the verdict is not clear behind it and there is time for another pass, more windows are read."""
    budget = Budget(seconds, clock)
    tokens = Tokens.of(load_text(text), files.words(), files.model.module)
    asked = tokens.windows(length, windows)
    with keeping.on(
        tokens, length=length, windows=windows, prompt=prompt, program=f"{PROGRAM}, in limited time"
    ) as kept:
        say("measuring how fast this machine is")
        rates = Forecast(*kept.found("forecast", lambda: asdict(forecast(files, tokens, clock))).values())
        usual = kept.found("windows", lambda: _that_fit(tokens, asked, windows, rates, budget))
        every = asked if windows is not None else tokens.windows(*usual[:1])
        parts: list[list[Figures]] = []
        count = min(usual[1], every.count)
        while True:
            done = sum(map(len, parts))
            cut = replace(every, ids=every.ids[done:count])
            say(_measuring(replace(every, ids=every.ids[:count])))
            parts.append(
                stream_figures(files.model, cut, base=files.against, progress=progress, kept=kept.part(f"from-{done}"))
            )
            quality = _quality(files, parts, every)
            more = next((each for each in COUNTS if each > count), count)
            fits = rates.seconds((more - count) * every.length) <= budget.left - rates.opening - _REST
            if windows is not None or is_clear(quality) or more > every.count or more == count:
                break
            if not fits and not kept.has(f"from-{count}"):  # a run that was killed had begun it
                break
            count = more
        notes = () if windows is not None else time_notes(quality, every.count, tokens, length, seconds)
        mark = replace(TextMark.of(every), windows=quality.windows, notes=(*every.notes, *notes))
        own = _Own(files, why_no_runs(files, OWN, _QUICK_OWN), say)
        if own.skipped is None and budget.left < rates.opening:
            own.skipped = "there was no time for it; `lowbit quantize --card full` measures it"
        sample = own.sample(prompt, _QUICK_ANSWER, kept)
        alone = (
            None
            if files.base is None
            else f"the float model, for {_QUICK_ROOM}; --card full measures it where memory is free"
        )
        found, peak = own.speed(_QUICK, alone, progress)
        return Card(files.parts(), mark, quality, found, peak, sample, environment(), budget=seconds)


class _Own:
    """The model itself, opened when it is first asked to answer. skipped: why it is not."""

    def __init__(self, files: Files, skipped: str | None, say: Say) -> None:
        self.files, self.skipped, self.say = files, skipped, say
        self._runs: Runs | None = None

    def runs(self) -> Runs | None:
        """None where it cannot be opened, for which `skipped` is the reason then."""
        if self._runs is None and self.skipped is None:
            trim()
            try:
                self.say("loading the model")
                self._runs = open_runs(self.files)
            except FAILURES as error:
                self.skipped = str(error) or type(error).__name__
        return self._runs

    def sample(self, prompt: str | None, new: int, kept: Kept) -> Sample | None:
        """Its answer; the float model, which is not opened, gives none."""
        if not prompt:
            return None

        def answered() -> str | None:
            runs = self.runs()
            if runs is None or runs.answer is None:
                return None
            self.say("answering a prompt")
            return runs.answer(self.files.words(), prompt, new)

        said = kept.found("answer", answered)
        return None if said is None else Sample(prompt, said)

    def speed(self, settings: SpeedSettings, alone: str | None, progress: Progress | None) -> tuple[Speed, int | None]:
        """Its speed, beside the float model's unless `alone` says why not."""
        runs = self.runs()
        if runs is None:
            return Speed(skipped=self.skipped), None
        found, peak = speed_of(self.files, runs, settings, alone, self.say, progress)
        return (found if found.model is None else replace(found, alone=alone)), peak


def _that_fit(tokens: Tokens, asked: Windows, windows: int | None, rates: Forecast, budget: Budget) -> list[int]:
    """[length, count] of the windows of a first pass."""
    if windows is not None:
        return [asked.length, asked.count]
    rest = rates.opening + _REST
    share = budget.left - (rest if rest <= budget.left / 2 else 0.0) - rates.fixed
    size = length_that_fits(asked.length, rates.token, share)
    return [size, USUAL if USUAL * size * rates.token <= share else COUNTS[0]]


def _quality(files: Files, parts: list[list[Figures]], windows: Windows) -> Quality:
    every = [figures for part in parts for figures in part]
    return replace(quality_of(files.model.kind, windows, every), program=PROGRAM)


def _measuring(cut: Windows) -> str:
    return (
        f"measuring quality block by block on {cut.count} window{'' if cut.count == 1 else 's'} of {cut.length} tokens"
    )
