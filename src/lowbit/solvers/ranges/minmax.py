"""minmax: everything that was seen."""

from __future__ import annotations

from lowbit.solvers.ranges.estimator import RangeEstimator, estimator


@estimator
class MinMax(RangeEstimator):
    """Take everything from the least to the largest value that was seen.

    Clips nothing; one outlier widens every step.
    """

    def estimate(self) -> tuple[float, float]:
        return self.histogram.low, self.histogram.high
