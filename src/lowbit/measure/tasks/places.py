"""A label for each token of a text, for each frame of a sound, for each pixel or box of an image: how many keep theirs.

Labels of one input are not independent, so an input counts as one, by the share of its labels that stay.

Limits: a label is seen in its place, so more may change than of labels of whole inputs; most of a text or an image is easy, and what
changes is where the float model was unsure too. 1 % is within what other programs and types make of the same weights, 4 % is
one word of 25, and at 10 % errors are on every page.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from lowbit.interchange.hf.heads import loads_as
from lowbit.measure.agreement import mean
from lowbit.measure.tasks.task import Answer, Example, Facts, Figure, Kind, Task, task

TOKENS = Kind("token_labels", "same label", " % of tokens", 100.0, limits=(0.99, 0.96, 0.90))
REGIONS = Kind("region_labels", "same label", " % of places", 100.0, limits=(0.99, 0.96, 0.90))


@task
class Places(Task):
    """Logits [1, places, labels], or [1, labels, height, width], of models that are no language models."""

    name = "places"
    answers = "labels"
    kinds = (TOKENS, REGIONS)

    def fits(self, facts: Facts) -> bool:
        logits = facts.logits
        if logits is None or logits.dim() not in (3, 4):
            return False
        writes = getattr(facts.model, "can_generate", bool)() or loads_as(facts.model, "AutoModelForCTC")
        return not writes

    def read(self, facts: Facts, model: nn.Module, example: Example, answer: Answer) -> np.ndarray:
        logits = answer["logits"][0]
        return logits.argmax(0 if logits.dim() == 3 else -1).flatten().cpu().numpy().astype(np.int32)

    def compare(self, facts: Facts, found: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> tuple[Figure, ...]:
        same = np.array([float((a == b).mean()) for a, b in zip(found, right, strict=True)])
        return (Figure((TOKENS if facts.reads_text else REGIONS).name, mean(same)),)
