"""KV cache: what a config says that it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lowbit.interchange.hf.text_config import text_config


@dataclass(frozen=True)
class KVCache:
    """Bytes per token over all layers that grow with the context, and of the layers that stop at a window.

    `full`: bytes per token of layers that keep every token. `windowed`: (window, bytes per token) of each kind of
    sliding layer. `fixed`: bytes of recurrent state, whatever the length. All at `itemsize` bytes a number.
    """

    full: int
    windowed: tuple[tuple[int, int], ...] = ()
    fixed: int = 0
    itemsize: int = 2

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one more token takes while no window is full."""
        return self.full + sum(per_token for _, per_token in self.windowed)

    def bytes_at(self, context: int) -> int:
        """Bytes of one sequence of `context` tokens."""
        return self.fixed + context * self.full + sum(min(context, w) * per_token for w, per_token in self.windowed)


def kv_cache(config: Any, itemsize: int = 2) -> KVCache:
    """The cache of the decoder that `config` describes, `itemsize` bytes a number (2: fp16 or bf16).

    Grouped-query, multi-query and multi-head latent attention (DeepSeek's compressed cache) and sliding windows
    are told apart by the config's own fields. A model without attention keeps a state of fixed size, an encoder
    nothing. None for `config`: zero. Of an encoder-decoder this is the decoder's self-attention.
    """
    if config is None:
        return KVCache(0)
    text = text_config(config, decoder=True)

    if getattr(text, "is_heterogeneous", False):
        return _mixed(text, itemsize)

    def first(*names: str) -> int:
        return next((v for n in names if isinstance(v := getattr(text, n, None), int) and not isinstance(v, bool)), 0)

    decoder = {k: getattr(config, k, None) for k in ("num_decoder_layers", "decoder_layers", "decoder_attention_heads")}
    layers = (
        decoder["num_decoder_layers"]
        or decoder["decoder_layers"]
        or first("num_hidden_layers", "n_layer", "num_layers")
    )
    heads = decoder["decoder_attention_heads"] or first("num_attention_heads", "n_head", "num_heads")
    if not layers or any("MaskedLM" in name for name in config.architectures or ()):
        return KVCache(0)
    if first("state_size"):
        return KVCache(0, fixed=layers * _state(first) * itemsize, itemsize=itemsize)
    if not heads:
        return KVCache(0)
    if first("kv_lora_rank"):
        per_layer = (first("kv_lora_rank") + first("qk_rope_head_dim")) * itemsize
    else:
        width = first("head_dim", "d_kv") or first("hidden_size", "n_embd", "d_model") // heads
        kv_heads = first("num_key_value_heads", "num_kv_heads", "n_head_kv") or heads
        if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
            kv_heads = 1
        per_layer = 2 * kv_heads * width * itemsize
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * layers
    window = first("sliding_window", "attention_chunk_size")
    sliding = sum(kind in ("sliding_attention", "chunked_attention") for kind in kinds) if window else 0
    full = sum(kind in ("full_attention", "attention") for kind in kinds)
    if window and getattr(text, "layer_types", None) is None and getattr(text, "use_sliding_window", True):
        sliding, full = full, 0
    return KVCache(full * per_layer, ((window, sliding * per_layer),) if sliding else (), itemsize=itemsize)


def _mixed(text: Any, itemsize: int) -> KVCache:
    """Of a decoder whose layers differ in size, as in Gemma 4; layers that read keys and values of earlier ones keep none."""
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    modes = getattr(text, "kv_sharing_modes", None) or [None] * len(kinds)
    full, windowed = 0, dict[int, int]()
    for layer, kind, mode in zip(text.per_layer_config, kinds, modes):
        heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
        width = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
        window = getattr(layer, "sliding_window", None) if kind == "sliding_attention" else None
        size = 0 if mode == "reuse" else 2 * heads * width * itemsize
        if window is None:
            full += size
        else:
            windowed[window] = windowed.get(window, 0) + size
    return KVCache(full, tuple(windowed.items()), itemsize=itemsize)


def _state(first: Callable[..., int]) -> int:
    """Numbers that one layer of Mamba keeps: the state of each channel, and the last inputs of its convolution.

    Mamba 2 also convolves B and C of each group. Sources: Gu and Dao 2023; Dao and Gu 2024.
    """
    inner = first("intermediate_size") or first("expand") * first("hidden_size")
    convolved = inner + 2 * first("n_groups") * first("state_size")
    return inner * first("state_size") + convolved * first("conv_kernel")
