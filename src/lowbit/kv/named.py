"""Published methods for the KV cache by name, as ordinary cache formats; each has a file in `methods/`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from lowbit.discovery import modules_of
from lowbit.errors import RecipeError


@dataclass(frozen=True)
class Published:
    """A method: texts of keys and values with {bits}, the bits that it has, those it usually has, and bits with texts of their own."""

    name: str
    usual: int
    bits: range
    keys: str
    values: str
    others: Mapping[int, tuple[str, str]] = field(default_factory=dict)

    def sides(self, bits: int) -> tuple[str, str]:
        """Texts of keys and of values. RecipeError for bits that the method does not have."""
        if bits not in self.bits:
            raise RecipeError(f"{self.name} has {self.bits[0]} to {self.bits[-1]} bits, not {bits}")
        return self.others.get(bits) or (self.keys.format(bits=bits), self.values.format(bits=bits))


def published() -> dict[str, Published]:
    """Every method by name, in alphabetical order."""
    return {module.METHOD.name: module.METHOD for module in modules_of("lowbit.kv.methods")}


def about(name: str) -> str:
    """What a method does, its formula and its source: the text of its file."""
    module = next(module for module in modules_of("lowbit.kv.methods") if module.METHOD.name == name)
    return inspect.getdoc(module) or ""


def named(text: str) -> tuple[str, str] | None:
    """Texts of keys and of values of a method with its number of bits (`kivi2`; its usual number when left out); None for other texts."""
    match = re.fullmatch(r"([a-z]+)([0-9]?)", text.strip().lower())
    method = None if match is None else published().get(match[1])
    if match is None or method is None:
        return None
    return method.sides(int(match[2]) if match[2] else method.usual)
