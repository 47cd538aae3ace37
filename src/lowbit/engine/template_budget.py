"""How much a chat template may do: steps and characters are counted, so that nothing it asks for is begun first."""

from __future__ import annotations

import copy
from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from time import perf_counter
from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2.utils import Namespace

WORK = 50_000_000  # units: a character that is made is one, a step some; about a second
SECONDS = 4.0  # for machines that are slower than that
STEP = 20
LOOK_INSIDE = 60  # units for each value in a list that is read
DEPTH = 100  # of values in values, and of macros in macros
LONGEST_NUMBER = 1 << 16  # bits
WIDEST = 10_000  # of one field that a format pads

_LOOK = 1_000_000  # units between two looks at the clock
_ESCAPED = 12  # characters that one of a text takes at most, where the text stands in a list
_LISTS = (list, tuple, KeysView, ValuesView, ItemsView)
_LIST_ITERATOR: type[Iterator[Any]] = type(iter([0]))


class TooMuch(Exception):
    """A template asks for more work, memory or depth than any chat needs."""


class Budget:
    """What one rendering has left."""

    def __init__(self, work: int = WORK, seconds: float = SECONDS) -> None:
        self.left, self.depth = work, 0
        self._look, self._end = work - _LOOK, perf_counter() + seconds

    def spend(self, units: int) -> None:
        """Take so many units and those of a step. TooMuch when there are not so many left."""
        self.left -= units + STEP
        if self.left < self._look:
            self._look = self.left - _LOOK
            if self.left < 0 or perf_counter() > self._end:
                raise TooMuch("it asks for too much work")

    def weigh(self, value: Any) -> int:
        """Units that reading all of `value` takes, and no less than the characters of its text.

        A list that stands twice in another counts twice, as comparing and printing read it twice.
        """
        if type(value) is str:
            return len(value)
        total, open_lists = 0, [iter((value,))]
        while open_lists:
            for item in open_lists[-1]:
                total += LOOK_INSIDE
                if isinstance(item, str):
                    total += len(item) * (1 if len(open_lists) == 1 else _ESCAPED)
                elif isinstance(item, int):
                    total += item.bit_length()
                else:
                    total += STEP * len(item) if isinstance(item, range) else 0
                if total > self.left:
                    raise TooMuch("it asks for too much work")
                inside = _inside(item)
                if inside is not None:
                    if len(open_lists) > DEPTH:
                        raise TooMuch("it nests values too deeply")
                    open_lists.append(inside)
                    break
            else:
                open_lists.pop()
        return total

    def check_numbers(self, *values: Any) -> None:
        """TooMuch for an integer on which arithmetic would take long."""
        for value in values:
            if isinstance(value, int):
                self.check_bits(value.bit_length())

    def check_bits(self, bits: int) -> None:
        """TooMuch for a number of so many bits."""
        if bits > LONGEST_NUMBER:
            raise TooMuch("it computes with numbers of too many digits")


def _inside(value: Any) -> Iterator[Any] | None:
    """The values in a value, which are left where they are; None for one that has none."""
    if isinstance(value, Mapping):
        return iter([*value.keys(), *value.values()])
    if isinstance(value, _LISTS):
        return iter(value)
    if isinstance(value, _LIST_ITERATOR):
        found: Iterator[Any] = copy.copy(value)  # the iterator itself stays where it is
        return found
    if isinstance(value, Namespace):
        return iter(object.__getattribute__(value, "_Namespace__attrs").values())
    if isinstance(value, (MethodType, BuiltinMethodType)):
        return iter((value.__self__,))
    return None
