"""search: candidate scales, each refitted by least squares; the best everyday fit that needs no data."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.formats import Format
from lowbit.formats.nearest import inverse
from lowbit.solvers.fits.minmax import affine
from lowbit.solvers.fitting import as_stored, rounded_scale, total
from lowbit.solvers.in_core import CoreFit
from lowbit.solvers.registry import fit


def _factors(steps: int, span: float) -> list[float]:
    return torch.linspace(1 - span, 1 + span / 3, steps).tolist()


def _in_core(fmt: Format, *, steps: int, span: float, emphasis: float) -> CoreFit | None:
    if emphasis not in (0, 1):
        return None
    return CoreFit("search", fmt.grid.reach, tuple(_factors(steps, span)), emphasis)


# Without statistics errors are weighed by the weights themselves, with an emphasis; with them it has no part.
@fit(weighs=True, ignores=lambda fmt, stats: ("emphasis",) if stats else (), in_core=_in_core)
def search(
    x: Tensor,
    fmt: Format,
    importance: Tensor | None = None,
    *,
    steps: int = 16,
    span: float = 0.35,
    emphasis: float = 1.0,
) -> object:
    """Try many scales for a block and keep the one with the least error, where errors on important weights count more.

    Without an offset: s0 = x_max / L, where x_max is the element of largest magnitude with its sign and L the
    level of largest magnitude (-8 for int4), so that the whole axis is used. For each candidate s near s0 and
    near -s0 (where a negative scale can be stored): q = round(x / s), then the scale that is best for these
    levels, s* = sum(v x q) / sum(v q^2), and its error sum(v x^2) - 2 s* sum(v x q) + s*^2 sum(v q^2). The least
    error wins, and is refined by two more rounds of rounding and refitting. With an offset the refit is the
    2 x 2 weighted least squares for scale and minimum. v is the importance; without one it is |x|^emphasis,
    as errors on large weights cost a model more than their share of the squares (`emphasis=0`: plain squares).

    Error under v: never above that of the range-based fit, which is among the candidates, but for the rounding of
    a scale to fp16 (a few percent of the error of 8 bits, nothing to speak of below). Source: the search of
    llama.cpp's `make_qx_quants` as summed up in AutoRound's optimized RTN; Frantar et al. 2022 for weighting by
    E[x^2].
    """
    if importance is None and emphasis:
        importance = x.abs() if emphasis == 1 else x.abs().pow(emphasis)
    factors = _factors(steps, span)
    if fmt.offset is None:
        return _symmetric(x, fmt, importance, factors)
    return _affine(x, fmt, torch.ones_like(x) if importance is None else importance, factors)


def _symmetric(x: Tensor, fmt: Format, v: Tensor | None, factors: list[float]) -> Tensor:
    grid = fmt.grid
    at = x.abs().argmax(1, keepdim=True)
    peak = x.gather(1, at)[:, 0]
    levels = grid.levels[grid.levels.isfinite()].sort().values
    two_signs = fmt.scale_signed and grid.signed and not torch.equal(levels, -levels.flip(0))
    by_range = peak.abs() / grid.reach
    start = peak / grid.extreme if two_signs else by_range
    vxx = total(x * x if v is None else v * x * x)
    refit = fmt.scale != "e8m0"  # between powers of two there is nothing to refit to
    candidates = [by_range, *(start * factor for factor in (1.0, *factors))]
    if two_signs:
        candidates += [start * -factor for factor in factors[::2]]

    def fitted(s: Tensor) -> tuple[Tensor, Tensor]:
        q = grid.round(x * inverse(s)[:, None])
        vq = q if v is None else v * q
        xq, qq = total(vq * x), total(vq * q)
        best = rounded_scale(torch.where(qq > 0, xq / qq, s), fmt) if refit else s
        if not fmt.scale_signed:
            best = best.clamp_min(0)
        return vxx - 2 * best * xq + best.square() * qq, best

    error, scale = torch.full_like(peak, torch.inf), start
    for candidate in candidates:
        e, s = fitted(rounded_scale(candidate, fmt))
        error, scale = torch.where(e < error, e, error), torch.where(e < error, s, scale)
    for _ in range(2 if refit else 0):
        e, s = fitted(scale)
        error, scale = torch.where(e < error, e, error), torch.where(e < error, s, scale)
    return scale


def _affine(x: Tensor, fmt: Format, v: Tensor, factors: list[float]) -> tuple[Tensor, Tensor]:
    grid, integer = fmt.grid, fmt.offset_kind == "zero"
    low, high = x.amin(1), x.amax(1)
    s_v, s_vx = total(v), total(v * x)

    def fitted(s: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Round under (s, z), refit both (or the scale alone when z must be an integer), and measure."""
        q = grid.round(x * inverse(s)[:, None] + z[:, None])
        if integer:
            d = q - z[:, None]
            xd, dd = total(v * x * d), total(v * d * d)
            s = torch.where(dd > 0, (xd / dd).clamp_min(0), s)
        else:
            s_q, s_qq, s_xq = total(v * q), total(v * q * q), total(v * x * q)
            det = s_v * s_qq - s_q * s_q
            slope = (s_v * s_xq - s_q * s_vx) / det
            minimum = (s_vx - slope * s_q) / s_v
            good = (det > 1e-12 * s_v * s_qq) & (slope > 0)
            s, z = torch.where(good, slope, s), torch.where(good, -minimum / slope, z)
        s, z = as_stored(s, z, fmt)
        level = grid.round(x * inverse(s)[:, None] + z[:, None])
        return total((level - z[:, None]).mul_(s[:, None]).sub_(x).square_() * v), s, z

    scale, offset = as_stored(*affine(low, high, fmt), fmt)
    level = grid.round(x * inverse(scale)[:, None] + offset[:, None])
    error = total((level - offset[:, None]).mul_(scale[:, None]).sub_(x).square_() * v)
    starts: list[float] = [1.0, *factors, 0.0, 0.0]  # 0: refine what is best so far
    for factor in starts:
        s, z = as_stored(*affine(low * factor, high * factor, fmt), fmt) if factor else (scale, offset)
        e, s, z = fitted(s, z)
        better = e < error
        error, scale, offset = (
            torch.where(better, e, error),
            torch.where(better, s, scale),
            torch.where(better, z, offset),
        )
    return scale, offset
