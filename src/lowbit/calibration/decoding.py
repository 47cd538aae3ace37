"""Decoding on any model of transformers, one token at a time in large batches: a prompt is read, then `choose` makes tokens of
logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.interchange.hf.fast_decoding import allocate
from lowbit.interchange.hf.running import device_of

_CACHES = ("cache", "past_key_values", "cache_params")  # its name in transformers 5.24, before, and in Mamba before


def cache_name(model: nn.Module) -> str | None:
    """What the forward of `model` calls its cache; None where it takes none."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in _CACHES if name in parameters), None)


def decode(
    model: nn.Module, prompt: Tensor, choose: Callable[[Tensor], Tensor], count: int, encoder_ids: Tensor | None = None
) -> Iterator[Tensor]:
    """The next `count` tokens of all rows, one [rows] int64 after another; who iterates may stop before.

    `prompt` int64 [rows, n], n >= 1, is read in one forward. `choose(logits)` gives the next tokens [rows] for logits
    [rows, vocabulary] as the model has them (type and device). `encoder_ids`: see `Decoder`. Call it in inference mode, and
    inside `grouped_attention`.
    """
    decoder, given = Decoder(model, prompt.shape[1] + count, encoder_ids), prompt
    for _ in range(count):
        tokens = choose(decoder.read(given.to(device_of(model))))
        yield tokens
        given = tokens[:, None]


class Decoder:
    """A model that reads tokens of every row and answers with the logits of the next one.

    `capacity`: how many tokens a row will have at most. An encoder-decoder model reads `encoder_ids` [rows, L] once and
    its decoder reads the tokens. A model without a cache is given all tokens so far again.
    """

    def __init__(self, model: nn.Module, capacity: int, encoder_ids: Tensor | None = None) -> None:
        parameters = inspect.signature(model.forward).parameters
        self.model, self.capacity = model, capacity
        self.cache_name = cache_name(model)
        self.options: dict[str, Any] = {"use_cache": self.cache_name is not None} if "use_cache" in parameters else {}
        self.input_name = next(iter(parameters))
        self.cache: Any = None
        self.before: list[Tensor] = []
        if encoder_ids is not None:
            self.input_name = "decoder_input_ids"
            self.options["encoder_outputs"] = model.get_encoder()(input_ids=encoder_ids)  # type: ignore[operator]

    def read(self, tokens: Tensor) -> Tensor:
        """tokens int64 [rows, n], a prompt or what follows -> logits [rows, vocabulary] of the next one, in the model's dtype."""
        if self.cache_name is None:
            self.before.append(tokens)
            out = self.model(**{self.input_name: torch.cat(self.before, 1)}, **self.options)
        else:
            known = {} if self.cache is None else {self.cache_name: self.cache}
            out = self.model(**{self.input_name: tokens}, **known, **self.options)
            first, self.cache = self.cache is None, getattr(out, self.cache_name)
            if first:
                allocate(self.cache, self.capacity)
        logits = out if isinstance(out, Tensor) else out.logits
        return logits[:, -1]
