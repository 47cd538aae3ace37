"""The straight-through estimator: a rounded value forwards, the gradient of the value that was rounded backwards.

Source: Bengio, Léonard and Courville 2013, "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional
Computation", section 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.formats import Format


def straight_through(x: Tensor, rounded: Tensor, inside: Tensor | None = None) -> Tensor:
    """`rounded`, of the shape and type of `x`, which gets its gradient as if nothing were rounded; 0 where `inside` (bool,
    of the same shape) is false."""
    result: Tensor = _StraightThrough.apply(x, rounded.detach(), inside)
    return result


def round_to_grid(x: Tensor, fmt: Format) -> Tensor:
    """The level of the grid nearest to each `x` (level units), straight through; out of range the level cannot follow, so
    nothing pulls there."""
    with torch.no_grad():
        rounded, inside = fmt.grid.round(x), (x >= fmt.grid.lo - 0.5) & (x <= fmt.grid.hi + 0.5)
    return straight_through(x, rounded, inside)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor, inside: Tensor | None) -> Tensor:
        ctx.save_for_backward(inside)
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return gradients[0] if inside is None else gradients[0] * inside, None, None
