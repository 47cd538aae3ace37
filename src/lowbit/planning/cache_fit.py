"""Whether a cache format does something for a model, and what of the model's cache it leaves as it is."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator

from lowbit.errors import RecipeError
from lowbit.kv import CacheFormat
from lowbit.planning.kv_cache import KVCache
from lowbit.recipes.cache_rules import AutoCache, RecipeCache
from lowbit.transforms.hadamard import has_hadamard


def fitted_cache(kv: KVCache, cache: RecipeCache | None, label: str) -> KVCache:
    """The cache of a model in the format that a recipe asks for; as it is where that is chosen later, or nothing is said.

    RecipeError where the model has nothing to store in it, for globs that name no layer, and for heads that cannot be rotated.
    """
    if cache is None:
        return kv
    if not kv.layers:
        keeps = "keeps a state of one size and no keys and values" if kv.state else "keeps no KV cache"
        raise RecipeError(f"{label} {keeps}, so kv= has nothing to store; leave it out")
    if isinstance(cache, AutoCache):
        return kv
    numbers = list(dict.fromkeys(layer.number for layer in kv.layers))
    for glob, which, side in cache.layers:
        if not any(fnmatch.fnmatchcase(str(number), glob) for number in numbers):
            raise RecipeError(
                f"{which}:{glob}={side} names no layer of {label} that keeps keys and values; theirs are {_ranges(numbers)}"
            )
    for layer in kv.layers:
        for which, width in layer.sides:
            side = cache.side(layer.number, which)
            if side.rotate and width and not has_hadamard(width):
                raise RecipeError(
                    f"{which}={side}: heads of {width} channels in {label} cannot be rotated, as no Hadamard matrix of that order is "
                    "known here; leave rotate out"
                )
    return kv.stored(cache)


def cache_notes(kv: KVCache, cache: RecipeCache | None) -> tuple[str, ...]:
    """What a person should know of this cache in this format, a sentence each."""
    return () if cache is None else tuple(_notes(kv, cache))


def _notes(kv: KVCache, cache: RecipeCache) -> Iterator[str]:
    if isinstance(cache, AutoCache):
        yield (
            f"kv={cache}: when the weights are written, the cache is checked and the fewest bits are taken that lose at most {cache.kl:g} nats a "
            "token; that takes minutes. Until then it is counted with 16 bits a number"
        )
        return
    if kv.state:
        yield "the states of recurrent layers stay as they are; the cache format is for layers of attention"
    if any(layer.keys != layer.values for layer in kv.layers):
        yield "this model keeps a latent vector in place of keys, which k= is about, and its rotary part, which v= is about"
    if any(layer.cross for layer in kv.layers):
        yield "the format is for keys and values of what is written and of what the encoder read"
    if isinstance(cache, CacheFormat) and cache.calibrated:
        yield "this cache format has tables that are found on calibration text"


def _ranges(numbers: list[int]) -> str:
    """0 to 31, or the numbers themselves where some are left out."""
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
    return ", ".join(map(str, numbers[:40])) + (", ..." if len(numbers) > 40 else "")
