"""The words of a schema: a rule says what a value may be, and whether one is that."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from lowbit.errors import SourceError

_SHOWN = 60  # characters of a wrong value
REMEDY = "correct it or download it again"


@dataclass(frozen=True)
class Rule:
    """`says` completes the sentence "it is ..."; `holds` is asked of a value as JSON gives it."""

    says: str
    holds: Callable[[Any], bool]

    def __or__(self, other: Rule) -> Rule:
        return Rule(f"{self.says} or {other.says}", lambda v: self.holds(v) or other.holds(v))


def whole(low: int, high: int) -> Rule:
    """A whole number from `low` to `high`; true and false are none."""
    return Rule(f"a whole number from {low} to {high}", lambda v: type(v) is int and low <= v <= high)


def number(low: float, high: float, above: bool = False) -> Rule:
    """A finite number from `low`, or with `above` greater than it, to `high`."""

    def holds(v: Any) -> bool:
        return is_number(v) and (low < v if above else low <= v) and v <= high

    least, most = (str(n) if type(n) is int else f"{n:g}" for n in (low, high))
    return Rule(f"a number {'above' if above else 'from'} {least} {'and up ' * above}to {most}", holds)


def one_of(*values: str) -> Rule:
    """One of these texts."""
    return Rule(f"one of {', '.join(values)}", lambda v: isinstance(v, str) and v in values)


def list_of(rule: Rule, least: int = 0, most: int = 1 << 20) -> Rule:
    """A list of values that `rule` takes."""
    size = (
        "" if (least, most) == (0, 1 << 20) else f" of {least} to {most} entries" if least != most else f" of {least}"
    )
    return Rule(
        f"a list{size}, each entry {rule.says}",
        lambda v: isinstance(v, list) and least <= len(v) <= most and all(rule.holds(x) for x in v),
    )


def map_of(rule: Rule) -> Rule:
    """An object whose every value `rule` takes."""
    return Rule(
        f"an object, each value {rule.says}", lambda v: isinstance(v, dict) and all(rule.holds(x) for x in v.values())
    )


NULL = Rule("null", lambda v: v is None)
FLAG = Rule("true or false", lambda v: isinstance(v, bool))
TEXT = Rule("a text", lambda v: isinstance(v, str))
OBJECT = Rule("an object", lambda v: isinstance(v, Mapping))
LIST = Rule("a list", lambda v: isinstance(v, list))


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, neither true nor false."""
    return type(value) in (int, float) and (type(value) is int or math.isfinite(value))


def check(table: Mapping[str, Rule], values: Mapping[str, Any], where: str, path: str = "") -> None:
    """SourceError for the first field of `values` that its rule in `table` does not take. Absent fields pass."""
    for name, rule in table.items():
        if name in values and not rule.holds(values[name]):
            refuse(where, f"{path}{name}", values[name], rule.says)


def need(fields: Collection[str], values: Mapping[str, Any], where: str, path: str, why: str) -> None:
    """SourceError for the first of `fields` that is absent or null."""
    for name in fields:
        if values.get(name) is None:
            raise SourceError(f"{where}: {path}{name} is missing, which {why} needs; {REMEDY}")


def refuse(where: str, path: str, value: Any, allowed: str) -> NoReturn:
    """SourceError that names the file, the field, its value and what is allowed."""
    raise SourceError(f"{where}: {path} is {shown(value)}, and it must be {allowed}; {REMEDY}")


def shown(value: Any) -> str:
    """A value of a file in a few characters on one line."""
    if isinstance(value, str):
        text = repr(value[: 2 * _SHOWN])
    elif isinstance(value, (list, tuple, Mapping)):
        text = f"{'an object' if isinstance(value, Mapping) else 'a list'} of {len(value)}"
    elif isinstance(value, bool) or value is None:
        text = {True: "true", False: "false", None: "null"}[value]
    elif type(value) is int and value.bit_length() > 200:
        text = f"a number of {value.bit_length()} bits"
    else:
        text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
