"""Texts as vectors, for search and clustering: how near each vector stays, and whether searches still find the same texts.

Every text stands for a query, and the others are ranked by the cosine of their embeddings with its own, once by each model. Without
files that say how hidden states are pooled, the embedding is their mean over the tokens.

Limits. An embedding that is off by the angle t, in a direction that has nothing to do with the others, moves its cosines with others by
about t / sqrt(d), d its width: 0.0016 at a cosine of 0.9995 with d = 384, which is what rounding to bfloat16 and other programs make
of it; 0.009 at 0.985 and 0.016 at 0.95, as much as there often lies between the first results of a search. Of the five nearest texts
one in fifty, one in ten, one in four may be another, which is where these cosines put all-MiniLM-L6-v2 (benchmarks/results/embedding-model.md).
Which text is the nearest decides nothing: over 64 texts that share is only known to 4 %.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from lowbit.measure.agreement import cosines, jackknife, mean, others, same_best, shared_best, similarities, spearman
from lowbit.measure.tasks.task import Answer, Example, Facts, Figure, Kind, Task, task

COSINE = Kind("cosine", "cosine of embeddings", limits=(0.9995, 0.985, 0.95))
RANKS = Kind("ranks", "same ranking", "  (rank correlation, 1 is the same)")
NEAREST = Kind("nearest", "same nearest text", " %", 100.0)
TOP = Kind("top", "same five nearest", " %", 100.0, limits=(0.98, 0.90, 0.75))
_TOP = 5
_FEW, _MORE = 4, 12  # texts, from which ranks are measured, and from which five of them are a choice
_NAMES = ("text_embeds", "pooler_output")  # what stands for a text where there are no hidden states


@task
class Embeddings(Task):
    """Encoders of text, and language models whose folder makes embeddings of what they compute."""

    name = "embeddings"
    answers = "embeddings"
    kinds = (COSINE, RANKS, NEAREST, TOP)

    def fits(self, facts: Facts) -> bool:
        if not facts.reads_text or facts.logits is not None or len(towers(facts.answer)) > 1:
            return False
        hidden = facts.hidden
        return (hidden is not None and hidden.dim() == 3) or any(name in facts.answer for name in _NAMES)

    def read(self, facts: Facts, model: nn.Module, example: Example, answer: Answer) -> np.ndarray:
        return _vector(facts, answer).double().cpu().numpy()

    def compare(self, facts: Facts, found: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> tuple[Figure, ...]:
        a, b = np.stack(found), np.stack(right)
        figures = [Figure(COSINE.name, mean(cosines(a, b)))]
        if len(a) < _FEW:
            return tuple(figures)
        sims = similarities(a, a), similarities(b, b)

        def among(which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            left, right = (others(s[np.ix_(which, which)]) for s in sims)
            return left, right

        figures.append(Figure(RANKS.name, jackknife(lambda w: float(spearman(*among(w)).mean()), len(a))))
        every = among(np.arange(len(a)))
        figures.append(Figure(NEAREST.name, mean(same_best(*every))))
        if len(a) >= _MORE:
            figures.append(Figure(TOP.name, mean(shared_best(*every, _TOP))))
        return tuple(figures)

    def words(self, facts: Facts) -> str:
        if facts.pooling is not None and facts.hidden is not None:
            return f"{facts.pooling.words}, as the model's folder says"
        if facts.hidden is not None and "text_embeds" not in facts.answer:
            return "mean over tokens, as no file of the model says otherwise"
        return ""


def towers(answer: Answer) -> list[str]:
    """The names of the embeddings [1, width] that a model gives, each of another kind of input."""
    return [name for name, value in answer.items() if name.endswith("_embeds") and value.dim() == 2]


def _vector(facts: Facts, answer: Answer) -> Tensor:
    hidden = answer.get("last_hidden_state")
    if facts.pooling is not None and hidden is not None:
        return facts.pooling(hidden[0].float())
    if "text_embeds" in answer:
        return answer["text_embeds"].flatten()
    return answer["pooler_output"].flatten() if hidden is None else hidden[0].double().mean(0)
