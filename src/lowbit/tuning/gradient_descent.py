"""Descent with few steps: Adam or signs, a schedule of rates, and the best of what was seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def warm_cosine(step: int, steps: int) -> float:
    """The share of the learning rate at `step` of `steps`: linear up to 1 in a tenth of them (20 at most), then a cosine
    down to 1/20."""
    warm = max(1, min(20, -(-steps // 10)))
    up = min(1.0, (step + 1) / warm)
    down = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))
    return up * down


def linear(step: int, steps: int) -> float:
    """From 1 down to 1/steps in equal steps."""
    return 1 - step / max(1, steps)


@dataclass(frozen=True)
class Moving:
    """Parameters that move together, their learning rate, and how far from 0 they may go."""

    parameters: Sequence[Tensor]
    rate: float
    bound: float = math.inf


class SignDescent(torch.optim.Optimizer):
    """p <- p - rate sign(gradient): each step is of the same length whatever the loss is (SignRound, Cheng et al. 2023)."""

    def __init__(self, groups: list[dict[str, object]]) -> None:
        super().__init__(groups, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad.sign(), alpha=-group["lr"])


def adam(groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    """Adam (Kingma & Ba 2015) with beta2 = 0.99, as the steps are few."""
    return torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-12)


def descend(
    moving: Sequence[Moving], loss_at: Callable[[int], Tensor], steps: int, *, score: Callable[[], float], checks: int = 3,
    optimizer: Callable[[list[dict[str, object]]], torch.optim.Optimizer] = adam,
    schedule: Callable[[int, int], float] = warm_cosine,
) -> tuple[float, float, int]:  # fmt: skip
    """Move parameters (all starting at 0) against the gradient of `loss_at(step)`; leave them at the best `score`.

    The score is taken at the start, `checks` times on the way at equal distances, and at the end; the least wins, the
    earlier one of equals. A loss or score that is not finite ends the descent. Returns (first score, best score, the
    step of the best).
    """
    moving = [m for m in moving if m.parameters]
    parameters = [p for m in moving for p in m.parameters]
    start = best = score()
    best_step, kept = 0, [p.detach().clone() for p in parameters]
    if not parameters:
        return start, start, 0
    method = optimizer([{"params": list(m.parameters), "lr": m.rate} for m in moving])
    marks = {round(steps * (i + 1) / (checks + 1)) for i in range(checks + 1)}
    for step in range(steps):
        for group, m in zip(method.param_groups, moving):
            group["lr"] = m.rate * schedule(step, steps)
        loss = loss_at(step)
        if not math.isfinite(float(loss.detach())):
            break
        loss.backward()
        method.step()
        method.zero_grad(set_to_none=True)
        _bound(moving)
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


@torch.no_grad()
def _bound(moving: Sequence[Moving]) -> None:
    for m in moving:
        if math.isfinite(m.bound):
            for p in m.parameters:
                p.clamp_(-m.bound, m.bound)
