"""Run a fit over all blocks of a weight, and make constant blocks exact."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.formats import Format, stores
from lowbit.formats.blocks import reduce_blocks
from lowbit.solvers.registry import Call


def fit_blocks(weight: Tensor, fmt: Format, fit: Call, importance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Scale and offset of every block: float32 [batch, row blocks, column blocks] each, offset None if not used.

    `weight` of any shape, `importance` of the same shape or broadcastable to it.
    A block of one repeated value c gets a scale and an offset that give c back exactly (as far as the
    stored types can hold c), whatever the fit.
    """
    if importance is not None:
        importance = importance.expand(weight.shape)

    def run(x: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor | None]:
        found: Any = fit(x, fmt, v)
        scale, offset = found if isinstance(found, tuple) else (found, None)
        return _exact_constants(x, fmt, scale, offset)

    if fmt.offset is None and not fmt.grid.signed and bool((weight < 0).any()):
        raise FormatError(f"{fmt} has no negative levels and no offset; add ':asym', or use a signed grid")
    if fmt.offset is None and not fmt.grid.hi > 0:
        raise FormatError(f"{fmt} has no positive level and no offset; add ':asym', or use binary or ternary")
    scale, offset = reduce_blocks(run, fmt.block, weight, importance)
    return scale, offset  # type: ignore[return-value]


def _exact_constants(x: Tensor, fmt: Format, scale: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Where all of a block is c: a level p that is a power of two and the scale c / p, which rounds nothing.

    With an offset the level is `lo + p` or, for negative c, `hi - p`, and the offset the end it is counted from.
    Zero blocks get the scale 0. Where no such level exists (negative c on an axis of positive levels) the
    fit's own answer stays.
    """
    low, high = x.amin(1), x.amax(1)
    constant = low == high
    if not bool(constant.any()):
        return scale, offset
    if fmt.offset is not None:
        p = 2.0 ** math.floor(math.log2(max(fmt.grid.hi - fmt.grid.lo, 1)))
        exact = (low.abs() / p).clamp_min(0)
        end = torch.where(low < 0, fmt.grid.hi, fmt.grid.lo)
        if fmt.offset.kind == "min":  # the minimum itself is c, at level zero
            lowest = torch.where(low == 0, 1.0, low.abs())
            return torch.where(constant, lowest, scale), torch.where(constant, -low / lowest, offset)
        return torch.where(constant, exact, scale), torch.where(constant, end, offset)  # type: ignore[arg-type]
    levels = fmt.grid.levels
    powers = levels[(levels != 0) & (torch.frexp(levels.abs()).mantissa == 0.5)]
    up, down = powers[powers > 0], powers[powers < 0]
    signed = fmt.scale_signed
    for_positive = float(up.max()) if len(up) else (float(down.min()) if signed and len(down) else math.nan)
    for_negative = float(down.min()) if len(down) else (float(up.max()) if signed and len(up) else math.nan)
    exact = torch.where(low < 0, low / for_negative, low / for_positive)
    return torch.where(constant & exact.isfinite(), exact, scale), offset


def rounded_scale(scale: Tensor, fmt: Format) -> Tensor:
    """The scale as it would be read back; a nested scale depends on its neighbours and is returned as it is."""
    return stores.rounded(scale, fmt.scale) if isinstance(fmt.scale, str) else scale
