"""One score for each pair of a query and a text: rerankers, and reward models. Whether texts come out in the same order.

Each query is the beginning of one of the texts, and is paired with several of them, so that a score is of a pair as the model's users
make it. Scores count by the order in which they put the texts of a query, and beside that by how far they moved, as a share of how far the
float model's scores are spread.

Limits: which text comes first is what is seen, and of 8 queries a coarse figure, so the order of all texts decides. Among 8 texts a rank correlation of 0.99 leaves room for one pair of neighbours that
has changed places in two queries, 0.95 for two pairs in each, 0.85 for a text that has moved by three places.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from lowbit.measure.agreement import jackknife, mean, same_best, spearman
from lowbit.measure.tasks.pairs import paired
from lowbit.measure.tasks.task import Answer, Example, Facts, Figure, Kind, Task, task

ORDER = Kind("order", "same order of texts", "  (rank correlation, 1 is the same)", limits=(0.99, 0.95, 0.85))
FIRST = Kind("first", "same first text", " %", 100.0)
SCORES = Kind("scores", "scores moved by", " % of their spread", 100.0, rising=False)
_QUERIES = _TEXTS = 8


@task
class Scores(Task):
    """Models with one logit for an input: [1, 1]."""

    name = "scores"
    answers = "scores"
    kinds = (ORDER, FIRST, SCORES)

    def fits(self, facts: Facts) -> bool:
        logits = facts.logits
        return logits is not None and tuple(logits.shape) == (1, 1)

    def examples(self, facts: Facts) -> list[Example] | None:
        windows = facts.windows
        if windows is None or facts.tokenizer is None or windows.count < 2:
            return None
        texts, queries = min(_TEXTS, windows.count), min(_QUERIES, windows.count)
        # A query meets the text that it begins, and those after it: some fit it better than others.
        return paired(facts, [(q, (q + k) % windows.count) for q in range(queries) for k in range(texts)])

    def read(self, facts: Facts, model: nn.Module, example: Example, answer: Answer) -> float:
        return float(answer["logits"][0, 0].double())

    def compare(self, facts: Facts, found: Sequence[float], right: Sequence[float]) -> tuple[Figure, ...]:
        a, b = np.array(found), np.array(right)
        spread = float(b.std()) or 1.0
        moved = Figure(SCORES.name, mean(np.abs(a - b) / spread))
        if self.examples(facts) is None:  # no queries: all inputs in one order
            if len(a) < 3:
                return (moved,)
            return Figure(ORDER.name, jackknife(lambda w: float(spearman(a[w], b[w])), len(a))), moved
        texts = min(_TEXTS, facts.windows.count if facts.windows is not None else _TEXTS)
        a, b = (x[: len(x) // texts * texts].reshape(-1, texts) for x in (a, b))  # queries with all of their texts
        if not len(a):
            return (moved,)
        figures = [Figure(ORDER.name, mean(spearman(a, b)))] if texts > 2 else []
        return (*figures, Figure(FIRST.name, mean(same_best(a, b))), moved)

    def words(self, facts: Facts) -> str:
        if self.examples(facts) is None:
            return ""
        windows = facts.windows
        count = 0 if windows is None else windows.count
        return f"{min(_QUERIES, count)} beginnings of texts as queries, each with {min(_TEXTS, count)} texts"
