"""How numbers, sizes and names are written for people."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

_BARS = "▁▂▃▄▅▆▇█"
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def bytes_text(nbytes: float) -> str:
    """'1.23 GiB', '77 MiB', '512 B': three digits in binary units."""
    value, unit = float(nbytes), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} {_UNITS[unit]}" if unit == 0 or value >= 99.95 else f"{value:.3g} {_UNITS[unit]}"


def count_text(count: float) -> str:
    """'134.5 M', '1.24 B', '4 096': parameters and other large counts."""
    if count >= 1e9:
        return f"{count / 1e9:.4g} B"
    return f"{count / 1e6:.4g} M" if count >= 1e6 else f"{count:,.0f}".replace(",", " ")


def number_text(value: float, digits: int = 6) -> str:
    """A number with `digits` significant digits, without trailing zeros; never '-0'."""
    return f"{value + 0.0:.{digits}g}"


def shape_text(shape: Sequence[int]) -> str:
    """'576 x 1536', 'scalar'."""
    return " x ".join(map(str, shape)) if len(shape) else "scalar"


def sparkline(counts: Sequence[float]) -> str:
    """One bar for each count, as high as its share of the largest; an empty place for none."""
    top = max(counts, default=0)
    if top <= 0:
        return " " * len(counts)
    return "".join(" " if c <= 0 else _BARS[min(7, int(8 * c / top))] for c in counts)


def pattern_of(name: str) -> str:
    """The name with every numbered part as '*': 'model.layers.0.mlp' is 'model.layers.*.mlp'."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def grouped(items: Iterable[T], key: Callable[[T], Any]) -> list[list[T]]:
    """Items with equal keys together, groups and items in the order in which they first come."""
    groups: dict[Any, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def span_text(names: Sequence[str]) -> str:
    """What several names have in common, with the numbers that they cover: 'layers.{0-29}.mlp'."""
    if len(names) == 1:
        return names[0]
    columns = list(zip(*(name.split(".") for name in names), strict=True))
    return ".".join(parts[0] if len(set(parts)) == 1 else _range(parts) for parts in columns)


def _range(parts: Sequence[str]) -> str:
    if not all(re.fullmatch(r"\d+", part) for part in parts):
        return "*"
    numbers = sorted({int(part) for part in parts})
    whole = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{{{numbers[0]}-{numbers[-1]}}}" if whole else f"{{{numbers[0]}..{numbers[-1]}}}"


def fitting(headings: Sequence[str], rows: Sequence[Sequence[str]], width: int, expendable: Sequence[str]) -> list[int]:
    """The columns that stay in a table at most `width` wide; `expendable` ones go, the first named first."""
    from rich.cells import cell_len

    kept = list(range(len(headings)))
    needs = [
        max(map(cell_len, (*heading.split("\n"), *(row[i] for row in rows)))) + 2 for i, heading in enumerate(headings)
    ]
    for name in expendable:
        if sum(needs[i] for i in kept) <= width:
            break
        kept = [i for i in kept if headings[i] != name]
    return kept
