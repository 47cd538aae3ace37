"""gptq: round column by column, and let the columns that follow make up for each error."""

from __future__ import annotations

from torch import Tensor

from lowbit.formats import Format
from lowbit.solvers.feedback import Problem, solve_with_feedback
from lowbit.solvers.found import Found
from lowbit.solvers.registry import Call, solver
from lowbit.solvers.stats import Stats


@solver(needs="second_moment")
def gptq(
    weight: Tensor, fmt: Format, fit: Call, stats: Stats, *, damp: float = 0.01, order: int = 1, polish: int = 2
) -> Found:
    """Round a weight one column after another, and let the columns that follow make up for each error.

    Looks, column by column, for the codes with the least tr((W - Q) H (W - Q)'), H = E[x x'], which is the squared error
    of the layer's output on the text. `weight` float32 [N, K]. Scales come first, from the fit weighted by diag H, and stay where they are in the row,
    so that any order of columns costs nothing at run time. `order`: 1 by decreasing E[x_k^2] (activation order),
    2 the same inside groups and among groups (group-aware order), 0 as they stand. `damp`: share of mean(diag H)
    added to it; grows by itself where the factorization fails. `polish`: how often, afterwards, all
    scales are refitted together and each code is chosen once more while the others stay (coordinate descent); a row keeps a round only where
    it lowers its error. No row's error is above that of round-to-nearest.

    Source: Frantar et al. 2022, "GPTQ", Algorithm 1; static groups and activation order: its reference
    implementation; group-aware order: Gafni et al. 2025.
    """
    return solve_with_feedback(Problem(weight, fmt, fit, stats, damp, order), polish=polish)
