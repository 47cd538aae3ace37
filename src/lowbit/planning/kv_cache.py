"""KV cache: what a config says that it takes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil
from typing import Any

from lowbit.errors import SourceError
from lowbit.interchange.hf.text_config import text_config
from lowbit.kv import CacheFormat
from lowbit.kv.cache_format import Which
from lowbit.planning.states import First, state_numbers

_SLIDING = ("sliding_attention", "chunked_attention")
_STATES = ("linear_attention", "mamba", "recurrent", "conv", "hybrid")
_KEEPS_NO_TOKENS = (*_STATES[:-1], "mlp", "moe")  # a hybrid layer has both
_ATTENTION = {"past_key_values", "cache"}  # arguments of a forward by which keys and values come back
_DECODER_LAYERS, _DECODER_HEADS = ("num_decoder_layers", "decoder_layers"), ("decoder_attention_heads",)
_CACHES = {*_ATTENTION, "cache_params", "state"}


@dataclass(frozen=True)
class CacheLayer:
    """What one layer of attention keeps of a token: `heads` vectors of `keys` numbers, and as many of `values`.

    number: of the layer in the model, as `k:GLOB=` names it. Of multi-head latent attention keys are the latent vector, and values its rotary
    part. window: the most tokens that are kept, None for all. cross: of tokens that an encoder read, instead of those that are written;
    length: how many these are where every input has as many, as of a sound.
    """

    number: int
    heads: int
    keys: int
    values: int
    window: int | None = None
    cross: bool = False
    length: int | None = None

    @property
    def sides(self) -> tuple[tuple[Which, int], ...]:
        """("k" or "v", channels of a head)."""
        return ("k", self.keys), ("v", self.values)


@dataclass(frozen=True)
class KVCache:
    """What a model keeps between tokens, and its bytes.

    layers: those of attention, at `itemsize` bytes a number or, with a `format`, as that stores them. state: bytes whatever the length of the
    text, of recurrent layers; no format changes them.
    """

    layers: tuple[CacheLayer, ...] = ()
    state: int = 0
    itemsize: int = 2
    format: CacheFormat | None = None

    def stored(self, format: CacheFormat | None) -> KVCache:
        """The same cache in this format; None for numbers as they are."""
        return replace(self, format=format)

    @property
    def full(self) -> int:
        """Bytes per token that is written, of layers that keep every one."""
        return ceil(sum(self._each(layer) for layer in self.layers if not layer.cross and layer.window is None))

    @property
    def windowed(self) -> tuple[tuple[int, int], ...]:
        """(window, bytes per token) of each kind of sliding layer."""
        found = dict[int, Fraction]()
        for layer in self.layers:
            if layer.window is not None:
                found[layer.window] = found.get(layer.window, Fraction(0)) + self._each(layer)
        return tuple((window, ceil(each)) for window, each in found.items())

    @property
    def read(self) -> int:
        """Bytes per token of the text that the encoder of an encoder-decoder reads."""
        return ceil(sum(self._each(layer) for layer in self.layers if layer.cross and layer.length is None))

    @property
    def fixed(self) -> int:
        """Bytes whatever the length: recurrent state, and what a decoder keeps of a sound of fixed length."""
        return self.state + sum(self._bytes(x, x.length) for x in self.layers if x.length is not None)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one more token takes while no window is full, on average; of an encoder-decoder, one more that is written."""
        return ceil(sum(self._each(layer) for layer in self.layers if not layer.cross))

    def bytes_at(self, context: int) -> int:
        """Bytes of one sequence of `context` tokens, exact; an encoder-decoder reads as many and writes as many.

        With a format: all tokens as they are stored, and beside them those that are kept exactly, with 16 bits a number.
        """
        return self.state + sum(self._bytes(layer, _tokens(layer, context)) for layer in self.layers)

    def _bytes(self, layer: CacheLayer, tokens: int) -> int:
        if self.format is None:
            return self.itemsize * tokens * layer.heads * (layer.keys + layer.values)
        total = 0
        for which, width in layer.sides:
            side = self.format.side(layer.number, which)
            total += side.nbytes(tokens, width) + 2 * side.exact_tokens(tokens) * width if width else 0
        return layer.heads * total

    def _each(self, layer: CacheLayer) -> Fraction:
        """Bytes of one more token, averaged over the tokens that share scales."""
        if self.format is None:
            return Fraction(self._bytes(layer, 1))
        total = Fraction(0)
        for which, width in layer.sides:
            side = self.format.side(layer.number, which)
            some = 8 * side.group  # as many as fill whole bytes
            total += Fraction(side.nbytes(2 * some, width) - side.nbytes(some, width), some) if width else 0
        return layer.heads * total


