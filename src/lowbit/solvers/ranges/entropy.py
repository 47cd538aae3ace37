"""entropy: the threshold after which the distribution is still most like itself."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import RecipeError
from lowbit.formats import Format
from lowbit.solvers.ranges.estimator import RangeEstimator, estimator
from lowbit.solvers.ranges.histogram import shares


@estimator
class Entropy(RangeEstimator):
    """Cut off large values at the point where rounding then changes the distribution of the values least.

    The threshold on |x| with the least KL divergence between the clipped and the quantized distribution.
    |x| is counted in `bins` bins of equal width. For each i from the number of positive levels n to `bins`: P is
    the first i bins, with all that lies beyond in the last of them; Q gathers the first i bins (without what lies
    beyond) into n equal parts and spreads each evenly over those of its bins that are not empty. With an offset the
    range is what was seen, cut at the threshold. Where one outlier is thousands of times all others, these shares a
    bin and the choice is blind: mse sees finer. Source: Migacz 2017, "8-bit Inference with TensorRT".
    """

    def __init__(self, fmt: Format, *, bins: int = 2048) -> None:
        super().__init__(fmt)
        if not (isinstance(bins, int) and 1 << fmt.grid.bits <= bins <= 1 << 16):
            raise RecipeError(f"entropy(bins={bins}) takes a whole number from {1 << fmt.grid.bits} to {1 << 16}")
        self.bins = bins

    def estimate(self) -> tuple[float, float]:
        peak = max(abs(self.histogram.low), abs(self.histogram.high))
        if not peak:
            return 0.0, 0.0
        counts = self.linear(peak)
        levels = 1 << (self.format.grid.bits - 1)
        best = min(range(levels, self.bins + 1), key=lambda i: divergence(counts, i, levels))
        threshold = peak * best / self.bins
        return max(self.histogram.low, -threshold), min(self.histogram.high, threshold)

    def linear(self, peak: float) -> Tensor:
        """How many of the |x| lie in each of `bins` bins of equal width up to `peak`, float64."""
        lower, upper, counts = self.histogram.of_magnitudes()
        ends = torch.linspace(0, peak, self.bins + 1, dtype=torch.float64)[1:]
        ends[-1] = torch.inf
        total = torch.cat([counts @ shares(lower, upper, at) for at in ends.split(64)])
        return total.diff(prepend=total.new_zeros(1))


def divergence(counts: Tensor, i: int, levels: int) -> float:
    """KL(P || Q) for a threshold after `i` bins of `counts` and `levels` levels."""
    inside = counts[:i]
    p = inside.clone()
    p[-1] += counts[i:].sum()
    part = (torch.arange(i) * levels).div(i, rounding_mode="floor")
    filled = (inside > 0).double()
    sums, cells = (torch.zeros(levels, dtype=torch.float64).index_add_(0, part, v) for v in (inside, filled))
    q = (sums / cells.clamp_min(1))[part] * filled
    mass = float(q.sum())
    both = p > 0
    if not mass or bool((q[both] == 0).any()):
        return float("inf")  # Q rules out what P has: what is clipped falls in an empty bin
    p, q = p[both] / p.sum(), q[both] / mass
    return float((p * (p / q).log()).sum())
