"""What a tokenizer puts around a text, and windows of tokens that begin, and where they must end, with it.

A model that never saw a text without its first token is another model without it: it keeps there what it attends to when
nothing else matters (Xiao et al. 2023, arXiv:2309.17453). So every window that is measured on or calibrated with has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import TextError

_PROBES = ("a", "The river", "1 + 1")


@dataclass(frozen=True)
class Frame:
    """Token ids `before` and `after` a text. None of them is scored."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @staticmethod
    def of(tokenizer: Any, model: Any = None, config: Any = None, *, whole: bool = False) -> Frame:
        """What `tokenizer` puts around a text that `model` is given.

        Found by what it does, a text encoded with and without special tokens, since its fields often say something else.
        What comes after belongs to models that see a text as a whole: to a decoder that goes on writing, a window cut out
        of a text has no end. model: a module, or a class of transformers and its `config`; None for such a decoder. whole: whether it reads
        texts as a whole though its class could go on, as where a decoder makes embeddings.
        """
        found = next(
            (frame for probe in _probes(tokenizer) if (frame := _frame_of(tokenizer, probe)) is not None), Frame()
        )
        return found if whole or _sees_the_end(model, config) else Frame(found.before)

    @property
    def size(self) -> int:
        """How many tokens of a window are no text."""
        return len(self.before) + len(self.after)

    def inside(self, ids: Tensor) -> Tensor:
        """ids [n] without the frame, where they have it."""
        start = len(self.before) if self._opens(ids) else 0
        end = len(ids) - (len(self.after) if ids[len(ids) - len(self.after) :].tolist() == list(self.after) else 0)
        return ids[start : max(start, end)]

    def windows(self, ids: Tensor, length: int) -> list[Tensor]:
        """ids [n] of a text -> windows [length] that do not overlap, each in the frame; the ragged end is dropped.

        What stands before is not put twice, as where a chat template has written it.
        """
        return (
            list(self._windows(ids, length)) if self.size else list(ids[: len(ids) // length * length].view(-1, length))
        )

    def _windows(self, ids: Tensor, length: int) -> Iterator[Tensor]:
        before, after = torch.tensor(self.before, dtype=ids.dtype), torch.tensor(self.after, dtype=ids.dtype)
        space, start = length - self.size, 0
        while space > 0:
            begins = self._opens(ids[start:])
            end = start + space + (len(before) if begins else 0)
            if end > len(ids):
                return
            yield torch.cat([ids[start:end], after] if begins else [before, ids[start:end], after])
            start = end

    def _opens(self, ids: Tensor) -> bool:
        return bool(self.before) and ids[: len(self.before)].tolist() == list(self.before)


def text_ids(text: str, tokenizer: Any) -> Tensor:
    """int64 [n]: the tokens of a text alone."""
    # verbose=False: the tokenizer would warn that the whole text is longer than the model's context.
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)


def framed_windows(name: str, ids: Tensor, frame: Frame, length: int, what: str) -> list[Tensor]:
    """`frame.windows`, at least one. TextError when there is none; what: such as "calibration window"."""
    if length <= frame.size:
        raise TextError(
            f"a window of {length} tokens has no room for text, since the tokenizer puts {frame.size} tokens around it: "
            f"use {frame.size + 2} or more"
        )
    found = frame.windows(ids, length)
    if not found:
        frame_text = f" and the {frame.size} that the tokenizer puts around them" if frame.size else ""
        raise TextError(
            f"{name} has {len(ids)} tokens{frame_text}, fewer than one {what} of {length}: "
            f"pass a longer text, or windows of at most {max(len(ids) + frame.size, 2)} tokens"
        )
    return found


def _probes(tokenizer: Any) -> Iterator[str]:
    """Short texts; then some of the vocabulary's own, for one that knows none of these."""
    yield from _PROBES
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else 0
    yield from (tokenizer.decode([size * part // 4]) for part in (1, 2, 3) if size)


def _frame_of(tokenizer: Any, probe: str) -> Frame | None:
    """The frame of one text, None where its own tokens cannot be told from what is around them."""
    whole, plain = _ids(tokenizer, probe, True), _ids(tokenizer, probe, False)
    starts = [i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain] if plain else []
    if len(starts) != 1:
        return None
    return Frame(tuple(whole[: starts[0]]), tuple(whole[starts[0] + len(plain) :]))


def _ids(tokenizer: Any, text: str, special: bool) -> Sequence[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def _sees_the_end(model: Any, config: Any) -> bool:
    """Whether a model reads a text as a whole: encoders, with or without a decoder, and models that write nothing."""
    able = getattr(model, "can_generate", None)
    if not callable(able):
        return False
    config = getattr(model, "config", None) if config is None else config
    return bool(getattr(config, "is_encoder_decoder", False)) or not able()
