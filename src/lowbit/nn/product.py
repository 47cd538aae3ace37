"""The product with a packed weight as autograd sees it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Product(torch.autograd.Function):
    """x W^T by any kernel, with the gradient of x; the dense weight is not kept for it but expanded again.

    Rounding of the inputs passes gradients on as they are (straight-through, Bengio et al. 2013).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any) -> Tensor:
        ctx.weight = weight
        return weight.dispatcher.linear(x, weight.qtensor, None, weight.quantizer())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        dense = ctx.weight.dequantize(grad.dtype)
        return grad @ (dense.transpose(-1, -2) if ctx.weight.transposed else dense), None
