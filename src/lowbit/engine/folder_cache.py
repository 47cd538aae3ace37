"""The cache format of a folder at work in transformers: `model.generate` of what was loaded stores its cache in it.

Where `generate` would make a DynamicCache for itself, it makes a `QuantizedCache` of the folder's format. A cache that the user gives
(`past_key_values`), a `cache_implementation`, and `use_cache=False` count before it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lowbit.interchange.files.settings import is_ours
from lowbit.kv import CacheFormat
from lowbit.kv.folder import Sizes, read_cache_format
from lowbit.kv.side import EXACT
from lowbit.kv.tables import TablesOfLayers
from lowbit.planning.kv_cache import KVCache

_MAKES = "_prepare_cache_for_generation"  # the method of a model by which `generate` makes its cache
_NAMES = ("cache", "past_key_values")  # of arguments in which it puts it


class CacheMaker:
    """Stands in the place of the method by which `model.generate` makes its cache.

    An attribute of the model, not a class, so that its class, names and files stay as they are.
    """

    def __init__(self, model: nn.Module, cache: CacheFormat, tables: TablesOfLayers) -> None:
        self._model, self.cache, self.tables = model, cache, tables

    def __call__(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **options: Any) -> Any:
        given = {name: model_kwargs.get(name) for name in _NAMES}
        own = getattr(type(self._model), _MAKES)
        found = own(self._model, generation_config, model_kwargs, *args, **options)
        chosen = generation_config.cache_implementation is not None or getattr(generation_config, "is_assistant", False)
        for name in _NAMES:
            made = model_kwargs.get(name)
            if made is not None and given[name] is None and not chosen:
                model_kwargs[name] = self._stored(made)
        return found

    def _stored(self, made: Any) -> Any:
        """What takes the place of the cache that transformers made; the same where that is of its own kind."""
        from transformers import DynamicCache, EncoderDecoderCache

        if type(made) is DynamicCache:
            return self.new()
        if type(made) is EncoderDecoderCache and type(made.self_attention_cache) is DynamicCache:
            return EncoderDecoderCache(self.new(), self.new())
        return made

    def new(self) -> Any:
        """An empty cache of the format."""
        from lowbit.kv.quantized_cache import QuantizedCache

        return QuantizedCache(self.cache, self._model, self.tables or None)


def use_cache_format(model: Any, cache: CacheFormat | None, tables: TablesOfLayers | None = None) -> None:
    """Let `model.generate` of transformers store its cache in this format; None lets it do as its class does."""
    vars(model).pop(_MAKES, None)
    if cache is not None and not cache.exact and hasattr(type(model), _MAKES):
        setattr(model, _MAKES, CacheMaker(model, cache, tables or {}))


def cache_format_of(model: Any) -> CacheFormat | None:
    """The format that a loaded model stores its cache in, None where nothing says any."""
    made = vars(model).get(_MAKES)
    return made.cache if isinstance(made, CacheMaker) else None


def cache_tables_of(model: Any) -> TablesOfLayers:
    """The tables of the format of a loaded model; empty where there are none."""
    made = vars(model).get(_MAKES)
    return made.tables if isinstance(made, CacheMaker) else {}


def sizes_of(kv: KVCache) -> Sizes:
    """Heads and channels of each layer that keeps keys and values of what is written."""
    return {layer.number: (layer.heads, layer.keys, layer.values) for layer in kv.layers if not layer.cross}


def wanted(model: Any, cache: Any = None) -> Any:
    """The cache format that a model is opened with: the one that is given, else the one that its folder carries, else int16.

    model: as `Engine.open` takes it. SourceError where the folder says what is no format.
    """
    if cache is not None:
        return cache
    if isinstance(model, nn.Module):
        found = cache_format_of(model)
    else:
        own = isinstance(model, (str, Path)) and is_ours(model)
        found = read_cache_format(model) if own else None
    return EXACT if found is None else str(found)
