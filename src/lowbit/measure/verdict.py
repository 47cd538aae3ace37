"""One plain word for what quantizing cost, and a sentence where it cost time.

By the mean KL divergence from the float model in nats per token, or by the perplexity ratio when
there is no KL. For scale: 8-bit weights of a small model cost 0.001 to 0.003 nats, a good 4-bit
format 0.03 to 0.1, a poor one 0.3 and more. Models that predict no tokens have the same words by the figures of their task, whose
limits are in `tasks/`.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from lowbit.measure.outputs import Outputs, answers_of
from lowbit.measure.quality import Quality
from lowbit.measure.speed import Speed
from lowbit.measure.tasks.task import kind_named

if TYPE_CHECKING:
    from lowbit.measure.card import Card


class Threshold(NamedTuple):
    """A word, what it means, and up to which KL (nats per token) or perplexity ratio it holds."""

    word: str
    meaning: str
    kl: float
    ratio: float


THRESHOLDS = (
    Threshold("indistinguishable", "a reader could not tell it from the float model", 0.005, 1.003),
    Threshold("very close", "some words differ, and the meaning stays the same", 0.05, 1.03),
    Threshold("noticeable", "a reader comparing answers would see a difference", 0.3, 1.25),
    Threshold("damaged", "it answers worse; use more bits or a better method", math.inf, math.inf),
)


def verdict(quality: Quality) -> Threshold | None:
    """The first threshold that the quality keeps, or None when there was no float model to compare with."""
    if quality.kl_mean is not None:
        return word_of_kl(quality.kl_mean.value)
    if quality.ratio is not None:
        kept = [row for row in THRESHOLDS if quality.ratio.value <= row.ratio]
        return kept[0] if kept else THRESHOLDS[-1]  # NaN keeps none
    return None


class Word(NamedTuple):
    """A word of `THRESHOLDS` and what it means for the model at hand."""

    word: str
    meaning: str


_MEANINGS = (
    "its {answers} could not be told from those of the float model",
    "its {answers} differ a little, where the float model was hardly sure",
    "some of its {answers} differ from those of the float model",
    "many of its {answers} differ; use more bits or a better method",
)


def verdict_of(card: Card) -> Threshold | Word | None:
    """The word for what a card measured; None where there was nothing to compare, or nothing that decides."""
    if card.quality is not None:
        return verdict(card.quality)
    return None if card.outputs is None else verdict_of_outputs(card.outputs)


def verdict_of_outputs(outputs: Outputs, shift: float = 0.0) -> Word | None:
    """The worst of the words of all figures that have limits; None where none has.

    shift: standard errors by which every figure is taken to be worse than measured.
    """
    places = []
    for figure in outputs.figures:
        kind = kind_named(figure.name)
        if kind is not None and kind.limits is not None:
            off = shift * (figure.estimate.stderr or 0.0)
            places.append(kind.place(figure.estimate.value + (-off if kind.rising else off)))
    if not places:
        return None
    place = max(places)
    return Word(THRESHOLDS[place].word, _MEANINGS[place].format(answers=answers_of(outputs)))


def also(outputs: Outputs) -> Word | None:
    """The other word that two standard errors allow, the worse one first; None where they allow none."""
    found = verdict_of_outputs(outputs)
    near = (verdict_of_outputs(outputs, shift) for shift in (2.0, -2.0))
    return next((each for each in near if each is not None and each != found), None)


def word_of_kl(kl: float) -> Threshold:
    """The first threshold that a mean KL divergence, in nats per token, keeps; the last for NaN."""
    return next((row for row in THRESHOLDS if kl <= row.kl), THRESHOLDS[-1])


def near_limit(kl: float, stderr: float | None) -> Threshold | None:
    """The other word, where a mean KL divergence lies within two standard errors of the limit to it; None where it does not."""
    if stderr is None or not math.isfinite(stderr):
        return None
    for below, above in pairwise(THRESHOLDS):
        if abs(kl - below.kl) <= 2 * stderr:
            return above if kl <= below.kl else below
    return None


def slower(speed: Speed) -> str | None:
    """Where the model is slower than the float model, and what is faster; None where it is not."""
    names = [name for name in ("decode", "prefill", "batch") if (speed.ratio(name) or 1.0) < 1.0]
    if not names:
        return None
    if speed.program is not None and speed.program.startswith("engine"):
        way = "--activations int8, or a recipe with inputs in 8 bits such as w8a8, is faster"
    else:
        way = "what is saved is memory; the engine, which is faster, does not run this model"
    return f"the float model is faster at {' and '.join(names)} here; {way}"
