"""Bits that a cache takes on average."""

from __future__ import annotations

from collections.abc import Mapping

from lowbit.kv import CacheFormat, CacheSide
from lowbit.kv.cache_format import Which


def side_bytes(side: CacheSide, context: int, width: int) -> int:
    """Bytes of one head at this context, what is kept exactly beside included."""
    return side.nbytes(context, width) + 2 * width * side.exact_tokens(context)


def side_bits(side: CacheSide, context: int, width: int) -> float:
    """The same in bits of a number."""
    return 8 * side_bytes(side, context, width) / (context * width)


def cache_bytes(
    fmt: CacheFormat, context: int, heads: Mapping[int, int], widths: Mapping[tuple[int, Which], int]
) -> dict[Which, tuple[int, int]]:  # fmt: skip
    """(bytes, numbers) of keys and of values over all layers. heads: kv heads by layer; widths: channels of a head by side."""
    found: dict[Which, tuple[int, int]] = {}
    for which in ("k", "v"):
        which_: Which = which  # type: ignore[assignment]
        nbytes = sum(
            n * side_bytes(fmt.side(layer, which_), context, widths[layer, which_]) for layer, n in heads.items()
        )
        found[which_] = (nbytes, sum(n * context * widths[layer, which_] for layer, n in heads.items()))
    return found
