"""Two tiers: what runs at every change, and what a nightly run adds (the marker `slow`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest


def mostly_nightly(*axes: Iterable[Any], every: Callable[..., bool]) -> list[Any]:
    """The product of `axes` as parameters of a test. Those for which `every(index, index, ...)` is false are slow.

    `every` is asked with the positions of the values in their axes, so that a thin cut can still touch each value of each.
    """
    listed = [list(axis) for axis in axes]
    chosen = []
    for at in product(*(range(len(axis)) for axis in listed)):
        values = [axis[i] for axis, i in zip(listed, at)]
        chosen.append(pytest.param(*values, marks=() if every(*at) else pytest.mark.slow))
    return chosen
