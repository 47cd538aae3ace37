"""The token loop of transformers, called here and nowhere else: for answers, and for the speed that they are held against.

A model that the engine does not compute may have an encoder, recurrent states or a cache of its own kind. Its class knows how to
generate with them, and its users compare with what `generate` gives and takes; so lowbit has no second loop for such models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def generate_tokens(model: nn.Module, ids: Tensor, on_tokens: Callable[[Tensor], bool], **options: Any) -> Tensor:
    """What `model.generate` returns for prompts of equal length, ids [sequences, length] int64 on the model's device.

    on_tokens: called after each step with the new tokens [sequences]; True ends all sequences. options: those of `generate`. On
    some devices transformers learns one step late that it ends, so a call may follow one that gave True.
    """
    from transformers import StoppingCriteriaList

    def criterion(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        ends = on_tokens(input_ids[:, -1])
        return torch.full((input_ids.shape[0],), ends, dtype=torch.bool, device=input_ids.device)

    criteria = StoppingCriteriaList([criterion])
    found: Tensor = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), stopping_criteria=criteria, **options
    )
    return found
