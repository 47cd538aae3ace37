"""The two steps of the GPTQ family once scales are fitted, feedback and polish, as PyTorch computes them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lowbit.formats import QTensor
from lowbit.solvers.coordinate_descent import coordinate_descent, feed_errors
from lowbit.solvers.hessian import Factor, quadratic_of_rows
from lowbit.solvers.refit import refit_scales, refits
from lowbit.solvers.rounding import Rounder, by_row, with_values


class Steps(Protocol):
    """Who computes them. `q` [N, K] has the scales; `still` bool [N, K] or None: zeros that stay zero. Errors are e H e' of each row e
    of what Q is off, float64 [N]. No row depends on another."""

    def feed(
        self, q: QTensor, weight: Tensor, factor: Factor, still: Tensor | None, shift: Tensor | None
    ) -> tuple[QTensor, Tensor, Tensor]:
        """Codes by error feedback, for each row that it serves better than round-to-nearest (with `shift`, for all: the error that
        counts is not this one then); the error of round-to-nearest, and of what is returned."""

    def polish(
        self, q: QTensor, error: Tensor, target: Tensor, factor: Factor, still: Tensor | None, rounds: int
    ) -> tuple[QTensor, Tensor]:
        """A joint refit of the scales and a sweep of coordinate descent under the new ones, up to `rounds` times; a row that this
        does not help keeps what it has, and is done."""


class TorchSteps:
    """Column by column in PyTorch: every format, and what the C++ part is compared with."""

    def feed(
        self, q: QTensor, weight: Tensor, factor: Factor, still: Tensor | None, shift: Tensor | None
    ) -> tuple[QTensor, Tensor, Tensor]:
        perm, back = factor.perm, torch.argsort(factor.perm)
        values = feed_errors(weight[:, perm], factor.upper, Rounder(q, perm, still), shift)[:, back]
        nearest, fed = with_values(q, weight), with_values(q, values)
        start = quadratic_of_rows(nearest.dequantize() - weight, factor.hessian)
        error = quadratic_of_rows(fed.dequantize() - weight, factor.hessian)
        if shift is not None:
            return fed, start, error
        better = error < start
        return by_row(better, fed, nearest), start, torch.where(better, error, start)

    def polish(
        self, q: QTensor, error: Tensor, target: Tensor, factor: Factor, still: Tensor | None, rounds: int
    ) -> tuple[QTensor, Tensor]:
        helped = torch.ones(len(error), dtype=torch.bool)
        for _ in range(rounds):
            new, e = self._polished(q, target, factor, still)
            helped &= e < error
            if not bool(helped.any()):
                break
            q, error = by_row(helped, new, q), torch.where(helped, e, error)
        return q, error

    def _polished(self, q: QTensor, target: Tensor, factor: Factor, still: Tensor | None) -> tuple[QTensor, Tensor]:
        if refits(q):
            q = refit_scales(q, target, factor.hessian, still)
        perm, back = factor.perm, torch.argsort(factor.perm)
        hessian = factor.hessian[perm][:, perm].contiguous()
        values, error = coordinate_descent(q.dequantize()[:, perm], target[:, perm], hessian, Rounder(q, perm, still))
        return with_values(q, values[:, back]), error
