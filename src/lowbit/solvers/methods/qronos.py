"""qronos: first correct the weights for the inputs that the quantized model sees, then round with error feedback."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import RecipeError
from lowbit.formats import Format
from lowbit.solvers.feedback import Problem, solve_with_feedback
from lowbit.solvers.found import Found
from lowbit.solvers.registry import Call, solver
from lowbit.solvers.stats import Stats


@solver(needs="drift")
def qronos(
    weight: Tensor, fmt: Format, fit: Call, stats: Stats, *, blend: float = 0.75, ridge: float = 0.2,
    damp: float = 0.05, order: int = 1, polish: int = 2,
) -> Found:  # fmt: skip
    """Correct a weight for what earlier layers have lost, and then round it one column after another as GPTQ does.

    Looks for the codes Q with the least E|x_f W' - x Q'|^2: x the inputs behind quantized layers, x_f the float model's own.
    The minimum over real Q is W' = W (G + r I) (H + r I)^-1, H = E[x x'], G = E[x_f x'], and the rest of the error
    is tr((W' - Q) H (W' - Q)'): a ridge solve, then GPTQ from W'. With little text G H^-1 fits the text as well as the
    model, so `blend` goes only part of the way, W + blend (W' - W); `ridge`: r as a share of mean(diag H). `damp` is larger
    than that of gptq for the same reason. Other options as there. Source: Zhang et al. 2025 (Qronos), equations 3 to 6, whose first column is exactly this target.
    """
    if not 0 <= blend <= 1:
        raise RecipeError(f"qronos(blend={blend}): a share from 0 (gptq) to 1 (the whole correction)")
    target = weight if stats.drift is None else corrected(weight, stats, blend, ridge)
    return solve_with_feedback(Problem(weight, fmt, fit, stats, damp, order), polish=polish, target=target)


def corrected(weight: Tensor, stats: Stats, blend: float, ridge: float) -> Tensor:
    """W + blend W (G - H) (H + r I)^-1, float32 [N, K], solved in float64: W' less W is W (G - H) (H + r I)^-1."""
    assert stats.drift is not None
    hessian = stats.second_moment.double()
    hessian.diagonal().add_(max(ridge * float(hessian.diagonal().mean()), 1e-30))
    factor = torch.linalg.cholesky(hessian)
    del hessian
    if len(weight) > len(factor):  # (G - H) (H + r I)^-1 has fewer rows to solve for than W (G - H)
        change = weight @ torch.cholesky_solve(stats.drift.double().T, factor).T.float()
    else:
        change = torch.cholesky_solve((weight @ stats.drift).double().T, factor).T
    return (weight.double() + blend * change).float()
