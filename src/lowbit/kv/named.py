"""Published methods for the KV cache, as ordinary cache formats."""

from __future__ import annotations

import re

# Text of keys and of values; {b} is the number of bits.
_NAMED = {
    "simquant": (8, "uint{b}:64x1:zero=fp16", "uint{b}:64x1:zero=fp16"),
    "kivi": (2, "uint{b}:32x1:min=fp16:recent=32", "uint{b}:g32:min=fp16:recent=32"),
    "kvquant": (3, "kmeans{b}:*x1:cb=tensor:sinks=1", "kmeans{b}:cb=tensor:sinks=1"),
    "turboquant": (4, "rotate+norm@normal{b}", "rotate+norm@normal{b}"),
}


def named(text: str) -> tuple[str, str] | None:
    """Texts of keys and of values of a method with its number of bits (`kivi2`; its usual number when left out); None for other texts."""
    match = re.fullmatch(r"([a-z]+?)([1-8]?)", text.strip().lower())
    if match is None or match[1] not in _NAMED:
        return None
    bits, keys, values = _NAMED[match[1]]
    return keys.format(b=match[2] or bits), values.format(b=match[2] or bits)
