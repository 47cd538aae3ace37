"""What calibration saw of one input x [tokens, K] of one or more weights.

Weights that read the same input (q, k and v; gate and up) share one `Stats`. Scaling the channels of x acts on
it by algebra, so that a transform needs no second forward.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowbit.kernels.bfloat16 import add_moments, multiplies_bfloat16
from lowbit.solvers.products import bfloat16_products

_PANEL = 256  # columns of a second moment that are added up at a time


@dataclass(eq=False)
class Stats:
    """Moments of an input; all float32.

    tokens         how many rows x had
    second_moment  [K, K]: x' x / tokens, of the inputs as the quantized model sees them
    absmax         [K]: the largest |x_k|
    mean_abs       [K]: the mean of |x_k|
    drift          [K, K]: (x_f - x)' x / tokens, with x_f the same input in the float model; None when not asked for
    """

    tokens: int
    second_moment: Tensor
    absmax: Tensor
    mean_abs: Tensor
    drift: Tensor | None = None
    half: bool = False  # the model multiplies this input in bfloat16
    memory: dict[Any, Any] = field(default_factory=dict, repr=False)  # factorizations that several weights share

    @property
    def importance(self) -> Tensor:
        """[1, K]: E[x_k^2], what an error of column k costs; never 0, so that unseen channels still round to nearest."""
        mean = self.second_moment.diagonal()
        floor = float(mean.max()) * 1e-6 if float(mean.max()) > 0 else 1.0
        return mean.clamp_min(floor)[None]

    def scaled(self, scale: Tensor) -> Stats:
        """The statistics of x / scale: H_kl / (s_k s_l), absmax_k / s_k, mean_abs_k / s_k. `scale` [K] > 0."""
        s = scale.to(torch.float32)
        both = s[:, None] * s
        drift = None if self.drift is None else self.drift / both
        return Stats(self.tokens, self.second_moment / both, self.absmax / s, self.mean_abs / s, drift, self.half)

    def blended(self, prior: Stats, tokens: int) -> Stats:
        """Shrunk towards `prior`, which counts as `tokens` observations: (n H + m H_prior) / (n + m).

        For an expert that saw few tokens, with the statistics of all its siblings as the prior.
        """
        n = self.tokens
        share = n / max(1, n + tokens)
        mixed = share * self.second_moment + (1 - share) * prior.second_moment
        absmax = torch.maximum(self.absmax, prior.absmax * (1 - share))
        return Stats(n, mixed, absmax, share * self.mean_abs + (1 - share) * prior.mean_abs, half=self.half)


class StatsBuilder:
    """Adds micro-batches up; sums are float32 of float32 products, the mean is taken at the end.

    `half`: the model multiplies x in bfloat16, so that it is x rounded to it that counts: then all products are those of
    bfloat16 numbers, up to four times as fast on processors that have it. The drift is a small difference, so that rounding
    it costs little; the second moment would not bear a rounded sum, and has none.
    """

    def __init__(self, width: int, drift: bool = False, half: bool = False) -> None:
        self.tokens = 0
        self.sum = torch.zeros(width, width)  # of which the upper triangle counts
        self.drift = torch.zeros(width, width) if drift else None
        self.half = half
        self.absmax, self.abs = torch.zeros(width), torch.zeros(width)

    def add(self, x: Tensor, x_float: Tensor | None = None, weights: Tensor | None = None) -> None:
        """`x` [..., K] as the quantized model computes it; `x_float` the same of the float model; `weights` [tokens] say
        how much each token counts in the products, mean 1."""
        x = x.detach().reshape(-1, x.shape[-1]).to("cpu")
        if not len(x):
            return
        self.tokens += len(x)
        x_float = None if self.drift is None or x_float is None else x_float.reshape(x.shape).to("cpu")
        if self.half and weights is None and multiplies_bfloat16():  # weighed inputs are no bfloat16 numbers
            drift = None if x_float is None else self.drift
            add_moments(x, self.sum, self.absmax, self.abs, x_float, drift)
        else:
            self._add(x.to(torch.bfloat16 if self.half else torch.float32).to(torch.float32), x_float, weights)

    def _add(self, x: Tensor, x_float: Tensor | None, weights: Tensor | None) -> None:
        """The same in expressions of PyTorch, for `x` [tokens, K] in float32."""
        weighed = x if weights is None else x * weights[:, None]
        exact = self.half and weights is None
        with bfloat16_products() if exact else nullcontext():
            for begin in range(0, x.shape[1], _PANEL):  # the upper triangle by panels; the lower one mirrors it
                panel = slice(begin, begin + _PANEL)
                self.sum[: begin + _PANEL, panel].addmm_(weighed[:, : begin + _PANEL].T, x[:, panel])
        size = x.abs()
        torch.maximum(self.absmax, size.amax(0), out=self.absmax)
        self.abs += size.sum(0)
        if self.drift is not None and x_float is not None:
            change = x_float.to(torch.float32) - x
            if self.half:
                self.drift += change.to(torch.bfloat16).T @ weighed.to(torch.bfloat16)
            else:
                self.drift.addmm_(change.T, weighed)

    def stats(self) -> Stats:
        """The moments of everything added. With no tokens at all, every moment is 0."""
        n = max(1, self.tokens)
        moment = self.sum.triu() / n
        moment += moment.triu(1).T
        drift = None if self.drift is None else self.drift / n
        return Stats(self.tokens, moment, self.absmax, self.abs / n, drift, self.half)
