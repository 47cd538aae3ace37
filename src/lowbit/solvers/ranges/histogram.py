"""Histogram: how often values of every size were seen, in bounded memory, whatever sizes come."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import WeightError

_SHIFT = 16  # of a float32's bits, sign, exponent and 7 of the mantissa are kept


class Histogram:
    """Counts by the upper half of a float32, so that bins are as wide as 2^-7 of their values (half a megabyte).

    Nothing is set beforehand and nothing is binned twice: neither the order nor the size of batches matters. Least
    and largest value are exact. WeightError for values that are not finite.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(1 << (32 - _SHIFT), dtype=torch.int64)
        self.low, self.high, self.total = 0.0, 0.0, 0

    def add(self, x: Tensor) -> None:
        """Count the values of `x`, of any shape."""
        x = x.detach().to(torch.float32).reshape(-1)
        if not len(x):
            return
        low, high = (float(v) for v in torch.aminmax(x))
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise WeightError("inputs of a layer are NaN or infinite on the calibration text; is the model intact?")
        self.low, self.high = (min(self.low, low), max(self.high, high)) if self.total else (low, high)
        self.total += len(x)
        upper = x.view(torch.int32).bitwise_right_shift(_SHIFT).bitwise_and_(0xFFFF)
        self.counts += torch.bincount(upper.to(torch.int64), minlength=len(self.counts)).cpu()

    def bins(self) -> tuple[Tensor, Tensor, Tensor]:
        """(lower ends, upper ends, counts) of the bins that are not empty, float64, in ascending order.

        Ends are drawn in to the least and largest value, and those of zeros (and of denormals) to zero.
        """
        seen = self.counts.nonzero()[:, 0]
        near, far = (_value((seen << _SHIFT) + last) for last in (0, (1 << _SHIFT) - 1))
        lower, upper = torch.minimum(near, far), torch.maximum(near, far)
        order = lower.argsort()
        nothing = torch.maximum(lower.abs(), upper.abs()) < torch.finfo(torch.float32).tiny
        ends = (end.masked_fill(nothing, 0.0)[order].clamp(self.low, self.high) for end in (lower, upper))
        return (*ends, self.counts[seen][order].double())

    def of_magnitudes(self) -> tuple[Tensor, Tensor, Tensor]:
        """`bins()` of |x|: the bins of both signs together."""
        lower, upper, counts = self.bins()
        ends = torch.where(upper <= 0, -upper, lower), torch.where(upper <= 0, -lower, upper)
        order = ends[0].argsort()
        return ends[0][order].clamp_min(0), ends[1][order], counts[order]

    def share_outside(self, low: float, high: float) -> float:
        """Share of the values below `low` or above `high`; bins that these cut count in part."""
        if not self.total:
            return 0.0
        lower, upper, counts = self.bins()
        inside = shares(lower, upper, torch.tensor([high])) - shares(lower, upper, torch.tensor([low]), below=True)
        return min(1.0, max(0.0, 1 - float((counts * inside[:, 0]).sum()) / self.total))


def shares(lower: Tensor, upper: Tensor, at: Tensor, below: bool = False) -> Tensor:
    """Share [bins, len(at)] of each bin at or below each value (`below`: truly below), values spread evenly in it."""
    at = at.double()[None]
    width = (upper - lower)[:, None]
    point = (at > lower[:, None]) if below else (at >= lower[:, None])
    return torch.where(width > 0, (at - lower[:, None]) / width.clamp_min(1e-300), point.double()).clamp(0, 1)


def quantile(bins: tuple[Tensor, Tensor, Tensor], share: float) -> float:
    """The value that `share` of the values are at or below, evenly spread in their bins."""
    lower, upper, counts = bins
    wanted = share * float(counts.sum())
    until = counts.cumsum(0)
    i = min(int(torch.searchsorted(until, wanted)), len(counts) - 1)
    part = (wanted - float(until[i] - counts[i])) / float(counts[i])
    return float(lower[i] + (upper[i] - lower[i]) * min(1.0, max(0.0, part)))


def _value(bits: Tensor) -> Tensor:
    """float64 values of the float32 with these bits (int64, 0 to 2^32 - 1); infinities are the largest float."""
    signed = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32)
    return signed.view(torch.float32).double().nan_to_num()
