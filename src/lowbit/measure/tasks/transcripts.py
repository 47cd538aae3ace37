"""Words for a sound or an image: speech that is written down, captions. How many words are the float model's.

Both models decode greedily. The words of one are compared with those of the other by the word error rate: the fewest words that must be put
in, left out or changed, over the words of the float model. Without a tokenizer, tokens count as words.

Limits: what good models hear on clean speech is wrong by 2 to 5 % of the words. 1 % less agreement is within that, and less than
another width of search makes; 5 % is as much as the model's own errors; 15 % is seen in every sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
from torch import nn

from lowbit.interchange.hf.heads import loads_as
from lowbit.measure.agreement import mean, word_agreement
from lowbit.measure.calling import written
from lowbit.measure.tasks.task import Answer, Example, Facts, Figure, Kind, Task, task

WORDS = Kind("words", "same words", " %  (1 - word error rate)", 100.0, limits=(0.99, 0.95, 0.85))
WHOLE = Kind("transcripts", "same transcripts", " %", 100.0)
_NEW = 64  # tokens of a transcript at most


@task
class Transcripts(Task):
    """Models that write text of what they hear or see: with a CTC head, or with a decoder."""

    name = "transcripts"
    answers = "transcripts"
    kinds = (WORDS, WHOLE)

    def fits(self, facts: Facts) -> bool:
        if loads_as(facts.model, "AutoModelForCTC"):
            return facts.logits is not None and facts.logits.dim() == 3
        reads = getattr(facts.model, "main_input_name", "input_ids")
        return reads != "input_ids" and bool(getattr(facts.model, "can_generate", bool)())

    def read(self, facts: Facts, model: nn.Module, example: Example, answer: Answer) -> list[Any]:
        config: Any = facts.model.config
        if loads_as(facts.model, "AutoModelForCTC"):
            blank = getattr(config, "pad_token_id", None)
            ids = [int(key) for key, _ in groupby(answer["logits"][0].argmax(-1).tolist())]
            return _words(facts.tokenizer, [i for i in ids if i != blank])
        special = _special(config) | _special(getattr(facts.model, "generation_config", None))
        return _words(facts.tokenizer, [i for i in written(model, example, _NEW) if i not in special])

    def compare(self, facts: Facts, found: Sequence[list[Any]], right: Sequence[list[Any]]) -> tuple[Figure, ...]:
        if not any(map(len, [*found, *right])):
            return ()  # nothing was said by either, which is no agreement
        same = np.array([float(a == b) for a, b in zip(found, right, strict=True)])
        return Figure(WORDS.name, word_agreement(found, right)), Figure(WHOLE.name, mean(same))

    def words(self, facts: Facts) -> str:
        return "" if facts.tokenizer is not None else "by tokens, as there is no tokenizer"


def _special(config: Any) -> set[int]:
    """The tokens that begin, end and fill what a decoder writes."""
    named = [getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "decoder_start")]
    return {int(i) for each in named if each is not None for i in (each if isinstance(each, (list, tuple)) else [each])}


def _words(tokenizer: Any, ids: list[int]) -> list[Any]:
    """What was written as words; the ids themselves where there is no tokenizer."""
    if tokenizer is None:
        return ids
    try:
        text = tokenizer.decode(ids, skip_special_tokens=True, group_tokens=False)  # repeats are gone already
    except TypeError:
        text = tokenizer.decode(ids, skip_special_tokens=True)
    return str(text).split()
