"""percentile: all but the outermost values."""

from __future__ import annotations

from lowbit.errors import RecipeError
from lowbit.formats import Format
from lowbit.solvers.ranges.estimator import RangeEstimator, estimator
from lowbit.solvers.ranges.histogram import quantile


@estimator
class Percentile(RangeEstimator):
    """Leave out the few largest values.

    The range is the p-th percentile of |x|, or with an offset what lies between tails of (100 - p) / 2 percent.
    Exact to the width of a bin, 2^-7 of the value. Source: Wu et al. 2020, "Integer Quantization for Deep Learning
    Inference", section 3.3.
    """

    def __init__(self, fmt: Format, *, p: float = 99.99) -> None:
        super().__init__(fmt)
        if not 0 < p <= 100:
            raise RecipeError(f"percentile(p={p}) is outside 0 < p <= 100")
        self.p = p

    def estimate(self) -> tuple[float, float]:
        if self.symmetric:
            peak = quantile(self.histogram.of_magnitudes(), self.p / 100)
            return -peak, peak
        bins, tail = self.histogram.bins(), (100 - self.p) / 200
        return quantile(bins, tail), quantile(bins, 1 - tail)
