"""The windows of tokens that every quality figure is measured on.

The whole text is tokenised once, without special tokens, and cut into windows that do not overlap, each in what the model's
own tokenizer puts around a text (`Frame.of`); the ragged end is dropped. What the tokenizer put there is never scored, and
neither is the first token of a window in a causal model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.calibration.selftext import render_chat
from lowbit.calibration.text import Text
from lowbit.calibration.windows import Frame, framed_windows, text_ids
from lowbit.errors import TextError
from lowbit.interchange.hf.running import max_positions


@dataclass(frozen=True, eq=False)
class Windows:
    """ids [count, length] int64, the text that they are from, and remarks for the reader.

    `frame`: which tokens of each window the tokenizer put around it; a window of text that has them already is no exception.
    """

    ids: Tensor
    text_name: str
    text_sha256: str
    text_tokens: int
    notes: tuple[str, ...] = ()
    frame: Frame = field(default_factory=Frame)

    @property
    def count(self) -> int:
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        return self.ids.shape[1]


@dataclass(frozen=True, eq=False)
class Tokens:
    """A text as tokens, to be cut into windows of any length.

    ids: int64 [tokens], without what the tokenizer puts around a text, which is `frame`. longest: the most tokens that the model takes.
    """

    text: Text
    ids: Tensor
    frame: Frame
    longest: int | None = None

    @staticmethod
    def of(text: Text, tokenizer: Any, model: nn.Module | None = None, longest: int | None = None) -> Tokens:
        """`text` read once; conversations are rendered first. `model`: as of `make_windows`, `longest` where there is none."""
        text = text.rendered(lambda said: render_chat(tokenizer, said))
        longest = max_positions(model) if model is not None else longest
        return Tokens(text, text_ids(text.joined, tokenizer), Frame.of(tokenizer, model), longest)

    def windows(self, length: int, limit: int | None = None) -> Windows:
        """As `make_windows`."""
        if length < 2:
            raise TextError(f"a window of {length} tokens has nothing to predict: use 2 or more")
        if limit is not None and limit < 1:
            raise TextError(f"{limit} windows were asked for: use 1 or more")
        notes = []
        if self.longest is not None and self.longest < length:
            notes.append(f"windows of {self.longest} tokens, the most that the model takes, instead of {length}")
            length = self.longest
        found = framed_windows(self.text.name, self.ids, self.frame, length, "window")
        if limit is not None and len(found) < limit:
            notes.append(f"{len(found)} windows, all that the text has, instead of {limit}")
        rows = torch.stack(found[:limit])
        return Windows(rows, self.text.name, self.text.sha256, len(self.ids), tuple(notes), self.frame)


def make_windows(
    text: Text, tokenizer: Any, *, length: int = 1024, limit: int | None = None, model: nn.Module | None = None
) -> Windows:
    """Cut `text` into windows of `length` tokens; the first `limit` of them when given. Conversations are rendered first.

    `model` gives the longest sequence (a greater `length` is reduced to it, and a note says so) and whether a window has an
    end. Without it, windows are those of a decoder.
    Raises TextError when the text does not fill one window.
    """
    return Tokens.of(text, tokenizer, model).windows(length, limit)
