"""hqq: half-quadratic quantization, a zero-point that ignores outliers."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.formats import Format
from lowbit.solvers.fits.minmax import minmax
from lowbit.solvers.fitting import as_stored, total
from lowbit.solvers.registry import fit


@fit(offset="always")
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
    """Move the zero-point of a block so that most weights have small errors, even if a few have large ones.

    Minimises |x - x_q|^p with p < 1 by half-quadratic splitting. From the min-max fit, in units of the step s, repeat: e = shrink(x - x_q), shrink(r) = sign(r)
    max(|r| - |r|^(p-1) / beta, 0); z = mean(q - (x - e)); beta *= kappa. Stops where the mean absolute error
    of no block falls any more; the scale is not changed. Needs an unrounded zero-point or a minimum to pay off.
    Error: never above min-max in mean |x - x_q|. Source: Badri and Shaji 2023, "Half-Quadratic Quantization",
    whose program shrinks the weights as they are; in units of the step the result does not depend on their size.
    """
    scale, offset = minmax(x, fmt, importance)
    x = x / scale[:, None]

    def dequantized(z: Tensor) -> tuple[Tensor, Tensor]:
        z = as_stored(scale, z, fmt)[1]
        level = fmt.grid.round(x + z[:, None])
        return level, level - z[:, None]

    level, value = dequantized(offset)
    best, error = offset, total((x - value).abs())
    for _ in range(iterations):
        residual = x - value
        size = residual.abs()
        shrunk = residual.sign() * (size - size.clamp_min(1e-12).pow(p - 1) / beta).clamp_min_(0)
        offset = total(level - (x - shrunk)) / x.shape[1]
        beta *= kappa
        level, value = dequantized(offset)
        now = total((x - value).abs())
        better = now < error
        if not bool(better.any()):
            break
        best, error = torch.where(better, offset, best), torch.where(better, now, error)
    return scale, best
