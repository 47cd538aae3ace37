"""Zeros that are meant: whole rows, parts of rows and groups of a weight that are exactly zero stay exactly zero.

Weights of a distribution are never zero by chance as often as this asks for, so nothing changes for others. Where a format has no
level at zero, and no scale of zero, there is nothing to keep.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.formats import Format, stores

RUN = 16  # adjacent zeros that are no chance
_FEW = 4  # zeros that may be chance in a short block
_LEAST_BITS = 6  # of a scale that is rounded so that its product with a zero-point is exact


def many_zeros(x: Tensor) -> Tensor:
    """bool [n]: which blocks of `x` [n, size] have RUN exact zeros in a row, or a quarter of their elements and no few."""
    zero = x == 0
    share = zero.sum(1) >= max(_FEW, x.shape[1] // 4)
    if x.shape[1] <= RUN or not bool(zero.any()):
        return share
    windows = F.max_pool1d(-zero.to(torch.float32)[:, None], RUN, 1)[:, 0]  # -1 where all of a window is zero
    return share | (windows < 0).any(1)


def zero_runs(weight: Tensor, fmt: Format) -> Tensor | None:
    """bool [N, K]: zeros that lie in a run of RUN in their row (of a whole group, where that is less); None if there are none."""
    zero = weight == 0
    size = min(RUN, weight.shape[1], RUN if fmt.block.cols == -1 else fmt.block.cols)
    if size < 1 or int(zero.sum()) < size:
        return None
    at = F.pad(zero.to(torch.float32)[:, None], (size - 1, size - 1))
    starts = 1 - F.max_pool1d(1 - at, size, 1)  # 1 where all of a window is zero
    found = F.max_pool1d(starts, size, 1)[:, 0] > 0
    return found if bool(found.any()) else None


def exact_zeros(scale: Tensor, offset: Tensor, fmt: Format, where: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset (in level units) of blocks, with zero on a level `where` a block has zeros to keep.

    The zero-point becomes a whole number on the grid. A minimum is stored as -scale z, so the scale is rounded such
    that this product is exact in the minimum's type. Nested minima, and types that are too short for it, stay.
    """
    if fmt.offset is None or isinstance(fmt.offset.store, Format) or not bool(where.any()):
        return scale, offset
    whole = offset.round().clamp(fmt.grid.lo, fmt.grid.hi)
    if fmt.offset.kind != "min":
        return scale, torch.where(where, whole, offset)
    if not isinstance(fmt.scale, str) or fmt.scale not in stores.FLOAT_STORES:
        return scale, offset
    bits = {"fp16": 11, "bf16": 8, "fp32": 24}
    bits_left = bits[fmt.offset.store] - (fmt.grid.bits if fmt.offset.store != "fp32" else 0)
    if bits_left < _LEAST_BITS:
        return scale, offset
    mantissa, exponent = torch.frexp(scale)
    kept = min(bits_left, bits[fmt.scale])
    short = torch.ldexp((mantissa * 2.0**kept).round() * 2.0**-kept, exponent)
    return torch.where(where, short, scale), torch.where(where, whole, offset)
