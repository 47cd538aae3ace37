"""What traces of fits have in common: the first block, and what the fit gains over the plain range."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor

from lowbit.report.at_work.case import Case
from lowbit.report.at_work.trace import OF_WEIGHTS, Outcome
from lowbit.solvers import Call

EXAMPLE = "[-0.28, -0.28, 0.09, -0.39, 0.16, 0.39, 0.74, 0.17]"


def first_block(case: Case) -> tuple[Tensor, Tensor | None]:
    """Values [1, size] of the block of row 0 and column 0, and what an error of each counts, [1, size] or None."""
    rows, cols = (
        size if b == -1 else b for b, size in zip((case.format.block.rows, case.format.block.cols), case.weight.shape)
    )
    block = case.weight[:rows, :cols].reshape(1, -1)
    if case.known is None:
        return block, None
    return block, case.known.importance.expand(case.weight.shape)[:rows, :cols].reshape(1, -1)


def kept_errors(
    case: Case,
    plain: str,
    call: Call,
    measure: str = OF_WEIGHTS,
    cost: Callable[[Tensor], Tensor] | None = None,
    note: str = "",
) -> Outcome:
    """The error of the weights with the range-based fit `plain` and with this one, as the fit counts it: `cost` of the
    differences [N, K], squares times what is known of the inputs unless given; summed over all. `note`: what else is to be said of the plain one."""
    if cost is None:
        cost = partial(_squares, case)
    fmt, errors = case.format, []
    for name, fit in ((f"{plain}: the whole range{note}", Call(plain)), (str(call), call)):
        case_of = replace(case, recipe=replace(case.recipe, fit=fit, solver=None))
        q = case_of.recipe.solver_for(fmt)(case.weight, fmt, fit, case.known)
        errors.append((name, float(cost((q.dequantize() - case.weight).double()).sum())))
    return Outcome.of(q.unpacked(), q.dequantize(), errors, measure)


def _squares(case: Case, off: Tensor) -> Tensor:
    return off.square() if case.known is None else off.square() * case.known.importance
