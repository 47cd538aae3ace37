"""A card in limited time: as many windows of the text as fit, each program opened once, and what else there is time for.

Both models run in the engine where it knows them, which computes with the weights as they are stored and with inputs of 15 bits. The
divergence of that from the same model in float32 is below 1e-6 nats per token on SmolLM2; that of bfloat16 is 1e-3, a fifth of the
limit of "indistinguishable", so models that the engine does not know run in float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.calibration.text import load_text
from lowbit.errors import SourceError
from lowbit.interchange.hf.heads import predicts_tokens
from lowbit.interchange.hf.running import fast_dtype
from lowbit.interchange.opening import open_source
from lowbit.interchange.pace import Clock
from lowbit.interchange.readers.module import ModuleSource
from lowbit.interchange.source import Source
from lowbit.measure.backends import Backend, in_transformers
from lowbit.measure.card import Card, CardParts, TextMark
from lowbit.measure.card_budget import COUNTS, SHORTEST, USUAL, Budget, Ladder, length_that_fits
from lowbit.measure.environment import environment
from lowbit.measure.interleave import SpeedSettings
from lowbit.measure.kept import KEPT_NOWHERE, Keeping, Kept
from lowbit.measure.output_card import card_of_embeddings, card_of_outputs, folders_of, refuse_inputs
from lowbit.measure.quality import HowMany, Progress, compare_logits, measure_quality
from lowbit.measure.runs import Runs, both_by_engine, by_transformers
from lowbit.measure.sample import Sample, kept_sample
from lowbit.measure.speed import Speed, measure_speed
from lowbit.measure.speed_as_generated import FAILURES, peak_of
from lowbit.measure.subject import folder_of, open_subject, parts_of
from lowbit.measure.time_notes import time_notes
from lowbit.measure.token_times import torch_threads
from lowbit.measure.windows import Tokens, Windows
from lowbit.pipeline.api import Quantized

LENGTH = 1024  # tokens of a window, where no number is asked for
_PROBES = (32, 128)  # tokens of text, of which the rate is measured; the longer one only where that is quick
_QUICK = 0.05  # of the time that there is
_ANSWERS = (60, 24)  # tokens of an answer at most
_SPEEDS = (
    SpeedSettings(new=16, batch=0, repeats=2),
    SpeedSettings(prompt=16, new=16, prefill=256, batch=0, repeats=1),
    SpeedSettings(prompt=16, new=8, prefill=64, batch=0, repeats=1),
)
_PROCESS = 4.0  # seconds in which a fresh process imports what it needs
_SLOWER = 3.0  # the float model in transformers takes so many times as long as in the engine (measured on SmolLM2)


@dataclass(frozen=True)
class _Costs:
    """Seconds, measured on the models at hand. token: of a window, through both models and compared. new: of a generated token, by both.
    opening: of each model."""

    token: float
    new: float
    opening: float

    def answers(self, tokens: int) -> float:
        return 64 * self.token + tokens * self.new

    def speed(self, how: SpeedSettings) -> float:
        """Of both models in the program that measures quality, with a round to warm up."""
        return (1 + how.repeats) * ((how.prompt + how.prefill) * self.token + how.new * self.new)

    @property
    def process(self) -> float:
        return _PROCESS + self.opening


def quick_card(
    model: str | Path | nn.Module | Quantized, against: str | Path | nn.Module | None, text: Any, *, seconds: float,
    windows: int | None, length: int | None, prompt: str | None, tokenizer: Any, say: Callable[[str], None],
    progress: Progress | None, clock: Clock = time.perf_counter, inputs: Any = None, keeping: Keeping = KEPT_NOWHERE,
) -> Card:  # fmt: skip
    """As `evaluate` with `budget=seconds`, both models whole in memory."""
    budget = Budget(seconds, clock)
    source = _float_source(model, against)
    say("loading the model" if source is None else "loading the model and its float model")
    folders = folders_of(model, source)
    embeds = card_of_embeddings(
        model, source, tokenizer, text, windows, length, say, inputs, folders, progress, budget.left
    )
    if embeds is not None:
        return embeds
    mine, other, parts, words = _opened(model, source, tokenizer)
    if parts.bytes_before is None and source is not None:
        parts = replace(parts, bytes_before=sum(spec.nbytes for spec in source.tensors.values()))
    if mine.module is not None and not predicts_tokens(mine.module):
        base = None if other is None else other.module
        return card_of_outputs(
            mine.module,
            base,
            parts,
            words,
            text,
            windows,
            length,
            say,
            inputs=inputs,
            folders=folders,
            progress=progress,
            seconds=budget.left,
        )
    refuse_inputs(inputs, model)
    length = length or LENGTH
    opening = budget.used / (1 if other is None else 2)
    tok = words()
    tokens = Tokens.of(load_text(text), tok, mine.module, mine.longest)
    tokens.windows(length, windows)  # what is wrong with a text is said before anything is measured
    program = _program(mine, other, source)
    with keeping.on(tokens, length=length, windows=windows, prompt=prompt, program=program) as kept:
        # PyTorch only compares logits then: threads of its own would go on spinning while the engine's work.
        with torch_threads(1 if mine.module is None else None):
            say("measuring how fast this machine is")
            costs = _costs(tokens, length, mine, other, opening, seconds, clock)
            plan = _planned(tokens, length, windows, costs, budget, kept)
            plural = "" if plan.aim == 1 else "s"
            say(
                f"measuring quality on {plan.aim} window{plural} of {plan.cut.length} tokens "
                f"(about {max(1, round(plan.seconds))} s for all of the card)"
            )
            before = budget.used
            quality = measure_quality(
                mine.scorer,
                plan.cut,
                base=None if other is None else other.scorer,
                progress=progress,
                how_many=plan.how_many,
                kept=kept,
            )
        if windows is not None:  # asked for, whatever that took
            budget.seconds += max(0.0, budget.used - before - plan.share)
        quality = replace(quality, program=program)
        notes = () if windows is not None else time_notes(quality, plan.there, tokens, length, seconds)
        mark = replace(TextMark.of(plan.cut), windows=quality.windows, notes=(*plan.cut.notes, *notes))
        sample = kept_sample(kept, lambda: _sample(mine, other, tok, prompt, costs, budget, say))
        baseline: Runs | Source | None = other if other is None or other.module is not None else source
        other = None  # its memory is needed for the next
        rates, peak = _speed(mine, baseline, costs, budget, say, progress)
        return Card(parts, mark, quality, rates, peak, sample, environment(), budget=seconds)


@dataclass(frozen=True)
class _Plan:
    """What is measured of the text: the windows that may be, of how many that are `there`, and which of them `how_many` takes, probably
    `aim`. share: seconds for that; seconds: what it takes with all that comes after it."""

    cut: Windows
    there: int
    aim: int
    how_many: HowMany | None
    share: float
    seconds: float


def _planned(
    tokens: Tokens, length: int, windows: int | None, costs: _Costs, budget: Budget, kept: Kept
) -> _Plan:  # fmt: skip
    free, aside = budget.left - COUNTS[0] * SHORTEST * costs.token, 0.0
    for cost in (costs.answers(_ANSWERS[-1]), costs.speed(_SPEEDS[-1]), costs.process, costs.speed(_SPEEDS[0])):
        aside += cost if aside + cost <= free / 2 else 0.0
    share = max(0.0, budget.left - aside)
    most = length if tokens.longest is None else min(length, tokens.longest)
    size = most if windows is not None else kept.found("length", lambda: length_that_fits(most, costs.token, share))
    every = tokens.windows(size if size < most else length)
    usual = USUAL if USUAL * size * costs.token <= share else COUNTS[0]
    limit, aim = (COUNTS[-1], usual) if windows is None else (windows, windows)
    cut = replace(every, ids=every.ids[:limit])
    if windows is not None:
        cut = tokens.windows(length, windows)  # which says where the text has fewer
    aim = min(aim, cut.count)
    how_many = None if windows is not None else Ladder(share, budget.clock, len(kept.figures(cut.count)))
    return _Plan(cut, every.count, aim, how_many, share, aim * cut.length * costs.token + aside)


def _float_source(model: Any, against: Any) -> Source | None:
    if against is not None:
        return open_source(against)
    return model.source if isinstance(model, Quantized) else None


def _opened(
    model: Any, source: Source | None, tokenizer: Any
) -> tuple[Runs, Runs | None, CardParts, Callable[[], Any]]:
    """Both models in the engine, else both in transformers; what the card says of the first, and what gives its tokenizer."""
    folder, reason = folder_of(model), ""
    if folder is not None and not isinstance(source, ModuleSource):
        found = both_by_engine(folder, source)
        if not isinstance(found, str):
            parts, words = parts_of(model, tokenizer)
            return *found, parts, _words(words, source)
        reason = found
    subject = open_subject(model, tokenizer, torch.float32)
    base = None if source is None else source.load_float(torch.float32)
    other = None if base is None else by_transformers(base)
    return by_transformers(subject.module, reason), other, subject.parts, _words(subject.tokenizer, source)


def _words(own: Callable[[], Any] | None, source: Source | None) -> Callable[[], Any]:
    if own is not None:
        return own
    if source is not None:
        return source.tokenizer
    raise SourceError("no tokenizer comes with this model; pass tokenizer=...")


def _costs(
    tokens: Tokens, length: int, mine: Runs, other: Runs | None, opening: float, seconds: float, clock: Clock
) -> _Costs:
    rate = 0.0
    for count in _PROBES:
        cut = tokens.windows(min(length, count + tokens.frame.size), 1)
        if rate * cut.length > _QUICK * seconds:
            break
        start, ids = clock(), cut.ids[0]
        base = None if other is None else other.scorer.logits(ids, cut.frame)
        compare_logits(mine.scorer.logits(ids, cut.frame), mine.scorer.targets(ids, cut.frame), base)
        rate = (clock() - start) / cut.length
    new = 0.0
    for each in (mine, other):
        if each is not None and each.times is not None:
            times = each.times(1, min(8, length // 2), 3)
            new += (times[-1] - times[0]) / 2
    return _Costs(rate, new, opening)


def _program(mine: Runs, other: Runs | None, source: Source | None) -> str:
    if other is None:
        return mine.program
    if mine.module is not None or source is None:
        return f"{mine.program}, both models"
    largest = max(source.tensors, key=lambda name: source.tensors[name].nbytes)
    stored = source.storage if source.storage != "float" else str(source.float_type(largest)).removeprefix("torch.")
    return f"{mine.program}, both models; the weights of the float model as they are stored ({stored})"


def _sample(
    mine: Runs, other: Runs | None, tokenizer: Any, prompt: str | None, costs: _Costs, budget: Budget,
    say: Callable[[str], None],
) -> Sample | None:  # fmt: skip
    """Both answers, shorter ones where there is less time; None where there is none."""
    # Time for the shortest answer was set aside; a longer one leaves some for speed and memory.
    shares = [(_ANSWERS[0], budget.left / 3), (_ANSWERS[-1], budget.left)]
    new = next((each for each, most in shares if costs.answers(each) <= most), None)
    if not prompt or mine.answer is None or new is None:
        return None
    say("answering a prompt")
    said = mine.answer(tokenizer, prompt, new)
    return Sample(prompt, said, None if other is None or other.answer is None else other.answer(tokenizer, prompt, new))


def _speed(
    mine: Runs, base: Runs | Source | None, costs: _Costs, budget: Budget, say: Callable[[str], None],
    progress: Progress | None,
) -> tuple[Speed, int | None]:  # fmt: skip
    """The speed of the model, that of the float model in transformers, and the peak memory of a fresh process: what there is time for."""
    late = "there was no time for it; `lowbit quantize --card full` measures it"
    room = budget.left - costs.process
    beside = [each for each in _SPEEDS if base is not None and _beside(base, costs, each) <= room]
    alone = [each for each in _SPEEDS if costs.speed(each) <= 0.6 * budget.left]
    try:
        program, found = mine.backend(), Speed(skipped=late)
        if beside or alone:
            say("measuring speed")
            other = _baseline(base) if beside else None
            found = measure_speed(program, base=other, settings=[*beside, *alone][0], progress=progress)
    except FAILURES as error:
        return Speed(skipped=str(error) or type(error).__name__), None
    if program.first is None or costs.process > budget.left:
        return found, None
    return found, peak_of(program, say)


def _beside(base: Runs | Source, costs: _Costs, how: SpeedSettings) -> float:
    """Seconds for the speed of both, with the float model in transformers, into which it is loaded for that where the engine has it."""
    if isinstance(base, Runs):
        return costs.speed(how)
    return 2 * costs.opening + costs.speed(how) * (1 + _SLOWER) / 2


def _baseline(base: Runs | Source | None) -> Backend | None:
    """The float model in transformers, in one type: that whose products are faster on this processor."""
    if base is None:
        return None
    return base.backend() if isinstance(base, Runs) else in_transformers(base.load_float(fast_dtype()))
