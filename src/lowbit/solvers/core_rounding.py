"""Round-to-nearest of a whole weight by the C++ core: its fit, its codes and its error in one go."""

from __future__ import annotations

import math

from torch import Tensor

from lowbit.errors import FormatError
from lowbit.formats import Format
from lowbit.solvers.fitting import check_sides, fit_in_core
from lowbit.solvers.found import Found
from lowbit.solvers.in_core import encoded
from lowbit.solvers.registry import Call
from lowbit.solvers.stats import Stats


def rounded_to_nearest(weight: Tensor, fmt: Format, fit: Call, stats: Stats | None = None) -> Found | None:
    """Round-to-nearest in one go, for a weight of any float type; None where the core does not take it. What cannot be done, for a
    value that is not finite or a scale that no type holds, is left for the Python to say."""
    try:
        check_sides(weight, fmt)
        blocks = fit_in_core(weight, fmt, fit, None if stats is None else stats.importance)
        found = None if blocks is None else encoded(weight, fmt, *blocks)
    except FormatError:
        return None
    if found is None or not math.isfinite(found[1]):
        return None
    return Found(found[0], squares=found[1:])
