"""Adam with warm-up and cosine decay, and keeping the best of what was seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def rate_at(step: int, steps: int, warm: int) -> float:
    """The share of the learning rate at `step` of `steps`: linear up to 1 over `warm` steps, a cosine down to 1/20."""
    up = min(1.0, (step + 1) / max(1, warm))
    down = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))
    return up * down


def descend(
    parameters: Sequence[Tensor], loss_at: Callable[[int], Tensor], steps: int, rate: float, *,
    score: Callable[[], float], checks: int,
) -> tuple[float, float, int]:  # fmt: skip
    """Move `parameters` (all starting at 0) against the gradient of `loss_at(step)`; leave them at the best `score`.

    The score is taken at the start, `checks` times on the way at equal distances, and at the end; the least wins, the
    earlier one of equals. A loss or score that is not finite ends the descent. Returns (first score, best score, the
    step of the best).

    Adam (Kingma & Ba 2015) with beta2 = 0.99, as the steps are few. The warm-up takes a tenth of them, 20 at most.
    """
    start = best = score()
    best_step, kept = 0, [p.detach().clone() for p in parameters]
    warm = min(20, -(-steps // 10))
    optimizer = torch.optim.Adam(list(parameters), lr=rate, betas=(0.9, 0.99), eps=1e-12)
    marks = {round(steps * (i + 1) / (checks + 1)) for i in range(checks + 1)}
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_at(step, steps, warm)
        loss = loss_at(step)
        if not math.isfinite(float(loss.detach())):
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step + 1 in marks:
            now = score()
            if not math.isfinite(now):
                break
            if now < best:
                best, best_step, kept = now, step + 1, [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, kept):
            parameter.copy_(value)
    return start, best, best_step