def _tokens(layer: CacheLayer, context: int) -> int:
    if layer.length is not None:
        return layer.length
    return context if layer.window is None else min(context, layer.window)


def kv_cache(config: Any, itemsize: int = 2) -> KVCache:
    """The cache of the decoder that `config` describes, `itemsize` bytes a number (2: fp16 or bf16).

    Grouped-query, multi-query and multi-head latent attention (DeepSeek's compressed cache), sliding windows, and layers that share keys and
    values are told apart by the config's own fields. A model without attention keeps a state of fixed size, a hybrid both, an encoder-decoder
    also keys and values of what its encoder read. Models that write nothing keep nothing. None for `config`: zero.
    """
    if config is None or not (kept := _kept(config)):
        return KVCache(itemsize=itemsize)
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
        return KVCache(state=layers * state_numbers(first) * itemsize, itemsize=itemsize)
    heads, keys, values = _per_token(text, first, _first(config, _DECODER_HEADS) if both else 0)
    window = first("sliding_window", "attention_chunk_size") or None
    shared = first("num_kv_shared_layers")  # the last layers read what earlier ones keep
    own = kinds[: len(kinds) - shared] if shared else kinds
    if kinds:
        stops = {i: window if kind in _SLIDING else None for i, kind in enumerate(own) if kind not in _KEEPS_NO_TOKENS}
    else:
        stops = dict.fromkeys(range(layers), window if getattr(text, "use_sliding_window", True) else None)
    found = [CacheLayer(i, heads, keys, values, stop) for i, stop in stops.items() if heads]
    if both and heads:
        length = first("max_source_positions") if "input_ids" not in kept else 0
        found += [CacheLayer(i, heads, keys, values, cross=True, length=length or None) for i in range(layers)]
    return KVCache(tuple(found), states * state_numbers(first) * itemsize if states else 0, itemsize)


def longest_context(config: Any) -> int | None:
    """The most tokens that a model takes, as its config has it; None where it does not say."""
    text = text_config(config, decoder=True)
    values = (
        getattr(text, n, None)
        for n in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_target_positions")
    )
    return next((v for v in values if isinstance(v, int) and v > 0), None)


def _mixed(text: Any, itemsize: int) -> KVCache:
    """Of a decoder whose layers differ in size, as in Gemma 4; layers that read keys and values of earlier ones keep none."""
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    modes = getattr(text, "kv_sharing_modes", None) or [None] * len(kinds)
    found = []
    for i, (layer, kind, mode) in enumerate(zip(text.per_layer_config, kinds, modes)):
        heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
        width = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
        window = getattr(layer, "sliding_window", None) if kind == "sliding_attention" else None
        if mode != "reuse":
            found.append(CacheLayer(i, heads, width, width, window))
    return KVCache(tuple(found), itemsize=itemsize)


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


def _per_token(text: Any, first: First, decoder_heads: int) -> tuple[int, int, int]:
    """(heads, channels of a key, channels of a value) that one layer of attention keeps of one token; 0 heads where it has none."""
    if first("kv_lora_rank"):
        return 1, first("kv_lora_rank"), first("qk_rope_head_dim")
    heads = decoder_heads or first("num_attention_heads", "n_head", "num_heads", "n_heads")
    if not heads:
        return 0, 0, 0
    width = first("head_dim", "d_kv") or first("hidden_size", "n_embd", "d_model") // heads
    kv_heads = first("num_key_value_heads", "num_kv_heads", "n_head_kv") or heads
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        kv_heads = 1
    return kv_heads, width, width
