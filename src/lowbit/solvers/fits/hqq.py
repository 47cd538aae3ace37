"""hqq: half-quadratic quantization, a zero-point that ignores outliers."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.formats import Format
from lowbit.solvers.fits.minmax import minmax, needs_offset
from lowbit.solvers.fitting import as_stored
from lowbit.solvers.registry import fit


@fit
def hqq(
    x: Tensor,
    fmt: Format,
    importance: Tensor | None = None,
    *,
    iterations: int = 20,
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
) -> tuple[Tensor, Tensor]:
    """Minimise |x - x_q|^p (p < 1, sparse errors) over the zero-point by half-quadratic splitting.

    From the min-max fit, repeat: e = shrink(x - x_q), shrink(r) = sign(r) max(|r| - p |r|^(p-1) / beta, 0);
    z = mean(q - (x - e) / s); beta *= kappa. Stops where the mean absolute error of a block stops falling; the
    scale is not changed. Needs an unrounded zero-point or a minimum to pay off. Error: never above min-max
    in mean |x - x_q|. Source: Badri and Shaji 2023, "Half-Quadratic Quantization", equations 4 to 8.
    """
    needs_offset(fmt, "hqq")
    scale, offset = minmax(x, fmt, importance)
    inverse = (1 / scale)[:, None]

    def dequantized(z: Tensor) -> tuple[Tensor, Tensor]:
        z = as_stored(scale, z, fmt)[1]
        level = fmt.grid.round(x * inverse + z[:, None])
        return level, (level - z[:, None]) * scale[:, None]

    level, value = dequantized(offset)
    best, error = offset, (x - value).abs().mean(1)
    for _ in range(iterations):
        residual = x - value
        size = residual.abs()
        shrunk = residual.sign() * (size - p * size.clamp_min(1e-12).pow(p - 1) / beta).clamp_min_(0)
        offset = (level - (x - shrunk) * inverse).mean(1)
        beta *= kappa
        level, value = dequantized(offset)
        now = (x - value).abs().mean(1)
        better = now < error
        if not bool(better.any()):
            break
        best, error = torch.where(better, offset, best), torch.where(better, now, error)
    return scale, best
