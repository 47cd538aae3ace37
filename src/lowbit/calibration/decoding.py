"""Decoding on any model of transformers, one token at a time in large batches: a prompt is read, then `choose` makes tokens of
logits.

Two costs of transformers that a CPU feels most are avoided, without a change in what is computed:
the cache is grown by copying all of it for every token, and grouped queries are answered one by one
where a single product of their shared keys answers the group.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lowbit.interchange.hf.running import device_of

_CACHES = ("cache", "past_key_values", "cache_params")  # its name in transformers 5.24, before, and in Mamba before
_GROUPED = "lowbit-grouped"


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
                _allocate(self.cache, self.capacity)
        logits = out if isinstance(out, Tensor) else out.logits
        return logits[:, -1]


def _allocate(cache: Any, capacity: int) -> None:
    """Put layers with allocated memory where plain growing ones are; others (sliding, recurrent) stay as they are."""
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None) or []
    for i, layer in enumerate(layers):
        if type(layer) is DynamicLayer and layer.is_initialized and layer.keys.ndim == 4:
            layers[i] = _AllocatedLayer(layer.keys, layer.values, capacity)


class _AllocatedLayer(DynamicLayer):
    """Keys and values [rows, heads, tokens, width] as views of memory for `capacity` tokens, taken once."""

    def __init__(self, keys: Tensor, values: Tensor, capacity: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._all = [t.new_empty(*t.shape[:2], max(capacity, t.shape[2]), t.shape[3]) for t in (keys, values)]
        self.keys, self.values = keys[:, :, :0], values[:, :, :0]
        self.update(keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        for memory, new in zip(self._all, (key_states, value_states)):
            memory[:, :, start:end] = new
        self.keys, self.values = (memory[:, :, :end] for memory in self._all)
        return self.keys, self.values


@contextmanager
def grouped_attention(model: nn.Module) -> Iterator[None]:
    """Within, a model on a CPU that attends by PyTorch's fused attention answers grouped queries together."""
    config: Any = getattr(model, "config", None)
    able = hasattr(model, "set_attn_implementation") and getattr(config, "_attn_implementation", "") == "sdpa"
    if not able or next(model.parameters()).device.type != "cpu":
        yield
        return
    AttentionInterface.register(_GROUPED, _grouped)
    AttentionMaskInterface.register(_GROUPED, sdpa_mask)
    model.set_attn_implementation(_GROUPED)  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")  # type: ignore[operator]


def _grouped(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention; one unmasked query [rows, heads, 1, width] becomes [rows, kv heads, group, width].

    The queries of a group see the same keys, and without a mask their order means nothing. PyTorch's own kernel
    reads the keys once per query: 5 to 7 times slower at groups of 3.
    """
    rows, heads, length, width = query.shape
    shared = key.shape[1]
    plain = attention_mask is None and options.get("position_bias") is None and not options.get("dropout")
    if length != 1 or shared == heads or not plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    grouped = query.reshape(rows, shared, heads // shared, width)
    out = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, scale=options.get("scaling"))
    return out.reshape(rows, 1, heads, value.shape[-1]), None
