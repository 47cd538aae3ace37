"""How recipes say what becomes of the KV cache, beside the weights: `CacheFormat`, or that a check of the result chooses one.

kv=int8                       keys and values alike; k= and v= apart, kv:GLOB=, k:GLOB= and v:GLOB= for layers by number
kv=rotate@int4:g32:recent=64  the whole grammar of `kv/side.py`
kv=turboquant4                a published method by its name, see `kv/named.py`
kv=auto                       once the weights are written, `lowbit check-kv` finds the fewest bits within a limit
kv=auto(kl=0.03)              that limit: the mean KL divergence, in nats a token, against the cache that is kept as it is
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lowbit.errors import LowbitError, RecipeError, nearest
from lowbit.kv import CacheFormat
from lowbit.solvers.calls import call_parts

CACHE_KEYS = ("kv", "k", "v")
AUTO = "auto"
_KL = 0.01


@dataclass(frozen=True)
class AutoCache:
    """The cache format is chosen after quantizing: the fewest bits with a mean KL divergence of at most `kl` nats a token."""

    kl: float = _KL

    def __post_init__(self) -> None:
        if not 0 < self.kl < math.inf:
            raise RecipeError(f"kv=auto: kl={self.kl:g} is no limit above 0; try kl={_KL:g}")

    def __str__(self) -> str:
        return AUTO if self.kl == _KL else f"{AUTO}(kl={self.kl!r})"


RecipeCache = CacheFormat | AutoCache


def is_cache_key(key: str) -> bool:
    """Whether a setting with this key is about the cache."""
    return key.partition(":")[0] in CACHE_KEYS


def parse_cache(settings: Sequence[str]) -> RecipeCache:
    """What settings such as `kv=int8` or `k:0=int8` say together. RecipeError or FormatError with what to write instead."""
    for setting in settings:
        key, _, value = setting.partition("=")
        name = value.partition("(")[0]
        if name == AUTO:
            if len(settings) > 1 or key != "kv":
                raise RecipeError(
                    f"{setting} chooses keys and values of every layer; write kv={value} and nothing else of the cache"
                )
            return _auto(value)
        try:
            CacheFormat.of(f"kv={value}")
        except LowbitError:
            hint = nearest(name, (AUTO,))
            if hint:
                raise RecipeError(f"{setting!r} names no format of keys and values{hint}") from None
            raise
    return CacheFormat.of(",".join(settings))


def cache_settings(cache: RecipeCache | None) -> list[str]:
    """The settings that say it, which `parse_cache` reads back; none for None."""
    if cache is None:
        return []
    if isinstance(cache, AutoCache):
        return [f"kv={cache}"]
    both = [f"kv={cache.keys}"] if cache.keys == cache.values else [f"k={cache.keys}", f"v={cache.values}"]
    return [*both, *(f"{which}:{glob}={side}" for glob, which, side in cache.layers)]


def _auto(value: str) -> AutoCache:
    _, options = call_parts(value)
    known = dict(options)
    if len(known) < len(options) or set(known) - {"kl"} or any(isinstance(v, str) for v in known.values()):
        raise RecipeError(f"kv={value}: the one option is the limit, a number: kv=auto(kl={_KL:g})")
    return AutoCache(**{name: float(number) for name, number in known.items()})
