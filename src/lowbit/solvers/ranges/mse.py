"""mse: the range whose rounding and clipping together cost least."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lowbit.errors import RecipeError
from lowbit.formats import Format, IntGrid
from lowbit.formats.inputs import range_to_scale
from lowbit.solvers.ranges.estimator import RangeEstimator, estimator


@estimator
class Mse(RangeEstimator):
    """Try ever narrower ranges and keep the one with the least squared error.

    The full range times factors from 1 down to 2^-`octaves`, `steps` per octave; the least sum of (x - x_q)^2 wins.
    With an offset both ends are cut at one magnitude first, and then each alone, so that neither holds up the other.
    The error is an integral over each bin of the histogram, values being spread evenly in it: for integer levels
    s apart the primitive of the squared rounding error at t is s^3 (n / 12 + r^3 / 3) with t / s = n + r, |r| <= 1/2,
    and that of clipping at c is (t - c)^3 / 3. So the width of the bins blurs nothing. Source: Banner et al. 2019,
    "Post training 4-bit quantization", section 3, on the distribution seen instead of a Laplace one.
    """

    def __init__(self, fmt: Format, *, steps: int = 16, octaves: int = 6) -> None:
        super().__init__(fmt)
        if not (isinstance(steps, int) and isinstance(octaves, int) and 1 <= steps <= 1000 and 1 <= octaves <= 60):
            raise RecipeError(f"mse(steps={steps},octaves={octaves}) takes whole numbers, 1 to 1000 and 1 to 60")
        self.factors = [2.0 ** (-i / steps) for i in range(steps * octaves + 1)]

    def estimate(self) -> tuple[float, float]:
        low, high = self.histogram.low, self.histogram.high
        peak, bins = max(abs(low), abs(high)), self.histogram.bins()

        def best(candidates: Iterable[tuple[float, float]]) -> tuple[float, float]:
            return min((c for c in candidates if c[0] <= c[1]), key=lambda ends: self.error(bins, *ends))

        if self.symmetric:
            return best((-peak * f, peak * f) for f in self.factors)
        found = best((max(low, -peak * f), min(high, peak * f)) for f in self.factors)
        found = best((low * f, found[1]) for f in self.factors)
        return best((found[0], high * f) for f in self.factors)

    def error(self, bins: tuple[Tensor, Tensor, Tensor], low: float, high: float) -> float:
        """Sum over all values of the squared error under the range (low, high)."""
        scale, offset = range_to_scale(torch.tensor([low]), torch.tensor([high]), self.format)
        s, z = float(scale), 0.0 if offset is None else float(offset)
        lower, upper, counts = bins
        if s == 0:
            return float((counts * ((lower + upper) / 2).square()).sum())
        if not isinstance(self.format.grid, IntGrid):
            middle = (lower + upper) / 2
            level = self.format.grid.round((middle / s + z).float()).double()
            return float((counts * (middle - s * (level - z)).square()).sum())
        ends = s * (self.format.grid.lo - z), s * (self.format.grid.hi - z)
        width = upper - lower
        over = (_primitive(upper, s, z, *ends) - _primitive(lower, s, z, *ends)) / width.clamp_min(1e-300)
        at = lower.clamp(*ends)
        point = (lower - s * ((at / s + z).round() - z)).square()
        # A bin too narrow for the difference of its primitives is a point.
        return float((counts * torch.where(width > 1e-9 * lower.abs(), over, point)).sum())


def _primitive(t: Tensor, s: float, z: float, low: float, high: float) -> Tensor:
    """Integral up to `t` of the squared error of values rounded to levels `s` apart and clipped to [low, high]."""
    inside = t.clamp(low, high)
    n = (inside / s + z).round()
    r = inside / s + z - n
    return s**3 * (n / 12 + r**3 / 3) + (t - inside) ** 3 / 3
