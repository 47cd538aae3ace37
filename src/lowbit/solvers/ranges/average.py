"""average: the range of a batch, averaged over batches."""

from __future__ import annotations

from torch import Tensor

from lowbit.errors import RecipeError
from lowbit.formats import Format
from lowbit.solvers.ranges.estimator import RangeEstimator, estimator


@estimator
class Average(RangeEstimator):
    """Average the least and the largest values of the batches, the latest ones counting most.

    r = m r + (1 - m) r_batch.
    It starts at the first batch. Depends on the order of batches; clips the outliers of single ones in part.
    Source: Jacob et al. 2018, section 3.1 (during training, with m close to 1; few batches want a smaller one).
    """

    def __init__(self, fmt: Format, *, momentum: float = 0.9) -> None:
        super().__init__(fmt)
        if not 0 <= momentum < 1:
            raise RecipeError(f"average(momentum={momentum}) is outside 0 <= momentum < 1")
        self.momentum = momentum
        self.ends: tuple[float, float] | None = None

    def observe(self, x: Tensor) -> None:
        super().observe(x)
        if not x.numel():
            return
        low, high = (float(end) for end in (x.amin(), x.amax()))
        if self.ends is not None:
            m = self.momentum
            low, high = m * self.ends[0] + (1 - m) * low, m * self.ends[1] + (1 - m) * high
        self.ends = low, high

    def estimate(self) -> tuple[float, float]:
        return self.ends or (0.0, 0.0)
