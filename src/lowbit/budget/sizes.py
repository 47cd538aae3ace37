"""Sizes as people write them: `80MB`, `8 GiB`, `1.5g`."""

from __future__ import annotations

import math
import re

from lowbit.errors import RecipeError

_FEW, _MANY = 20, 1000  # below the first, gigabytes are meant, above the second, megabytes
_LEAST = 1_000_000  # a number without a unit below this is no number of bytes that anybody means


def parse_size(size: float | str) -> int:
    """Bytes from `80MB` (10^6), `8GiB` (2^30), `500 kB`, `1.5G` (as GB) or a whole number of bytes."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?)(b?)\s*", str(size).lower())
    if found is None or (found[3] and not found[2]):
        raise RecipeError(f"{size!r} is no size; write it as 80MB, 7.5GB, 8GiB, or in bytes")
    power = " kmgt".index(found[2] or " ")
    out = float(found[1]) * (1024 if found[3] else 1000) ** power
    if not math.isfinite(out) or out < 1:
        raise RecipeError(f"{size!r} is no size; it must be at least one byte")
    return int(out)


def typed_size(option: str, text: str) -> int:
    """Bytes from the text of an option of the command line, in which a small number has a unit.

    RecipeError that names the option for what is no size, and for `80`, which may be megabytes or gigabytes.
    """
    word = text.strip()
    if re.fullmatch(r"[0-9]+(?:\.[0-9]+)?", word) and float(word) < _LEAST:
        # So few gigabytes are those of a machine; of more, only megabytes are meant.
        units = (
            f"{word}GB or {word}GiB"
            if float(word) < _FEW
            else f"{word}MB or {word}GB"
            if float(word) <= _MANY
            else f"{word}MB"
        )
        raise RecipeError(f"{option} {word} has no unit; write {option} {units}")
    try:
        return parse_size(word)
    except RecipeError as error:
        raise RecipeError(f"{option}: {error}") from None


def size_text(nbytes: int) -> str:
    """At least so many bytes, in a form that `parse_size` reads: `61.3MB`, `1.37GB`, `512B`."""
    for unit, power in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= power:
            digits = max(0, 3 - len(str(nbytes // power)))
            whole = -(-nbytes * 10**digits // power)
            return f"{whole / 10**digits:.{digits}f}{unit}"
    return f"{nbytes}B"
