"""QuantizedCache: a cache of transformers that stores keys and values in a cache format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import DynamicCache

from lowbit.errors import RecipeError
from lowbit.interchange.hf.cache_layers import has_states, layer_bytes, with_stores
from lowbit.kv.cache_format import CacheFormat
from lowbit.kv.packed_states import PackedStates
from lowbit.kv.tables import Tables, tables_for


class QuantizedCache(DynamicCache):
    """Keys and values of a model of transformers, float or quantized, as a cache format stores them.

    >>> cache = lowbit.QuantizedCache("rotate@int8", model)
    >>> model.generate(**inputs, past_key_values=cache)

    cache: a `CacheFormat` or its text. model: the model, or its config, which says which layers have a window, share
    keys and values, or have a state of another kind; such states stay as they are. tables: what `lowbit.kv.calibrate` found, for formats that need it.
    RecipeError where they are missing, and for kinds of layers that are not known here.

    What is stored is packed codes and scales; `nbytes` is what is held. Every step expands what a layer reads for that step
    alone, so memory stays small and long contexts take longer: at 4096 tokens some 2 to 5 ms of one core for the keys or the values of
    a layer with 3 heads of 64 channels, and 15 ms where they are rotated. The engine, which computes on the codes, is the fast way.

    A position is read as `lowbit.kv.round_trip` says, but for these: a side with recent tokens or with groups of tokens reads
    the chunk at hand exactly, a prompt that is given in one piece in particular. Positions count the slots of the cache:
    where prompts are padded on the left, sinks and groups hold padding too. Outlier channels without tables are chosen for each
    sequence by the first chunk. Beams, crop, assisted generation, `copy.deepcopy` and batch_repeat_interleave for a shared prefix work as with
    DynamicCache. For an encoder-decoder, `EncoderDecoderCache(QuantizedCache(...), QuantizedCache(...))` stores both kinds of
    attention, and a QuantizedCache alone stores that of the decoder to itself.
    """

    layers: list[Any]

    def __init__(
        self, cache: str | CacheFormat, model: Any, tables: Mapping[tuple[int, str], Tables] | None = None
    ) -> None:
        config = getattr(model, "config", model)
        if not hasattr(config, "get_text_config"):
            raise RecipeError(
                f"a QuantizedCache takes a model of transformers or its config, not {type(model).__name__}"
            )
        super().__init__(config=config)
        self.format = CacheFormat.of(cache)
        self.layers = [self._stored(i, layer, tables) for i, layer in enumerate(self.layers)]

    def _stored(self, number: int, layer: Any, tables: Mapping[tuple[int, str], Tables] | None) -> Any:
        """The layer that takes the place of one of DynamicCache, or that one where it has nothing to quantize."""
        sides = [(which, self.format.side(number, which)) for which in ("k", "v")]  # type: ignore[arg-type]
        if not has_states(layer) or all(side.exact for _, side in sides):
            return layer
        keys, values = (
            PackedStates(side, tables_for(tables, side, number, which), f"layers.{number}.{which}")
            for which, side in sides
        )
        found = with_stores(layer, (keys, values))
        if found is None:
            raise RecipeError(
                f"layer {number} keeps its states in a {type(layer).__name__}, which this version cannot quantize; "
                f"leave it as it is with kv:{number}=int16"
            )
        return found

    @property
    def nbytes(self) -> int:
        """Bytes held: packed keys and values, those kept exactly, and the states of layers of other kinds."""
        return sum(map(layer_bytes, self.layers))

    def __repr__(self) -> str:
        return f"QuantizedCache({str(self.format)!r}, {self.get_seq_length() if self.layers else 0} tokens, {self.nbytes:,} bytes)"
