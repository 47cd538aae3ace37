"""What GPTQ, GPTAQ and Qronos have in common: scales first, columns in order, polish, and the better of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lowbit.errors import RecipeError
from lowbit.formats import Format
from lowbit.solvers.core_steps import CoreSteps, core_takes
from lowbit.solvers.fitting import fit_blocks
from lowbit.solvers.found import Found, Trace
from lowbit.solvers.hessian import Factor, factorize
from lowbit.solvers.registry import Call
from lowbit.solvers.rounding import empty
from lowbit.solvers.stats import Stats
from lowbit.solvers.steps import Steps, TorchSteps
from lowbit.solvers.zeros import zero_runs


@dataclass(frozen=True, eq=False)
class Problem:
    """One weight [N, K], what it becomes, and what is known of its input."""

    weight: Tensor
    fmt: Format
    fit: Call
    stats: Stats
    damp: float
    order: int

    def __post_init__(self) -> None:
        if self.order not in (0, 1, 2):
            raise RecipeError(
                f"order={self.order} is unknown: 0 as they stand, 1 activation order, 2 group-aware order"
            )

    @cached_property
    def factor(self) -> Factor:
        """The damped second moment, factorized in the order of columns."""
        diagonal = self.stats.second_moment.diagonal()
        return factorize(self.stats, self.damp, columns_in_order(diagonal, self.order, self.fmt.block.cols))


Shift = Callable[[Factor, Stats], Tensor]


def solve_with_feedback(
    problem: Problem, *, polish: int, target: Tensor | None = None, shift: Shift | None = None
) -> Found:
    """Fit scales, round with error feedback, polish; each row keeps whatever has the least error under H. Runs of zeros
    stay zero.

    `target` [N, K]: what Q is to resemble, when it is not the weight itself (Qronos). `shift`: the matrix P of GPTAQ,
    in the order of the factor's columns.
    """
    still = zero_runs(problem.weight, problem.fmt)
    weight = problem.weight if target is None else target
    if target is not None and still is not None:
        weight = weight.masked_fill(still, 0)
    scale, offset = fit_blocks(weight, problem.fmt, problem.fit, problem.stats.importance)
    q = empty(problem.fmt, tuple(weight.shape), scale, offset)
    factor = problem.factor
    p = None if shift is None else shift(factor, problem.stats)
    q, start, error = steps_for(problem.fmt, weight).solve(q, weight, factor, still, p, polish)
    return Found(q, Trace(float(start.sum()), float(error.sum()), factor.damp))


def steps_for(fmt: Format, weight: Tensor) -> Steps:
    """The C++ part's where it is there and takes this format, else PyTorch's."""
    return CoreSteps() if core_takes(fmt, weight) else TorchSteps()


def columns_in_order(diagonal: Tensor, order: int, group: int) -> Tensor:
    """int64 [K]: the order in which columns are rounded, the most important first; the same on every machine."""
    if order == 0:
        return torch.arange(len(diagonal))
    if order == 1 or group == -1:
        return torch.argsort(diagonal, descending=True, stable=True)
    starts = range(0, len(diagonal), group)
    first = sorted(starts, key=lambda s: -float(diagonal[s : s + group].max()))
    return torch.cat([s + torch.argsort(diagonal[s : s + group], descending=True, stable=True) for s in first])
