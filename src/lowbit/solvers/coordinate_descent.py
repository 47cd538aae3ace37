"""Error feedback, column by column: the loop that GPTQ and its descendants share, and the polish after it."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.solvers.rounding import Rounder

BLOCK = 128  # columns that are updated one by one; all other columns see them all at once


def feed_errors(weight: Tensor, upper: Tensor, rounder: Rounder, shift: Tensor | None = None) -> Tensor:
    """Round columns in order, each time moving what is left so that it makes up for the error.

        q_i = Q(w_i);   e = (w_i - q_i) / U_ii;   W[:, i+1:] -= e U[i, i+1:]  (+ w_i P[i, i+1:])

    `weight` [N, K] and `upper` U [K, K] in the same order of columns; `shift` P [K, K], strictly upper triangular, is
    the correction of GPTAQ. Returns the rounded values [N, K]. Lazy blocks: Frantar et al. 2022 (GPTQ), section 3.3,
    step 2 and Algorithm 1; P: Li et al. 2025 (GPTAQ), Algorithm 1.
    """
    count = weight.shape[1]
    w = weight.T.contiguous()  # by columns
    out = torch.empty_like(w)
    for begin in range(0, count, BLOCK):
        end = min(begin + BLOCK, count)
        inner = w[begin:end]
        errors, u = torch.empty_like(inner), upper[begin:end, begin:end]
        scaled = 1 / u.diagonal()
        for i in range(end - begin):
            now = inner[i]
            q = rounder.value(begin + i, now)
            errors[i] = (now - q) * scaled[i]
            out[begin + i] = q
            if i + 1 < end - begin:
                inner[i + 1 :].addr_(u[i, i + 1 :], errors[i], alpha=-1)
                if shift is not None:
                    inner[i + 1 :].addr_(shift[begin + i, begin + i + 1 : end], now)
        if end < count:
            w[end:].addmm_(upper[begin:end, end:].T, errors, alpha=-1)
            if shift is not None:
                w[end:].addmm_(shift[begin:end, end:].T, inner)
    return out.T


def coordinate_descent(values: Tensor, target: Tensor, hessian: Tensor, rounder: Rounder) -> tuple[Tensor, Tensor]:
    """One sweep of exact coordinate descent on tr((Q - W) H (Q - W)') over the levels of each weight.

        R = (Q - W) H;   q_k <- Q(q_k - R_k / H_kk);   R += (change of q_k) H[k, :]

    Every step can only lower the error. All [N, K], in the order of columns that `rounder` and `hessian` have. Returns Q
    and the error of each row, float64 [N], of which R is the larger part.
    Source: Kim et al. 2025 (GuidedQuant), section 4, LNQ's coordinate descent; here in lazy blocks.
    """
    q = values.T.contiguous()
    residual = hessian @ (values - target).T  # [K, N]
    for begin in range(0, len(q), BLOCK):
        end = min(begin + BLOCK, len(q))
        inner, h = residual[begin:end], hessian[begin:end, begin:end]
        changes = torch.empty_like(inner)
        step = 1 / h.diagonal()
        for i in range(end - begin):
            old = q[begin + i]
            new = rounder.value(begin + i, torch.addcmul(old, inner[i], step[i], value=-1))
            changes[i] = new - old
            q[begin + i] = new
            inner.addr_(h[i], changes[i])
        residual[:begin].addmm_(hessian[:begin, begin:end], changes)
        residual[end:].addmm_(hessian[end:, begin:end], changes)
    found = q.T
    return found, residual.T.mul(found - target).sum(1, dtype=torch.float64)
