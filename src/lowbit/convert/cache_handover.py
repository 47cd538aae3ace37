"""What another program can hold of the KV cache format that a folder carries: nothing that is written into a file, but an option to ask for."""

from __future__ import annotations

from fractions import Fraction

from lowbit.errors import RecipeError
from lowbit.interchange.exporters.common.cache_types import CacheTypes
from lowbit.interchange.exporters.exporter import Exporter
from lowbit.interchange.readers.lowbit_folder import LowbitFolder
from lowbit.kv import CacheFormat
from lowbit.kv.cache_format import Which
from lowbit.kv.folder import read_cache_format
from lowbit.planning.kv_cache import KVCache, kv_cache
from lowbit.recipes.cache_rules import AutoCache, RecipeCache, cache_settings

_MANY = 4096  # tokens over which bits a number are counted


def handover(kind: Exporter, folder: LowbitFolder) -> list[str]:
    """Sentences about the folder's cache format for the program that reads the export; none where the folder says nothing of it."""
    cache = read_cache_format(folder.folder)
    if cache is None or cache.exact:
        return []
    return [nearest_words(kind, cache, kv_cache(folder.config))]


def nearest_words(kind: Exporter, cache: CacheFormat, kv: KVCache) -> str:
    """The option that comes closest to a cache format, with its bits; or that nothing is known."""
    said = ",".join(cache_settings(cache))
    here = f"{said} is lowbit's own and is not in the export"
    if kind.caches is None or not kv.layers:
        return f"{here}; keys and values are stored as {kind.reader} stores them"
    asked = nearest_options(kind.caches, cache, kv)
    bits = " and ".join(f"{side_bits(cache, kv, which):.2f}" for which in ("k", "v"))
    return f"{here}; the closest that {kind.caches.program} has is {asked} (keys and values have {bits} bits a number here). {kind.caches.note}"


def nearest_options(types: CacheTypes, cache: CacheFormat, kv: KVCache) -> str:
    """`-ctk q8_0 -ctv q8_0 -fa on`: the options by which a program stores a cache in at least about as many bits, and the bits of its types."""
    keys, values = (types.nearest(code_bits(cache, kv, which)) for which in ("k", "v"))
    both = max(keys, values, key=lambda each: each.bits)
    options = types.options.format(k=keys.name, v=values.name, kv=both.name)
    used = [keys, values] if "{k}" in types.options else [both]
    bits = " and ".join(dict.fromkeys(f"{each.bits:g}" for each in used))
    return f"`{options}`, with {bits} bits a number"


def side_bits(cache: CacheFormat, kv: KVCache, which: Which) -> float:
    """Bits of a number of the keys or of the values over all layers, scales included."""
    stored = numbers = Fraction(0)
    for layer in kv.layers:
        width = dict(layer.sides)[which]
        stored += 8 * layer.heads * cache.side(layer.number, which).nbytes(_MANY, width) if width else 0
        numbers += layer.heads * _MANY * width
    return float(stored / numbers) if numbers else 0.0


def code_bits(cache: CacheFormat, kv: KVCache, which: Which) -> float:
    """The same without scales, the mean over layers."""
    sides = [cache.side(layer.number, which) for layer in kv.layers if dict(layer.sides)[which]]
    return sum(16 if side.format is None else side.format.grid.bits for side in sides) / max(1, len(sides))


def check_cache(kind: Exporter, cache: RecipeCache | None) -> None:
    """RecipeError for a cache that is found only for a folder of lowbit's own, with which an export would do nothing."""
    open_ = isinstance(cache, AutoCache) or (cache is not None and cache.calibrated)
    if open_:
        raise RecipeError(
            f"{','.join(cache_settings(cache))} is found for a folder of lowbit's own and would be ignored by {kind.reader}; quantize without --as "
            f"first, and then `lowbit export FOLDER --as {kind.name}` says what comes closest"
        )
