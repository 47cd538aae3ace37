"""The two steps of the GPTQ family once scales are fitted, feedback and polish, as PyTorch computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from lowbit.formats import QTensor
from lowbit.solvers.coordinate_descent import coordinate_descent, feed_errors
from lowbit.solvers.hessian import Factor, quadratic_of_rows
from lowbit.solvers.refit import refit_scales, refits
from lowbit.solvers.rounding import Rounder, by_row, with_values


class Steps(Protocol):
    """Who computes them."""

    def solve(
        self, q: QTensor, target: Tensor, factor: Factor, still: Tensor | None, shift: Tensor | None, rounds: int
    ) -> tuple[QTensor, Tensor, Tensor]:
        """Codes for `target` [N, K] under the scales of `q`; the error of round-to-nearest, and of what is returned.

        Errors are e H e' of each row e of what Q is off, float64 [N]. A row takes the codes of feedback or, where these are
        no better, the nearest (with `shift`, the former: the error that counts is not this one then). Up to `rounds` times the
        scales are refitted together and codes chosen once more by coordinate descent; a row that this does not help keeps what it
        has, and is done. `still` bool [N, K] or None: zeros that stay zero. No row depends on another.
        """


class TorchSteps:
    """Column by column in PyTorch: every format, and what the C++ part is compared with."""

    def solve(
        self, q: QTensor, target: Tensor, factor: Factor, still: Tensor | None, shift: Tensor | None, rounds: int
    ) -> tuple[QTensor, Tensor, Tensor]:
        q, start, error = self._fed(q, target, factor, still, shift)
        q, error = improved(q, error, rounds, lambda q: self._polished(q, target, factor, still))
        return q, start, error

    def _fed(
        self, q: QTensor, target: Tensor, factor: Factor, still: Tensor | None, shift: Tensor | None
    ) -> tuple[QTensor, Tensor, Tensor]:
        perm, back = factor.perm, torch.argsort(factor.perm)
        values = feed_errors(target[:, perm], factor.upper, Rounder(q, perm, still), shift)[:, back]
        nearest, fed = with_values(q, target), with_values(q, values)
        start = quadratic_of_rows(nearest.dequantize() - target, factor.hessian)
        error = quadratic_of_rows(fed.dequantize() - target, factor.hessian)
        if shift is not None:
            return fed, start, error
        better = error < start
        return by_row(better, fed, nearest), start, torch.where(better, error, start)

    def _polished(self, q: QTensor, target: Tensor, factor: Factor, still: Tensor | None) -> tuple[QTensor, Tensor]:
        if refits(q):
            q = refit_scales(q, target, factor.hessian, still)
        perm, back = factor.perm, torch.argsort(factor.perm)
        hessian = factor.hessian[perm][:, perm].contiguous()
        values, error = coordinate_descent(q.dequantize()[:, perm], target[:, perm], hessian, Rounder(q, perm, still))
        return with_values(q, values[:, back]), error


def improved(
    q: QTensor, error: Tensor, rounds: int, once: Callable[[QTensor], tuple[QTensor, Tensor]]
) -> tuple[QTensor, Tensor]:
    """`once` again and again, for each row as long as it lowers its error: what is left, and its error."""
    helped = torch.ones(len(error), dtype=torch.bool)
    for _ in range(rounds):
        new, e = once(q)
        helped &= e < error
        if not bool(helped.any()):
            break
        q, error = by_row(helped, new, q), torch.where(helped, e, error)
    return q, error
