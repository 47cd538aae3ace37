"""What happens to single values and is easily taken for a mistake, in a sentence each, and only where it happens."""

from __future__ import annotations

import itertools

from torch import Tensor

from lowbit.formats import Format, IntGrid
from lowbit.report.wording import number_text as num
from lowbit.solvers import Call

_NEAR = 5e-5  # a distance from the middle that a table with four decimals does not show


def remarks(
    x: Tensor, scaled: Tensor, codes: Tensor, learned: Tensor | None, fmt: Format, fit: Call, scale: float | None
) -> tuple[str, ...]:
    """Of the shown values [n] of one block: ties, clipping, a negative scale, levels that nothing uses."""
    found = [] if learned is not None else [*_ties(scaled, codes, fmt), *_clipped(x, scaled, fmt)]
    if scale is not None and scale < 0:
        found.append(
            f"The scale is negative: the value of largest magnitude takes the level {num(fmt.grid.extreme)}, the farthest from 0, "
            "so that positive levels stand for negative values and the other way round."
        )
    if scale == 0:
        found.append("The scale is 0: every value of this block is 0 and comes back as 0.")
    return (*found, *_unused(fmt, fit))


def _ties(scaled: Tensor, codes: Tensor, fmt: Format) -> list[str]:
    """Values in the middle between two levels, and those that only look so in four decimals."""
    levels = sorted({float(v) for v in fmt.grid.levels.tolist() if v == v})
    found = fmt.grid.decode(codes).tolist()
    middles = [(a + b) / 2 for a, b in itertools.pairwise(levels)]
    if isinstance(fmt.grid, IntGrid):
        middles = [levels[0] - 0.5, *middles, levels[-1] + 0.5]
    exact: dict[float, str] = {}
    near: dict[float, str] = {}
    for value, level in zip(scaled.tolist(), found):
        middle = min(middles, key=lambda m: abs(m - value))
        if value == middle:
            exact.setdefault(value, f"{num(value, 9)} goes to {num(level, 6)}")
        elif abs(value - middle) < _NEAR * max(1.0, min(1.0, abs(value))):
            near.setdefault(
                value,
                f"{num(value, 9)}, which is {'above' if value > middle else 'below'} {num(middle)}, goes to {num(level, 6)}",
            )
    said = []
    rule = "the even level" if isinstance(fmt.grid, IntGrid) else "the level with the even code"
    if exact:
        said.append(
            f"Ties: a value in the middle between two levels goes to {rule}: {'; '.join(list(exact.values())[:4])}."
        )
    if near:
        said.append(f"Nearly ties: with all its digits {'; '.join(list(near.values())[:4])}.")
    return said


def _clipped(x: Tensor, scaled: Tensor, fmt: Format) -> list[str]:
    """Values that lie beyond the highest or lowest level."""
    lo, hi = fmt.grid.lo, fmt.grid.hi
    whole = isinstance(fmt.grid, IntGrid)
    room = 0.5 if whole else 1e-5 * max(abs(lo), abs(hi))
    out = []
    for value, at in zip(x.tolist(), scaled.tolist()):
        rounded = float(round(at)) if whole else at
        if not lo <= rounded <= hi and (
            at < lo - room or at > hi + room or (whole and rounded != min(max(rounded, lo), hi))
        ):
            end, name = (hi, "highest") if at > hi else (lo, "lowest")
            out.append(f"x = {num(value)} is at {num(at)}, beyond the {name} level {num(end)}, and gets that")
    if not out:
        return []
    more = f"; {len(out) - 4} more" if len(out) > 4 else ""
    return [f"Clipped: {'; '.join(out[:4])}{more}."]


def _unused(fmt: Format, fit: Call) -> list[str]:
    grid = fmt.grid
    if not isinstance(grid, IntGrid) or not grid.signed or grid.bits == 1:
        return []
    last = -(2 ** (grid.bits - 1))
    if grid.lo > last:
        return [
            f"The code for {last} is never used: 'narrow' ends the levels at {num(grid.lo)}, as far from 0 as {num(grid.hi)}."
        ]
    if fit.name == "absmax" and fmt.offset is None:
        return [
            f"Level {last} is never used: absmax takes the largest magnitude to {num(grid.hi)}, whichever sign it has."
        ]
    return []
