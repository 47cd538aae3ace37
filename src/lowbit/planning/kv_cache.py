"""KV cache: what a config says that it takes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowbit.errors import SourceError
from lowbit.interchange.hf.text_config import text_config
from lowbit.planning.states import First, state_numbers

_SLIDING = ("sliding_attention", "chunked_attention")
_STATES = ("linear_attention", "mamba", "recurrent", "conv", "hybrid")
_NOTHING = ("mlp", "moe")
_ATTENTION = {"past_key_values", "cache"}  # arguments of a forward by which keys and values come back
_DECODER_LAYERS, _DECODER_HEADS = ("num_decoder_layers", "decoder_layers"), ("decoder_attention_heads",)
_CACHES = {*_ATTENTION, "cache_params", "state"}


@dataclass(frozen=True)
class KVCache:
    """Bytes per token over all layers that grow with the context, and of the layers that stop at a window.

    `full`: bytes per token of layers that keep every token. `windowed`: (window, bytes per token) of each kind of
    sliding layer. `fixed`: bytes whatever the length: recurrent state, or what a decoder keeps of a sound of fixed length. `read`: bytes
    per token of the text that the encoder of an encoder-decoder reads. All at `itemsize` bytes a number.
    """

    full: int
    windowed: tuple[tuple[int, int], ...] = ()
    fixed: int = 0
    itemsize: int = 2
    read: int = 0

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one more token takes while no window is full; of an encoder-decoder, one more that is written."""
        return self.full + sum(per_token for _, per_token in self.windowed)

    def bytes_at(self, context: int) -> int:
        """Bytes of one sequence of `context` tokens; an encoder-decoder reads as many and writes as many."""
        windows = sum(min(context, w) * per_token for w, per_token in self.windowed)
        return self.fixed + context * (self.full + self.read) + windows


def kv_cache(config: Any, itemsize: int = 2) -> KVCache:
    """The cache of the decoder that `config` describes, `itemsize` bytes a number (2: fp16 or bf16).

    Grouped-query, multi-query and multi-head latent attention (DeepSeek's compressed cache), sliding windows, and layers that share keys and
    values are told apart by the config's own fields. A model without attention keeps a state of fixed size, a hybrid both, an encoder-decoder
    also keys and values of what its encoder read. Models that write nothing keep nothing. None for `config`: zero.
    """
    if config is None or not (kept := _kept(config)):
        return KVCache(0)
    text = text_config(config, decoder=True)

    if getattr(text, "is_heterogeneous", False):
        return _mixed(text, itemsize)

    both = bool(getattr(config, "is_encoder_decoder", False))

    def first(*names: str) -> int:
        return _first(text, names)

    layers = (_first(config, _DECODER_LAYERS) if both else 0) or first("num_hidden_layers", "n_layer", "num_layers")
    kinds = list(getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or [])[:layers]
    states = sum(kind in _STATES for kind in kinds)
    if not kept & _ATTENTION or (not kinds and first("state_size")):
        return KVCache(0, fixed=layers * state_numbers(first) * itemsize, itemsize=itemsize)
    heads = _first(config, _DECODER_HEADS) if both else 0
    per_layer = _per_layer(text, first, heads) * itemsize
    window = first("sliding_window", "attention_chunk_size")
    shared = first("num_kv_shared_layers")  # the last layers read what earlier ones keep
    own = kinds[: len(kinds) - shared] if shared else kinds
    sliding = sum(kind in _SLIDING for kind in own) if window else 0
    full = sum(kind not in (*_STATES[:-1], *_NOTHING) for kind in own) - sliding
    if not kinds:
        slides = window and getattr(text, "use_sliding_window", True)
        sliding, full = (layers, 0) if slides else (0, layers)
    fixed = states * state_numbers(first) * itemsize if states else 0
    read = layers * per_layer if both else 0
    length = first("max_source_positions") if both and "input_ids" not in kept else 0
    windowed = ((window, sliding * per_layer),) if sliding and per_layer else ()
    return KVCache(full * per_layer, windowed, fixed + read * length, itemsize, 0 if length else read)


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


def _kept(config: Any) -> frozenset[str]:
    """Names by which the class of a config takes what it keeps between tokens, and its input; empty where it writes nothing."""
    from lowbit.interchange.hf.models import model_class

    try:
        kind = model_class(config)
    except SourceError:
        return frozenset()
    if not kind.can_generate() or any("MaskedLM" in name for name in config.architectures or ()):
        return frozenset()
    takes = inspect.signature(kind.forward).parameters
    known = _CACHES & set(takes)
    encodes = getattr(config, "is_encoder", False) is True  # of families whose one class encodes or writes
    return frozenset({*known, kind.main_input_name}) if known and not encodes else frozenset()


def _first(config: Any, names: Sequence[str]) -> int:
    """The first of these fields that is a whole number above 0; 0 where none is."""
    found = (getattr(config, name, None) for name in names)
    return next((v for v in found if isinstance(v, int) and not isinstance(v, bool) and v > 0), 0)


def _per_layer(text: Any, first: First, decoder_heads: int) -> int:
    """Numbers that one layer of attention keeps of one token."""
    if first("kv_lora_rank"):
        return first("kv_lora_rank") + first("qk_rope_head_dim")
    heads = decoder_heads or first("num_attention_heads", "n_head", "num_heads", "n_heads")
    if not heads:
        return 0
    width = first("head_dim", "d_kv") or first("hidden_size", "n_embd", "d_model") // heads
    kv_heads = first("num_key_value_heads", "num_kv_heads", "n_head_kv") or heads
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        kv_heads = 1
    return 2 * kv_heads * width
