"""CacheFormat: how the KV cache of a model is stored, as a value: keys, values, and layers that differ.

SIDE                        keys and values alike: int8, rotate@int4:g32 (see `side.py`)
NAME                        a published method: simquant, kivi2, kvquant3, turboquant4 (see `named.py`)
kv=SIDE  k=SIDE  v=SIDE     with commas between: k=int8,v=int4:g32
k:GLOB=SIDE                 (kv:, v:) layers by number, the last match wins: k=int4:g32,k:0=int8,kv:[1-3]=int16
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, replace
from typing import Literal

from lowbit.display import Displayed
from lowbit.errors import RecipeError
from lowbit.kv.named import named
from lowbit.kv.side import CacheSide, parse_side

Which = Literal["k", "v"]
_KEYS = {"kv": ("k", "v"), "k": ("k",), "v": ("v",)}


_EXACT = CacheSide()


@dataclass(frozen=True, repr=False)
class CacheFormat(Displayed):
    """`keys` and `values` of all layers but those that `layers` names: (glob over layer numbers, "k" or "v", side), the last match wins."""

    keys: CacheSide = _EXACT
    values: CacheSide = _EXACT
    layers: tuple[tuple[str, Which, CacheSide], ...] = ()

    def _brief(self) -> str:
        return repr(str(self))

    @staticmethod
    def of(given: str | CacheFormat) -> CacheFormat:
        """The format of this text. RecipeError or FormatError for a text that is none.

        >>> from lowbit.kv import CacheFormat
        >>> str(CacheFormat.of("k=int8,v=int8")), str(CacheFormat.of("kv=int4:g32,k:0=int8").side(0, "k"))
        ('int8', 'int8')
        """
        return given if isinstance(given, CacheFormat) else _parse(str(given))

    def side(self, layer: int, which: Which) -> CacheSide:
        """How the keys (`which` "k") or values ("v") of this layer are stored."""
        chosen = self.keys if which == "k" else self.values
        for glob, side_of, side in self.layers:
            if side_of == which and fnmatch.fnmatchcase(str(layer), glob):
                chosen = side
        return chosen

    @property
    def sides(self) -> tuple[CacheSide, ...]:
        """All sides that it names."""
        return self.keys, self.values, *(side for _, _, side in self.layers)

    @property
    def exact(self) -> bool:
        """Whether nothing is rounded."""
        return all(side.exact for side in self.sides)

    @property
    def calibrated(self) -> bool:
        """Whether some of it is found on calibration text."""
        return any(side.calibrated for side in self.sides)

    def __str__(self) -> str:
        both = [str(self.keys)] if self.keys == self.values else [f"k={self.keys}", f"v={self.values}"]
        if self.layers and len(both) == 1:
            both = [f"kv={both[0]}"]
        return ",".join([*both, *(f"{which}:{glob}={side}" for glob, which, side in self.layers)])


def _parse(text: str) -> CacheFormat:
    found = CacheFormat()
    said: set[str] = set()
    for i, setting in enumerate(_split(text)):
        key, value = _key_value(setting.strip())
        word, colon, glob = key.partition(":")
        if word not in _KEYS or (colon and not glob):
            raise RecipeError(
                f"cache {text!r}: {setting.strip()!r} says nothing of keys or values; write int8, k=int8,v=int4:g32, or k:0=int8 for layer 0"
            )
        if not colon and ((i and "kv" in said) or said & set(_KEYS[word])):
            raise RecipeError(f"cache {text!r} says {word!r} twice; give one format for keys and one for values")
        sides = named(value)
        keys, values = (parse_side(value),) * 2 if sides is None else (parse_side(side) for side in sides)
        if colon:
            rules = tuple((glob, which, keys if which == "k" else values) for which in _KEYS[word])
            found = replace(found, layers=(*found.layers, *rules))  # type: ignore[arg-type]
        else:
            said |= {word, *_KEYS[word]}
            if "k" in _KEYS[word]:
                found = replace(found, keys=keys)
            if "v" in _KEYS[word]:
                found = replace(found, values=values)
    missing = {"k", "v"} - said
    if missing:
        absent = "keys" if "k" in missing else "values"
        raise RecipeError(
            f"cache {text!r} does not say how {absent} are stored; name one format for both (int8), or one for each (k=int8,v=int8)"
        )
    return found


def _key_value(setting: str) -> tuple[str, str]:
    """A setting without a key is about both."""
    key, equals, value = setting.partition("=")
    if equals and key.partition(":")[0] in _KEYS:
        return key, value
    return "kv", setting


def _split(text: str) -> list[str]:
    parts, depth, begin = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "([") - (char in ")]")
        if char == "," and depth == 0:
            parts.append(text[begin:i])
            begin = i + 1
    return [*parts, text[begin:]]
