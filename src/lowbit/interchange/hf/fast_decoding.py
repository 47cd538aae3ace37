"""Two costs of transformers' decoding that a CPU feels most, avoided without a change in what is computed.

The cache is grown by copying all of it for every token, and grouped queries are answered one by one where a single product of
their shared keys answers the group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicLayer

_GROUPED = "lowbit-grouped"


def allocate(cache: Any, capacity: int) -> None:
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
    AttentionMaskInterface.register(_GROUPED, AttentionMaskInterface()["sdpa"])
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
        plainly: tuple[Tensor, None] = AttentionInterface()["sdpa"](
            module, query, key, value, attention_mask, **options
        )
        return plainly
    grouped = query.reshape(rows, shared, heads // shared, width)
    out = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, scale=options.get("scaling"))
    return out.reshape(rows, 1, heads, value.shape[-1]), None
