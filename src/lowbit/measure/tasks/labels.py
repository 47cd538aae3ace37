"""One label for each input: classes of texts, of images, of sounds. Whether the label stays, and how far its probability moved.

How far two distributions over labels are apart is their total variation, half of the sum of |p - q|: the most that the probability of
any set of labels differs.

Limits. Of 64 inputs none may change for "indistinguishable", and two for "very close"; a classifier that is right nine times out
of ten is not wrong more often by one in ten of its mistakes, which is one input in a hundred. Probabilities that move by 0.01 change no
threshold that people set, and by 0.1 they change many.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from lowbit.measure.agreement import mean
from lowbit.measure.tasks.task import Answer, Example, Facts, Figure, Kind, Task, task

LABELS = Kind("labels", "same label", " %", 100.0, limits=(0.99, 0.96, 0.90))
PROBABILITIES = Kind("probabilities", "probabilities moved by", limits=(0.01, 0.03, 0.10), rising=False)
_SEVERAL = "multi_label_classification"


@task
class Labels(Task):
    """Classifiers of whole inputs: logits [1, labels] for two labels or more."""

    name = "labels"
    answers = "labels"
    kinds = (LABELS, PROBABILITIES)

    def fits(self, facts: Facts) -> bool:
        logits = facts.logits
        return logits is not None and logits.dim() == 2 and logits.shape[1] > 1

    def read(self, facts: Facts, model: nn.Module, example: Example, answer: Answer) -> np.ndarray:
        logits = answer["logits"][0].double()
        found = torch.sigmoid(logits) if _several(facts) else torch.softmax(logits, -1)
        return found.cpu().numpy()

    def compare(self, facts: Facts, found: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> tuple[Figure, ...]:
        p, q = np.stack(found), np.stack(right)
        if _several(facts):  # each label is decided by itself: an input counts where all of them stay
            same, moved = ((p > 0.5) == (q > 0.5)).all(1), np.abs(p - q).mean(1)
        else:
            same, moved = p.argmax(1) == q.argmax(1), np.abs(p - q).sum(1) / 2
        return Figure(LABELS.name, mean(same.astype(np.float64))), Figure(PROBABILITIES.name, mean(moved))


def _several(facts: Facts) -> bool:
    return getattr(getattr(facts.model, "config", None), "problem_type", None) == _SEVERAL
