"""Formats that are chosen when a model is opened, not stored with its weights: those of activations and of the KV cache.

Each is a small value with a text form, made at the front door (`--cache int8`, `Engine.open(cache="int8")`) and handed down as it is to
where the kernels' arguments are made of it. What the engine does not compute is refused there, with what it does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowbit.engine.arguments import one_of
from lowbit.errors import RecipeError

ACTIVATIONS = ("exact", "int8")
CACHES = ("int16", "int8")
_SIDES = {"": "kv", "kv": "kv", "k": "k", "v": "v"}  # what a rule of a cache format's text is about


@dataclass(frozen=True)
class ActivationFormat:
    """How activations are rounded before a weight whose recipe says nothing about its inputs.

    name: "exact", 15 bits, which is as good as no rounding; or "int8". RecipeError for any other.
    """

    name: str = "exact"

    def __post_init__(self) -> None:
        one_of("activations", self.name, ACTIVATIONS)

    @staticmethod
    def of(given: str | ActivationFormat) -> ActivationFormat:
        """The format of this text."""
        return given if isinstance(given, ActivationFormat) else ActivationFormat(given)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class CacheFormat:
    """How the KV cache stores keys and values, with a float32 scale for each position and head.

    As text one format for both, "int8" or "kv=int8", or one for each, "k=int8,v=int8". RecipeError for what the engine does not
    compute: formats other than `CACHES`, and keys and values in different ones.
    """

    keys: str = "int16"
    values: str = "int16"

    def __post_init__(self) -> None:
        for name in (self.keys, self.values):
            one_of("cache", name, CACHES)
        if self.keys != self.values:
            raise RecipeError(f"cache={str(self)!r}; the engine stores keys and values in one format, such as kv=int8")

    @staticmethod
    def of(given: str | CacheFormat) -> CacheFormat:
        """The format of this text."""
        if isinstance(given, CacheFormat):
            return given
        rules = [rule.rpartition("=")[::2] for rule in str(given).split(",")]
        if sorted("".join(_SIDES.get(key, "?") for key, _ in rules)) != ["k", "v"]:
            raise RecipeError(
                f"cache={given!r}; name one format for keys and values (int8), or one for each (k=int8,v=int8)"
            )
        found = {side: name for key, name in rules for side in _SIDES[key]}
        return CacheFormat(found["k"], found["v"])

    def __str__(self) -> str:
        return self.keys if self.keys == self.values else f"k={self.keys},v={self.values}"

    def core_arguments(self) -> dict[str, Any]:
        """What `lowbit._core.KVCache` takes to store this."""
        return {"format": self.keys}
