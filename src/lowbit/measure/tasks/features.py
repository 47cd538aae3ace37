"""What an encoder of images or sounds makes of its input, for others to build on: how near its features stay.

The features are the pooled ones of the model where it has such, else the mean of its last hidden states over all places. Limits of the
cosine as in `embeddings.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from lowbit.measure.agreement import cosines, mean
from lowbit.measure.tasks.embeddings import COSINE
from lowbit.measure.tasks.task import Answer, Example, Facts, Figure, Kind, Task, task

FEATURES = Kind("features", "cosine of features", limits=COSINE.limits)
_POOLED = ("image_embeds", "audio_embeds", "embeddings", "pooler_output")


@task
class Features(Task):
    """Models that read no text and have neither labels nor words."""

    name = "features"
    answers = "features"
    kinds = (FEATURES,)

    def fits(self, facts: Facts) -> bool:
        return not facts.reads_text and facts.logits is None and _features(facts.answer) is not None

    def read(self, facts: Facts, model: nn.Module, example: Example, answer: Answer) -> np.ndarray:
        found = _features(answer)
        return np.zeros(1) if found is None else found.flatten().double().cpu().numpy()

    def compare(self, facts: Facts, found: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> tuple[Figure, ...]:
        return (Figure(FEATURES.name, mean(cosines(np.stack(found), np.stack(right)))),)

    def words(self, facts: Facts) -> str:
        pooled = any(_is_pooled(facts.answer, name) for name in _POOLED)
        return "as the model pools them" if pooled else "mean over all places"


def _is_pooled(answer: Answer, name: str) -> bool:
    return name in answer and answer[name].numel() == max(answer[name].shape)  # [1, width], or [1, width, 1, 1]


def _features(answer: Answer) -> Tensor | None:
    """[width], None where there are none."""
    for name in _POOLED:
        if _is_pooled(answer, name):
            return answer[name].flatten()
    hidden = answer.get("last_hidden_state")
    if hidden is None or hidden.dim() not in (3, 4):
        return None
    return hidden[0].double().mean(0 if hidden.dim() == 3 else (1, 2))
