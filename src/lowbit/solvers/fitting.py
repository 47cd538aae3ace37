"""Run a fit over all blocks of a weight, and make constant blocks exact."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.formats import Format, stores
from lowbit.formats.blocks import reduce_blocks
from lowbit.solvers import in_core
from lowbit.solvers.registry import Call
from lowbit.solvers.zeros import exact_zeros, many_zeros

_CHUNK = 4096


def fit_blocks(
    weight: Tensor, fmt: Format, fit: Call, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scale and offset of every block: float32 [batch, row blocks, column blocks] each, offset None if not used.

    `weight` of any shape, `importance` of the same shape or broadcastable to it.
    A block of one repeated value c gets a scale and an offset that give c back exactly (as far as the
    stored types can hold c), whatever the fit; in one with many exact zeros these are exact (`zeros.py`).
    """
    check_sides(weight, fmt)
    return run_fit(weight, fmt, fit, importance)


def check_sides(weight: Tensor, fmt: Format) -> None:
    """FormatError where a format without an offset has no levels on a side of zero that needs some."""
    if fmt.offset is None and not fmt.grid.signed and bool((weight < 0).any()):
        raise FormatError(f"{fmt} has no negative levels and no offset; add ':asym', or use a signed grid")
    if fmt.offset is None and fmt.grid.hi <= 0:
        raise FormatError(f"{fmt} has no positive level and no offset; add ':asym', or use binary or ternary")


def run_fit(weight: Tensor, fmt: Format, fit: Call, importance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """`fit_blocks` for levels that may all lie on one side of zero, as learned ones do."""
    found = fit_in_core(weight, fmt, fit, importance)
    if found is not None:
        return found
    if importance is not None:
        importance = importance.expand(weight.shape)

    def run(x: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor | None]:
        found: Any = fit(x, fmt, v)
        scale, offset = found if isinstance(found, tuple) else (found, None)
        if offset is not None:
            scale, offset = exact_zeros(scale, offset, fmt, many_zeros(x))
        low, high = x.amin(1), x.amax(1)
        return _exact_constants(low, low == high, fmt, scale, offset)

    scale, offset = reduce_blocks(run, fmt.block, weight, importance)
    return scale, offset  # type: ignore[return-value]


def fit_in_core(
    weight: Tensor, fmt: Format, fit: Call, importance: Tensor | None
) -> tuple[Tensor, Tensor | None] | None:
    """`run_fit` by the C++ core; None where there is none, or it does not know this fit or format."""
    found = in_core.fit_blocks(weight, fmt, fit.core_fit(fmt), importance)
    if found is None:
        return None
    scale, offset = found.scale, found.offset
    if offset is not None and found.zeros is not None:
        scale, offset = exact_zeros(scale, offset, fmt, found.zeros)
    if found.constant is None:
        return scale, offset
    return _exact_constants(found.constant, ~found.constant.isnan(), fmt, scale, offset)


def _exact_constants(
    low: Tensor, constant: Tensor, fmt: Format, scale: Tensor, offset: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Where (`constant`) all of a block is c, its lowest value: a level p that is a power of two and the scale c / p, which rounds nothing.

    With an offset the level is `lo + p` or, for negative c, `hi - p`, and the offset the end it is counted from.
    A minimum is c itself, with a scale so small that it does not crowd its neighbours in a nested format.
    Zero blocks get the scale 0. Where no such level exists (negative c on an axis of positive levels), or a
    nested scale would round c / p anyway, the fit's own answer stays.
    """
    if not bool(constant.any()):
        return scale, offset
    if fmt.offset is not None:
        p = 2.0 ** math.floor(math.log2(max(fmt.grid.hi - fmt.grid.lo, 1)))
        exact = (low.abs() / p).clamp_min(0)
        end = torch.where(low < 0, fmt.grid.hi, fmt.grid.lo)
        if fmt.offset.kind == "min":
            lowest = torch.where(low == 0, 0.0, low.abs() * 2.0**-12)
            at = -low.sign() * 2.0**12
            if fmt.spans_zero:  # no positive minimum: the constant is a level's
                lowest, at = torch.where(low > 0, exact, lowest), at.clamp_min(0)
            return torch.where(constant, lowest, scale), torch.where(constant, at, offset)
        return torch.where(constant, exact, scale), torch.where(constant, end, offset)  # type: ignore[arg-type]
    if isinstance(fmt.scale, Format):
        return torch.where(constant & (low == 0), 0.0, scale), offset
    levels = fmt.grid.levels
    powers = levels[(levels != 0) & (torch.frexp(levels.abs()).mantissa == 0.5)]
    up, down = powers[powers > 0], powers[powers < 0]
    signed = fmt.scale_signed
    for_positive = float(up.max()) if len(up) else (float(down.min()) if signed and len(down) else math.nan)
    for_negative = float(down.min()) if len(down) else (float(up.max()) if signed and len(up) else math.nan)
    exact = torch.where(low < 0, low / for_negative, low / for_positive)
    return torch.where(constant & exact.isfinite(), exact, scale), offset


def total(x: Tensor) -> Tensor:
    """Sum along each row of [n, size]. Long rows are summed in chunks of a fixed size, so that the result does not
    depend on how many threads share the work."""
    if x.shape[1] <= _CHUNK:
        return x.sum(1)
    whole = x.shape[1] // _CHUNK * _CHUNK
    sums = total(x[:, :whole].reshape(-1, _CHUNK).sum(1).view(x.shape[0], -1))
    return sums + x[:, whole:].sum(1) if whole < x.shape[1] else sums


def rounded_scale(scale: Tensor, fmt: Format) -> Tensor:
    """The scale as it would be read back where storing changes it by more than a search step: e8m0 and e4m3.

    The other stores round by 2^-9 of the value or less, and a nested scale depends on its neighbours.
    """
    return stores.rounded(scale, fmt.scale) if fmt.scale in ("e8m0", "e4m3") else scale  # type: ignore[arg-type]


def as_stored(scale: Tensor, offset: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Scale and offset (in level units) as they would be read back, as far as they are not nested.

    Beside a block far from zero an offset of many levels stands, and the rounding of either moves it by
    a level or more: a fit has to see it.
    """
    if isinstance(fmt.scale, str):
        scale = stores.rounded(scale, fmt.scale)
    if fmt.offset is None:
        return scale, offset
    if isinstance(fmt.offset.store, Format):
        return scale, offset.clamp_min(0) if fmt.spans_zero else offset
    if fmt.offset.store == "grid":
        return scale, offset.round().clamp(fmt.grid.lo, fmt.grid.hi)
    if fmt.offset.kind == "min":
        kept = -stores.rounded(-scale * offset, fmt.offset.store) / scale
        return scale, torch.where(kept.isfinite(), kept, offset)
    return scale, stores.rounded(offset, fmt.offset.store)
