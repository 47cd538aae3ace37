"""percentile: ignore the outermost values."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import RecipeError
from lowbit.formats import Format
from lowbit.solvers.fits.minmax import affine
from lowbit.solvers.registry import fit


@fit()
def percentile(x: Tensor, fmt: Format, importance: Tensor | None = None, *, p: float = 99.9) -> object:
    """Cut off the few largest values of a block, so that all others have finer levels.

    The range is the p-th percentile of |x|, or with an offset what lies between tails of (100 - p) / 2 percent.
    The percentile is an element of the block (nearest rank, rounded up), so that small blocks keep their
    maximum. Error: s/2 inside the range, unbounded outside. Source: Wu et al. 2020, "Integer Quantization for
    Deep Learning Inference", section 3.3.
    """
    if not 0 < p <= 100:
        raise RecipeError(f"percentile(p={p}) is outside 0 < p <= 100")
    n = x.shape[1]

    def rank(values: Tensor, share: float) -> Tensor:
        k = min(n, max(1, int(-(-share * n // 1))))
        return values.kthvalue(k, dim=1).values

    if fmt.offset is None:
        peak = rank(x.abs(), p / 100)
        return torch.where(peak > 0, peak, x.abs().amax(1)) / fmt.grid.reach
    tail = (100 - p) / 200
    return affine(-rank(-x, 1 - tail), rank(x, 1 - tail), fmt)
