"""The windows of tokens that every quality figure is measured on.

The whole text is tokenised once, without special tokens, and cut into windows that do not
overlap; the ragged end is dropped. The first token of a window is never scored in a causal model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TextError
from ..interchange.running import max_positions
from ..interchange.text import Text


@dataclass(frozen=True, eq=False)
class Windows:
    """ids [count, length] int64, the text that they are from, and remarks for the reader."""

    ids: Tensor
    text_name: str
    text_sha256: str
    text_tokens: int
    notes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        return self.ids.shape[1]


def make_windows(
    text: Text,
    tokenizer: Any,
    *,
    length: int = 1024,
    limit: int | None = None,
    model: nn.Module | None = None,
) -> Windows:
    """Cut `text` into windows of `length` tokens; the first `limit` of them when given.

    `model` gives the longest sequence; a greater `length` is reduced to it, and a note says so.
    Raises TextError when the text does not fill one window.
    """
    if length < 2:
        raise TextError(f"a window of {length} tokens has nothing to predict: use 2 or more")
    if limit is not None and limit < 1:
        raise TextError(f"{limit} windows were asked for: use 1 or more")
    notes = []
    longest = max_positions(model) if model is not None else None
    if longest is not None and longest < length:
        notes.append(f"windows of {longest} tokens, the most that the model takes, instead of {length}")
        length = longest
    ids = torch.tensor(_tokens(text, tokenizer), dtype=torch.int64)
    count = len(ids) // length
    if count == 0:
        raise TextError(
            f"{text.name} has {len(ids)} tokens, fewer than one window of {length}: "
            f"pass a longer text, or windows of at most {max(len(ids), 2)} tokens"
        )
    if limit is not None and count < limit:
        notes.append(f"{count} windows, all that the text has, instead of {limit}")
    count = min(count, limit or count)
    rows = ids[: count * length].view(count, length)
    return Windows(rows, text.name, text.sha256, len(ids), tuple(notes))


def _tokens(text: Text, tokenizer: Any) -> list[int]:
    # verbose=False: the tokenizer would warn that the whole text is longer than the model's context.
    return tokenizer(text.joined, add_special_tokens=False, verbose=False)["input_ids"]
