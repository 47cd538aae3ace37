"""The formulas of fits with the numbers of one block put in.

A fit with a closed formula has an entry here; any other is described by the first line of its docstring,
so that a new fit is explained without a change in this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lowbit.formats import Format
from lowbit.report.wording import number_text as num
from lowbit.solvers import Call


@dataclass(frozen=True)
class Range:
    """What a fit sees of a block: lowest, highest, and largest value without its sign."""

    low: float
    high: float

    @property
    def peak(self) -> float:
        return max(abs(self.low), abs(self.high))


@dataclass(frozen=True)
class Step:
    """One line of arithmetic: `symbol = formula = numbers = value`, kept as `stored`; `note` says more, and `parts` how a
    stored value that is itself a code is read."""

    symbol: str
    formula: str
    numbers: str
    value: float | None
    stored: float | None = None
    store: str = ""
    note: str = ""
    parts: str = ""

    def __str__(self) -> str:
        """The line for people."""
        parts = [self.symbol, self.formula, self.numbers, "" if self.value is None else num(self.value, 7)]
        return " = ".join(part for part in parts if part)


def _absmax(r: Range, fmt: Format) -> tuple[str, str]:
    return "max|x| / highest level", f"{num(r.peak)} / {num(fmt.grid.hi)}"


def _symmetric(r: Range, fmt: Format) -> tuple[str, str]:
    lo, hi = fmt.grid.lo, fmt.grid.hi
    return "2 max|x| / (highest - lowest level)", f"2 * {num(r.peak)} / ({num(hi)} - {_signed(lo)})"


def _mx(r: Range, fmt: Format) -> tuple[str, str]:
    up, top = math.frexp(r.peak)[1] - 1, math.frexp(fmt.grid.hi)[1] - 1
    formula = "2^(floor(log2 max|x|) - floor(log2 highest level))"
    return (formula, f"2^(floor(log2 {num(r.peak)}) - floor(log2 {num(fmt.grid.hi)})) = 2^({up} - {_signed(top)})")


def _minmax(r: Range, fmt: Format) -> tuple[str, str]:
    lo, hi = fmt.grid.lo, fmt.grid.hi
    numbers = f"({num(r.high)} - {_signed(r.low)}) / ({num(hi)} - {_signed(lo)})"
    return "(max - min) / (highest - lowest level)", numbers


_SCALES: dict[str, Callable[[Range, Format], tuple[str, str]]] = {
    "absmax": _absmax,
    "symmetric": _symmetric,
    "mx": _mx,
    "minmax": _minmax,
}


def steps(r: Range, fmt: Format, fit: Call, scale: float | None, offset: float | None) -> list[Step]:
    """The steps from the range `r` of a block to its scale and offset, as the fit returned them."""
    if scale is None:
        return []
    constant = r.low == r.high
    exact = f"every value is {num(r.low)}: the scale is chosen to give it back exactly"
    widened = fmt.spans_zero and not r.low <= 0 <= r.high
    if widened and not constant:
        r = Range(min(r.low, 0.0), max(r.high, 0.0))
    closed = _SCALES.get(fit.name) if not constant else None
    if closed is not None:
        note = "the range is widened to include zero" if widened else ""
        found = [Step("s", *closed(r, fmt), scale, note=note)]
    else:
        found = [Step("s", "", "", scale, note=exact if constant else f"found by {fit}")]
    if offset is None:
        return found
    if fmt.offset_kind == "min":
        searched = "" if closed else "found together with the scale"
        found.append(Step("m", "min" if closed else "", "", -scale * offset + 0.0, note=searched))
    elif closed is not None:
        numbers = f"{num(fmt.grid.lo)} - {_signed(r.low)} / {num(scale, 7)}"
        found.append(Step("z", "lowest level - min / s", numbers, offset))
    else:
        found.append(Step("z", "", "", offset, note="" if constant else "found together with the scale"))
    return found


def rounding(fmt: Format) -> str:
    """What happens to one value, as a formula."""
    if fmt.scale is None:
        return "level = the learned level nearest to x"
    scaled = {"min": "(x - m) / s", None: "x / s"}.get(fmt.offset_kind, "x / s + z")
    return f"level = {scaled} rounded to the nearest level"


def reading(fmt: Format) -> str:
    """How a level becomes a value again."""
    if fmt.scale is None:
        return "x' = level"
    return {"min": "x' = s * level + m", None: "x' = s * level"}.get(fmt.offset_kind, "x' = s * (level - z)")


def scaled_heading(fmt: Format) -> str:
    """The column of values before rounding."""
    if fmt.scale is None:
        return "x"
    return {"min": "(x - m) / s", None: "x / s"}.get(fmt.offset_kind, "x / s + z")


def _signed(value: float) -> str:
    """A number behind a minus: negative ones in parentheses."""
    return f"({num(value)})" if value < 0 else num(value)
