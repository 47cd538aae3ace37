"""Multiple-choice knapsack: one option of each item, the least total value within a capacity.

    min  sum_i value[i][c_i]   subject to   sum_i size[i][c_i] <= capacity

Solved exactly by dynamic programming over the states (size, value) that no other state beats in both
(Nemhauser and Ullmann 1969), with states dropped that a Lagrangian bound (Sinha and Zoltners 1979) shows cannot
lead to anything better than a choice that is known already. No size is rounded to a unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
_MOST_STATES = 1 << 15  # beyond this states are thinned out, and the answer says by how much it may miss


@dataclass(frozen=True)
class Choice:
    """One option of each item. No choice within the capacity has a value below `bound`; exact where `value == bound`."""

    picks: tuple[int, ...]
    value: float
    size: float
    bound: float

    @property
    def gap(self) -> float:
        """By how much the value may exceed the least possible one."""
        return self.value - self.bound


def choose(
    values: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]], capacity: float,
    most_states: int = _MOST_STATES,
) -> Choice | None:  # fmt: skip
    """The choice of the least value whose size is within `capacity`, or None when even the smallest is not.

    `values[i][c]`, `sizes[i][c]`: option c of item i, finite; bytes as whole numbers are exact up to 2^53.
    """
    items = [_undominated(np.asarray(v, np.float64), np.asarray(s, np.float64)) for v, s in zip(values, sizes)]
    smallest = np.array([s[0] for _, s, _ in items])
    if smallest.sum() > capacity:
        return None
    picks, multipliers, bound = _relaxed(items, capacity)
    picks = _filled(items, picks, capacity)
    known = sum(float(v[c]) for (v, _, _), c in zip(items, picks))
    better, exact = _search(items, capacity, multipliers, known, most_states)
    picks = better if better is not None else picks
    value = float(sum(v[c] for (v, _, _), c in zip(items, picks)))
    size = float(sum(s[c] for (_, s, _), c in zip(items, picks)))
    chosen = tuple(int(keep[c]) for (_, _, keep), c in zip(items, picks))
    return Choice(chosen, value, size, value if exact else min(bound, value))


def _undominated(value: Array, size: Array) -> tuple[Array, Array, Any]:
    """Options in rising size and falling value, and their original places."""
    order = np.lexsort((value, size))
    least = np.minimum.accumulate(value[order])
    keep = order[np.r_[True, value[order][1:] < least[:-1]]]
    return value[keep], size[keep], keep


Items = list[tuple[Array, Array, Any]]


def _relaxed(items: Items, capacity: float) -> tuple[list[int], list[float], float]:
    """Lagrange: for a price of size, each item takes its least value + price * size by itself.

    Returns the picks at the lowest price that keeps within the capacity, the prices to bound with, and the greatest
    lower bound, sum_i min_c (value + price * size) - price * capacity.
    """

    def at(price: float) -> tuple[list[int], float, float]:
        picks = [int(np.argmin(v + price * s)) for v, s, _ in items]
        size = sum(float(s[c]) for (_, s, _), c in zip(items, picks))
        value = sum(float(v[c]) for (v, _, _), c in zip(items, picks))
        return picks, size, value + price * (size - capacity)

    picks, size, bound = at(0.0)
    if size <= capacity:
        return picks, [0.0], bound
    steepest = max((float(((v[:-1] - v[1:]) / (s[1:] - s[:-1])).max()) for v, s, _ in items if len(v) > 1), default=0.0)
    low, high = 0.0, 2 * steepest + 1e-300
    picks, prices = [0] * len(items), [low, high]
    for _ in range(80):
        middle = (low + high) / 2
        found, size, lower = at(middle)
        bound = max(bound, lower)
        if size <= capacity:
            high, picks = middle, found
        else:
            low = middle
    prices = [low, high, high * 0.7, high * 1.4]
    return picks, prices, bound


def _filled(items: Items, picks: list[int], capacity: float) -> list[int]:
    """What is left of the capacity goes to the options that lower the value most, one after another."""
    picks = list(picks)
    while True:
        left = capacity - sum(float(s[c]) for (_, s, _), c in zip(items, picks))
        best, where = 0.0, None
        for i, (v, s, _) in enumerate(items):
            fits = int(np.searchsorted(s, s[picks[i]] + left, side="right")) - 1  # the largest has the least value
            if fits > picks[i] and v[picks[i]] - v[fits] > best:
                best, where = float(v[picks[i]] - v[fits]), (i, fits)
        if where is None:
            return picks
        picks[where[0]] = where[1]


def _search(
    items: Items, capacity: float, prices: list[float], known: float, most_states: int
) -> tuple[list[int] | None, bool]:
    """Picks of a value below `known` or None, and whether nothing was thinned out on the way."""
    after = np.zeros((len(prices), len(items) + 1))  # least value + price * size of the items from i on
    least_after = np.zeros(len(items) + 1)  # least size of the items from i on
    for i in reversed(range(len(items))):
        v, s, _ = items[i]
        after[:, i] = after[:, i + 1] + [float((v + p * s).min()) for p in prices]
        least_after[i] = least_after[i + 1] + float(s[0])
    size, value, exact = np.zeros(1), np.zeros(1), True
    steps: list[tuple[Any, Any]] = []
    slack = 1e-12 * (abs(known) + float(np.abs(after).max()))
    for i, (v, s, _) in enumerate(items):
        new_size, new_value = (size[:, None] + s).ravel(), (value[:, None] + v).ravel()
        origin, pick = np.divmod(np.arange(new_size.size), len(v))
        keep = new_size + least_after[i + 1] <= capacity
        for price, value_after in zip(prices, after[:, i + 1]):
            keep &= new_value + value_after - price * (capacity - new_size) <= known + slack
        order = np.flatnonzero(keep)
        order = order[np.lexsort((new_value[order], new_size[order]))]
        falling = new_value[order] < np.r_[np.inf, np.minimum.accumulate(new_value[order])[:-1]]
        order = order[falling]
        if not order.size:
            return None, exact
        if order.size > most_states:
            order, exact = order[np.linspace(0, order.size - 1, most_states).astype(np.int64)], False
        size, value = new_size[order], new_value[order]
        steps.append((origin[order], pick[order]))
    at = int(np.argmin(value))
    if value[at] >= known:
        return None, exact
    picks = []
    for origins, options in reversed(steps):
        picks.append(int(options[at]))
        at = int(origins[at])
    return picks[::-1], exact
