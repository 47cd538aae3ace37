"""A cache format in words: the verdict of its divergence, and what it does to long contexts."""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.measure.kv.figures import CacheFigures
from lowbit.measure.verdict import THRESHOLDS, word_of_kl

_WORSE = 0.05  # nats per token that a repeated sequence may lose before it is said
_SEEN = 0.001  # nats per token, below which growth is nobody's concern
_TELLING = 4  # facts that the float cache finds, from which on losing half of them is no chance
_GROWS = 2.0  # times, from the first tenths of the context to the last


@dataclass(frozen=True)
class Judged:
    """word: of `verdict.THRESHOLDS`, by the worst tenth of the context. breaks: whether the model is not to be used so. sentences: what is to be
    said, the most important first."""

    word: str
    breaks: bool
    sentences: tuple[str, ...]


def judged(row: CacheFigures) -> Judged:
    """The words for what was measured."""
    worst = word_of_kl(row.worst.kl.value)
    sentences = [*_facts(row), *_repetition(row), *_drift(row)]
    lost = row.base_found >= _TELLING and 2 * row.found <= row.base_found
    breaks = lost or worst is THRESHOLDS[-1]
    head = (
        f"{worst.word}: {worst.meaning}"
        if not lost or worst is THRESHOLDS[-1]
        else "damaged: it loses facts of the context"
    )
    return Judged("damaged" if lost else worst.word, breaks, (head, *sentences))


def _facts(row: CacheFigures) -> list[str]:
    if row.base_found == 0 or row.found >= row.base_found:
        return []
    return [
        f"finds {row.found} of {row.asked} facts that are planted in the context, where the float cache finds {row.base_found}"
    ]


def _repetition(row: CacheFigures) -> list[str]:
    seen = row.repetition
    if seen is None:
        return []
    error = max(seen.loss.stderr or 0.0, seen.base_loss.stderr or 0.0)
    if seen.loss.value - seen.base_loss.value <= max(_WORSE, 2 * error):
        return []
    return [
        f"predicts a sequence that comes again worse: a loss of {seen.loss.value:.2f}, with the float cache "
        f"{seen.base_loss.value:.2f} nats per token"
    ]


def _drift(row: CacheFigures) -> list[str]:
    if len(row.deciles) < 4:
        return []
    first, last = (sum(d.kl.value for d in part) / len(part) for part in (row.deciles[:2], row.deciles[-2:]))
    error = sum((d.kl.stderr or 0.0) for d in (row.deciles[0], row.deciles[-1]))
    if last > max(_SEEN, _GROWS * first) and last - first > 2 * error:
        return [f"grows worse along the context: KL {first:.2g} in the first fifth, {last:.2g} in the last"]
    return []
