"""A span of a text for each question: whether the answer is the same one, and how much of it.

The span of an input is the one, of at most 30 tokens, whose start and end have the largest sum of logits. How much two spans have in common is
their F1: twice the tokens in both over the tokens of each (Rajpurkar et al. 2016).

Limits: an answer that is another one is seen at once, and one that is a word longer hardly. Of 64 questions one may change for
"indistinguishable", and six for "very close"; tokens in common count likewise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lowbit.measure.agreement import mean
from lowbit.measure.tasks.pairs import paired
from lowbit.measure.tasks.task import Answer, Example, Facts, Figure, Kind, Task, task

SPANS = Kind("spans", "same span", " % of answers", 100.0, limits=(0.98, 0.90, 0.75))
SHARED = Kind("shared", "tokens in common", " %  (F1 of spans)", 100.0, limits=(0.98, 0.90, 0.75))
_LONGEST = 30
Span = tuple[int, int]
"""First and last token."""


@task
class Spans(Task):
    """Models that answer questions from a text: logits [1, tokens] of where an answer starts and ends."""

    name = "spans"
    answers = "answers"
    kinds = (SPANS, SHARED)

    def fits(self, facts: Facts) -> bool:
        return all(name in facts.answer and facts.answer[name].dim() == 2 for name in ("start_logits", "end_logits"))

    def examples(self, facts: Facts) -> list[Example] | None:
        windows = facts.windows
        if windows is None or facts.tokenizer is None:
            return None
        return paired(facts, [(i, i) for i in range(windows.count)])

    def read(self, facts: Facts, model: nn.Module, example: Example, answer: Answer) -> Span:
        return best_span(answer["start_logits"][0], answer["end_logits"][0])

    def compare(self, facts: Facts, found: Sequence[Span], right: Sequence[Span]) -> tuple[Figure, ...]:
        same = [float(a == b) for a, b in zip(found, right, strict=True)]
        shared = [span_f1(a, b) for a, b in zip(found, right, strict=True)]
        return Figure(SPANS.name, mean(np.array(same))), Figure(SHARED.name, mean(np.array(shared)))


def best_span(start: Tensor, end: Tensor, longest: int = _LONGEST) -> Span:
    """Logits [tokens] of both -> (first, last) with the largest sum, at most `longest` tokens; the first of equal ones."""
    sums = start.double()[:, None] + end.double()[None, :]
    allowed = torch.ones_like(sums, dtype=torch.bool).triu().tril(longest - 1)
    place = int(sums.masked_fill(~allowed, -torch.inf).argmax())
    return place // len(end), place % len(end)


def span_f1(a: Span, b: Span) -> float:
    """2 * shared / (tokens of a + tokens of b)."""
    shared = max(0, min(a[1], b[1]) - max(a[0], b[0]) + 1)
    return 2 * shared / (a[1] - a[0] + b[1] - b[0] + 2)
