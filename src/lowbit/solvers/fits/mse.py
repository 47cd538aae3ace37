"""mse: shrink the range step by step and keep what rounds best."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import RecipeError
from lowbit.formats import Format
from lowbit.solvers.fits.minmax import affine
from lowbit.solvers.fitting import as_stored, rounded_scale, total
from lowbit.solvers.registry import fit


@fit(weighs=True)
def mse(x: Tensor, fmt: Format, importance: Tensor | None = None, *, steps: int = 40, shrink: float = 0.3) -> object:
    """Try ever narrower ranges for a block, which cut off its largest values, and keep the one with the least error.

    The range times 1, ..., `shrink` in `steps` steps; the least sum of v (x - x_q)^2 wins. v is the importance (1 if none). Never worse than absmax or minmax under this measure, as the full range is
    the first candidate. Source: Banner et al. 2019, "Post training 4-bit quantization", section 3 (by search
    instead of a closed form); GPTQ's `mse` option searches the same way.
    """
    if steps < 1:
        raise RecipeError(f"mse(steps={steps}) tries no range at all; at least 1")
    weight = 1.0 if importance is None else importance
    low, high = x.amin(1), x.amax(1)
    peak = x.abs().amax(1)
    best = torch.full_like(peak, torch.inf)
    scale, offset = torch.zeros_like(peak), torch.zeros_like(peak)
    for factor in torch.linspace(1.0, shrink, steps).tolist():
        if fmt.offset is None:
            s = rounded_scale(peak * factor / fmt.grid.reach, fmt)
            z = torch.zeros_like(s)
        else:
            s, z = as_stored(*affine(low * factor, high * factor, fmt), fmt)
        inverse = torch.where(s > 0, 1 / s, 0.0)
        level = fmt.grid.round(x * inverse[:, None] + z[:, None])
        error = total((level.sub_(z[:, None]).mul_(s[:, None]) - x).square_() * weight)
        better = error < best
        best = torch.where(better, error, best)
        scale, offset = torch.where(better, s, scale), torch.where(better, z, offset)
    return scale if fmt.offset is None else (scale, offset)
