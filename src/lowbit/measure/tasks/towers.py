"""Texts and images (or sounds) in one space, as CLIP has them: how near the vectors of both stay, and whether each image still
finds the same texts.

Every image ranks all texts by the cosine of the embeddings, once by each model. Limits of the cosines as in `embeddings.py`; of the rank correlation as
there too, where 0.999, 0.99 and 0.97 went with the cosines 0.9997, 0.990 and 0.960. Which text is the best one decides nothing: there are few images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

from lowbit.measure.agreement import cosines, jackknife, mean, same_best, similarities, spearman
from lowbit.measure.tasks.embeddings import COSINE, towers
from lowbit.measure.tasks.task import Answer, Example, Facts, Figure, Kind, Task, task

_KINDS = {
    f"{what}_embeds": Kind(f"cosine_{what}", f"cosine of {what} embeddings", limits=COSINE.limits)
    for what in ("text", "image", "audio", "video")
}
RANKS = Kind("text_ranks", "same ranking of texts", "  (rank correlation, 1 is the same)", limits=(0.998, 0.98, 0.93))
NEAREST = Kind("text_nearest", "same best text", " %", 100.0)
_FEW = 4


@task
class Towers(Task):
    """Models that give an embedding [1, width] for each of two kinds of input, one of them text."""

    name = "towers"
    answers = "embeddings"
    kinds = (*_KINDS.values(), RANKS, NEAREST)

    def fits(self, facts: Facts) -> bool:
        found = [name for name in towers(facts.answer) if name in _KINDS]
        return "text_embeds" in found and len(found) > 1

    def read(self, facts: Facts, model: nn.Module, example: Example, answer: Answer) -> Mapping[str, np.ndarray]:
        return {name: answer[name][0].double().cpu().numpy() for name in towers(answer) if name in _KINDS}

    def compare(
        self, facts: Facts, found: Sequence[Mapping[str, np.ndarray]], right: Sequence[Mapping[str, np.ndarray]]
    ) -> tuple[Figure, ...]:
        a, b = ({name: np.stack([one[name] for one in each]) for name in each[0]} for each in (found, right))
        figures = [Figure(_KINDS[name].name, mean(cosines(a[name], b[name]))) for name in a]
        other = next(name for name in a if name != "text_embeds")
        if len(found) < _FEW or a[other].shape[1] != a["text_embeds"].shape[1]:
            return tuple(figures)
        ours, theirs = (similarities(each[other], each["text_embeds"]) for each in (a, b))

        def among(which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return ours[np.ix_(which, which)], theirs[np.ix_(which, which)]

        figures.append(Figure(RANKS.name, jackknife(lambda w: float(spearman(*among(w)).mean()), len(found))))
        figures.append(Figure(NEAREST.name, mean(same_best(ours, theirs))))
        return tuple(figures)
