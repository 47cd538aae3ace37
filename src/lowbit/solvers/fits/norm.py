"""norm: the scale from the norm of a block, as rotated vectors want it."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lowbit.formats import Format
from lowbit.formats.grids import Grid
from lowbit.formats.nearest import inverse
from lowbit.solvers.fitting import total
from lowbit.solvers.registry import fit

_CANDIDATES = 41  # scales that are compared at a time
_PASSES = 4  # each between the neighbours of the best before


@fit(offset="never")
def norm(x: Tensor, fmt: Format, importance: Tensor | None = None) -> Tensor:
    """Take the numbers of a block for normal ones, with the scale that is best for these, and correct it once.

    s0 = rms(x) u, where u is the scale of least error for N(0, 1) on this grid; q = round(x / s0), and s = sum(x q) / sum(q^2),
    the scale of least squares for these levels. Error: of rotated vectors about that of N(0, 1), per square of the norm
    0.117, 0.035 and 0.0095 for normal2, normal3 and normal4; of others more than that of search, as nothing keeps large
    numbers from being clipped.

    Source: TurboQuant (Zandieh et al. 2025, arXiv 2504.19874), algorithm 1, which stores the norm of a rotated vector and
    levels of the distribution that its coordinates then have. Its scale is s0. A scale that gives the vector its norm back,
    s = |x| / |q|, has more error than least squares by construction; on the caches of SmolLM2-135M at 4 bits the KL against
    the float cache was 0.080 with s0, 0.072 with the norm kept, and 0.065 with least squares.
    """
    scale = total(x * x).div(x.shape[1]).sqrt() * normal_scale(fmt.grid)
    q = fmt.grid.round(x * inverse(scale)[:, None])
    squares = total(q * q)
    return torch.where(squares > 0, total(x * q) / squares, scale)


@lru_cache(maxsize=64)
def normal_scale(grid: Grid) -> float:
    """The s with the least E (z - s round(z / s))^2 for z from N(0, 1), within about 1 in 10,000."""
    z = torch.linspace(-6, 6, 6001, dtype=torch.float64)
    weight = torch.exp(-z.square() / 2)
    low, high = 0.1 / grid.reach, 12 / grid.reach
    best = low
    for _ in range(_PASSES):
        exponents = torch.linspace(0, 1, _CANDIDATES, dtype=torch.float64).tolist()
        scales = [low * (high / low) ** exponent for exponent in exponents]
        errors = [float((weight * (s * grid.round((z / s).float()).double() - z).square()).sum()) for s in scales]
        at = errors.index(min(errors))
        best, low, high = scales[at], scales[max(0, at - 1)], scales[min(_CANDIDATES - 1, at + 1)]
    return best
