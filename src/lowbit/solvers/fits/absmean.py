"""absmean: the scale of ternary and binary weights, the mean magnitude."""

from __future__ import annotations

import math

from torch import Tensor

from lowbit.formats import Format
from lowbit.solvers.fits.norm import normal_scale
from lowbit.solvers.fitting import total
from lowbit.solvers.registry import fit


@fit(offset="never")
def absmean(x: Tensor, fmt: Format, importance: Tensor | None = None) -> Tensor:
    """Take the mean magnitude of a block as its scale, so that weights below half of it become zero in ternary.

    s = mean|x|; of grids with levels beyond -1 to 1, s = mean|x| sqrt(pi / 2) u, where u is the scale of least error for N(0, 1), whose
    mean magnitude is sqrt(2 / pi).
    Error: everything beyond the levels is clipped, which suits ternary and binary grids, whose levels are -1, 0 and 1; for binary ones no
    scale has a smaller squared error. Made for training with these weights (`lowbit.prepare_qat`).
    Source: BitNet b1.58 (Ma et al. 2024, arXiv 2402.17764), equations 1 to 3; XNOR-Net (Rastegari et al. 2016), equation 6.
    """
    levels = fmt.grid
    factor = 1.0 if max(levels.hi, -levels.lo) <= 1 else math.sqrt(math.pi / 2) * normal_scale(levels)
    return total(x.abs()) / max(1, x.shape[1]) * factor
