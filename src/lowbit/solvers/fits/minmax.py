"""minmax: the range of the block to the range of the grid."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.formats import Format, stores
from lowbit.solvers.in_core import CoreFit
from lowbit.solvers.registry import fit


def affine(low: Tensor, high: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Scale and offset that put `low` on the lowest level and `high` on the highest.

    s = (high - low) / (hi - lo), z = lo - low / s (unrounded; the format rounds it), the scale as it is stored.
    Where the stored offset can express no other range it is first widened to include zero.
    """
    if fmt.spans_zero:
        low, high = low.clamp_max(0), high.clamp_min(0)
    scale = (high - low) / (fmt.grid.hi - fmt.grid.lo)
    scale = torch.where(scale > 0, scale, 1.0)
    if isinstance(fmt.scale, str):
        scale = stores.rounded(scale, fmt.scale)
    return scale, fmt.grid.lo - low / scale


@fit(offset="always", in_core=lambda fmt: CoreFit("minmax"))
def minmax(x: Tensor, fmt: Format, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Give the lowest value of a block the lowest level and the highest value the highest.

    s = (max - min) / (hi - lo), z = lo - min / s.
    Error: at most s/2 with an unrounded zero-point or a minimum; with a rounded zero-point the whole block
    shifts by up to s/2, so the end of the range can clip and the error reach s. Zero is exact with a rounded
    zero-point only. Sources: "Naive Quantization Methods for
    LLMs" (tutorial; rounded zero-point), Jacob et al. 2018, section 2.1 (the same, on the grid).

    LLMEasyQuant (Liu et al. 2024) prints three variants of this. Its 3.5.4 (SimQuant) is this fit for each
    channel with an unrounded zero-point, but for ties, which it rounds up and this rounds to even. Its 3.1.2
    (ZeroQuant) is not usable as printed: with z = 0 and the floor, half of the values leave [-128, 127] and
    are clamped; the paper that it names keeps zero exact with a rounded zero-point, as `:asym` does here.
    """
    return affine(x.amin(1), x.amax(1), fmt)
