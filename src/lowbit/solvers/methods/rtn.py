"""rtn: every weight to its nearest level."""

from __future__ import annotations

from torch import Tensor

from lowbit.formats import Format, encode
from lowbit.solvers.core_rounding import rounded_to_nearest
from lowbit.solvers.fitting import fit_blocks
from lowbit.solvers.found import Found
from lowbit.solvers.registry import Call, solver
from lowbit.solvers.stats import Stats


@solver(in_core=rounded_to_nearest)
def rtn(weight: Tensor, fmt: Format, fit: Call, stats: Stats | None = None) -> Found:
    """Round each weight on its own to the nearest level.

    code = argmin |w - s (level - z)|.
    `weight` float [..., rows, cols], finite; with statistics of its input the fit weighs column k by E[x_k^2]. Error: half
    the gap between levels times the scale, wherever the fit does not clip.
    """
    scale, offset = fit_blocks(weight, fmt, fit, None if stats is None else stats.importance)
    return Found(encode(weight, fmt, scale, offset))
