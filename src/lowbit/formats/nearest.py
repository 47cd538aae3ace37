"""The nearest level of a sorted table, fast and exact, and the inverse of a scale."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class NearestSearch:
    """Position of the nearest level in a sorted table, by one lookup and one comparison.

    The axis is cut into bins so fine that each holds at most one midpoint between levels; a bin then
    names the level below its midpoint and one comparison decides. About eight times faster than a
    binary search. Tables whose levels are too close for that use the binary search.
    """

    MAX_BINS = 1 << 16

    def __init__(self, levels: Tensor, codes: Tensor) -> None:
        """`levels` float32 [n] strictly ascending, `codes` uint8 [n]."""
        self.sorted, self.codes = levels, codes
        tie_up = codes[1:] % 2 < codes[:-1] % 2  # the even code is above: the midpoint itself belongs to it
        self.bounds = last_below_middle(levels, tie_up)
        self.low = float(self.bounds[0]) if len(self.bounds) else 0.0
        span = float(self.bounds[-1]) - self.low if len(self.bounds) else 0.0
        gap = float((self.bounds[1:] - self.bounds[:-1]).min()) if len(self.bounds) > 1 else math.inf
        bins = 2 if math.isinf(gap) else 2 * math.ceil(span / max(gap, 1e-30)) + 2
        self.bins = bins if bins <= self.MAX_BINS and span > 0 else 0
        if self.bins:
            self.per_bin = (self.bins - 1) / span
            self.bounds_or_inf = torch.cat([self.bounds, self.bounds.new_full((1,), math.inf)])
            # A bin one step early: the bin of a bound, as __call__ computes it, still names the level below it.
            at = ((self.bounds - self.low) * self.per_bin).floor()
            self.table = torch.searchsorted(
                at.contiguous(), torch.arange(self.bins, device=levels.device, dtype=torch.float32)
            ).to(torch.int32)

    def __call__(self, x: Tensor) -> Tensor:
        """int32 positions, of the shape of `x` (float32)."""
        if not self.bins:
            return torch.bucketize(x, self.bounds, out_int32=True)
        bins = ((x - self.low) * self.per_bin).floor_().clamp_(0, self.bins - 1).to(torch.int32).reshape(-1)
        position = self.table.index_select(0, bins)
        above = x.reshape(-1) > self.bounds_or_inf.index_select(0, position)
        return position.add_(above).view(x.shape)


def last_below_middle(levels: Tensor, tie_up: Tensor | None = None) -> Tensor:
    """float32 [..., n - 1]: between ascending `levels` [..., n], the largest value that goes to the lower one.

    That is the midpoint, rounded down to a float32; where `tie_up`, the float32 before an exact midpoint.
    """
    middle = (levels[..., 1:].double() + levels[..., :-1].double()) / 2
    bound = middle.to(torch.float32)
    over = bound.double() > middle
    if tie_up is not None:
        over |= tie_up & (bound.double() == middle)
    return torch.where(over, torch.nextafter(bound, torch.full_like(bound, -math.inf)), bound)


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where the scale is 0 or so small that its inverse overflows (the block then rounds to 0)."""
    inverse = 1 / scale
    return torch.where(inverse.isfinite(), inverse, 0.0)


def nearest_level(x: Tensor, levels: Tensor) -> Tensor:
    """uint8 [n, size]: for each row of `x` [n, size] the nearest of its own ascending `levels` [n, k].

    Ties go to the lower level.
    """
    if levels.shape[0] == 1 and bool((levels[0, 1:] > levels[0, :-1]).all()):
        codes = torch.arange(levels.shape[1], dtype=torch.uint8, device=x.device)
        return NearestSearch(levels[0], torch.zeros_like(codes))(x).to(torch.uint8)
    bounds = last_below_middle(levels)
    return torch.searchsorted(bounds.contiguous(), x.contiguous()).to(torch.uint8)
