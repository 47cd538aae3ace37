"""gptaq: GPTQ that also makes up for what earlier layers did to the inputs."""

from __future__ import annotations

from torch import Tensor

from lowbit.formats import Format
from lowbit.solvers.feedback import Problem, solve_with_feedback
from lowbit.solvers.found import Found
from lowbit.solvers.hessian import Factor
from lowbit.solvers.registry import Call, solver
from lowbit.solvers.stats import Stats


@solver(needs="drift")
def gptaq(
    weight: Tensor, fmt: Format, fit: Call, stats: Stats, *, alpha: float = 0.25, damp: float = 0.01, order: int = 1
) -> Found:
    """Round a weight by columns as GPTQ does, and also make up for what earlier layers have changed in its inputs.

        W[:, i:] -= e U[i, i:] - w_i P[i, i:],   P = alpha triu(E[(x_f - x) x'] U', 1) U

    x the inputs behind quantized layers, x_f the float model's; U the upper Cholesky factor of inv(E[x x']). `alpha`: how
    much of the correction is taken; other options as in gptq. No polish: it would pull towards the uncorrected
    weights. Source: Li et al. 2025 (GPTAQ), equation 15 and Algorithm 1.
    """

    def shift(factor: Factor, moments: Stats) -> Tensor:
        assert moments.drift is not None
        change = moments.drift[factor.perm][:, factor.perm]
        return alpha * (change @ factor.upper.T).triu(1) @ factor.upper

    use = None if stats.drift is None else shift
    return solve_with_feedback(Problem(weight, fmt, fit, stats, damp, order), polish=0, shift=use)
