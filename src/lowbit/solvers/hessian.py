"""Second-moment matrices as solvers need them: damped, factorized, and never a crash."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lowbit.solvers.stats import Stats

_MOST_DAMPING = 1e3


@dataclass(frozen=True, eq=False)
class Factor:
    """H + damp mean(diag H) I, factorized in the order `perm` of columns.

    hessian  [K, K] float32, in the original order, damped
    root     [K, K] float32, upper triangular R of the permuted matrix: H_perm = R R'
    damp     the damping that was needed; larger than what was asked for when the factorization failed at first
    """

    hessian: Tensor
    root: Tensor
    perm: Tensor
    damp: float

    @cached_property
    def upper(self) -> Tensor:
        """[K, K] float32: the upper Cholesky factor U of the inverse, inv(H_perm) = U' U, which is inv(R)."""
        eye = torch.eye(len(self.root), dtype=torch.float64)
        return torch.linalg.solve_triangular(self.root.double(), eye, upper=True, out=eye).float()


def factorize(stats: Stats, damp: float, perm: Tensor) -> Factor:
    """Factorize in float64; where that fails, damping grows tenfold until it does not.

    Source: Frantar et al. 2022 (GPTQ), section 3.3, step 3: "Cholesky reformulation". A channel that was always 0
    gets the mean diagonal: its weight then rounds to nearest and nothing is asked of the others for it.
    """
    key = (damp, tuple(perm.tolist()))
    if key not in stats.memory:
        stats.memory.clear()  # the same statistics serve q, k and v, one order at a time
        stats.memory[key] = _factorized(stats.second_moment, damp, perm)
    found: Factor = stats.memory[key]
    return found


def _factorized(moment: Tensor, damp: float, perm: Tensor) -> Factor:
    mean = float(moment.diagonal().double().mean())
    if mean <= 0:  # nothing was ever seen: every order and every error are the same
        moment, mean = torch.eye(len(moment)), 1.0
    while True:
        diagonal = moment.diagonal().double()
        diagonal = torch.where(diagonal > 0, diagonal, mean) + damp * mean
        single = moment.clone()
        single.diagonal().copy_(diagonal)
        backwards = perm.flip(0)
        damped = moment.index_select(0, backwards).index_select(1, backwards).double()
        damped.diagonal().copy_(diagonal[backwards])
        upper, failed = torch.linalg.cholesky_ex(damped, upper=True)
        del damped
        if not int(failed):
            # Backwards H = L L' with L' upper triangular, so forwards H = R R' with R upper triangular.
            root = upper.T.float().flip(0, 1).contiguous()
            if bool((1 / root.diagonal()).isfinite().all()) and bool(root.isfinite().all()):
                return Factor(single, root, perm, damp)
        damp = max(1e-6, damp) * 10
        if damp > _MOST_DAMPING:  # not a second moment at all: no error feedback is the honest answer
            eye = torch.eye(len(moment))
            return Factor(eye, eye, perm, float("inf"))


def quadratic(error: Tensor, hessian: Tensor) -> float:
    """tr(E H E'): the squared error of the layer's output for E [N, K], per token."""
    return float(quadratic_of_rows(error, hessian).sum())


def quadratic_of_rows(error: Tensor, hessian: Tensor) -> Tensor:
    """e H e' for each row e of `error` [N, K], float64 [N]."""
    return ((error @ hessian) * error).sum(1, dtype=torch.float64)
