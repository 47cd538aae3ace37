"""Operators of packed weights that `torch.compile` puts into its graphs as they are, whatever kernel is chosen.

A packed weight is no tensor, and a graph takes nothing else. So each weight has a number, an int64 tensor without
dimensions: a graph that is shared by many layers takes it as an input, where a Python number would be compiled in.
Without a compiler these operators are not used, because calling them takes longer than a small product.
"""

from __future__ import annotations

import itertools
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Weight(Protocol):
    """What the operators ask of a `PackedWeight`."""

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor: ...
    def rows(self, index: Tensor) -> Tensor: ...
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor: ...


_numbers = itertools.count()
_weights: WeakValueDictionary[int, Any] = WeakValueDictionary()


def register(weight: Weight) -> Tensor:
    """The number of a weight, for as long as it lives: int64 []."""
    number = next(_numbers)
    _weights[number] = weight
    return torch.tensor(number, dtype=torch.int64, device="cpu")


def _find(number: Tensor) -> Any:
    weight = _weights.get(int(number))
    if weight is None:
        raise RuntimeError(f"packed weight {int(number)} is gone: the model of this compiled graph was deleted")
    return weight


@torch.library.custom_op("lowbit::packed_linear", mutates_args=())
def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """x [..., in] -> x W^T + bias [..., rows]; weight: its number."""
    with torch.no_grad():
        return _find(weight).linear(x, bias)


@packed_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.custom_op("lowbit::packed_linear_backward", mutates_args=())
def packed_linear_backward(grad: Tensor, weight: Tensor, cols: int) -> Tensor:
    """The gradient of x [..., cols], of the gradient of the result [..., rows]."""
    found = _find(weight)
    dense = found.dequantize(grad.dtype)
    return grad @ (dense.transpose(-1, -2) if found.transposed else dense)


@packed_linear_backward.register_fake
def _(grad: Tensor, weight: Tensor, cols: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], cols))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.weight, bias, _ = inputs
    ctx.cols, ctx.biased = x.shape[-1], bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    for_x = packed_linear_backward(grad, ctx.weight, ctx.cols) if ctx.needs_input_grad[0] else None
    for_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.biased and ctx.needs_input_grad[2] else None
    return for_x, None, for_bias, None


packed_linear.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("lowbit::packed_rows", mutates_args=())
def packed_rows(index: Tensor, weight: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    """W[index] of `dtype`, [*index, *shape]."""
    return _find(weight).rows(index).contiguous()


@packed_rows.register_fake
def _(index: Tensor, weight: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    return index.new_empty((*index.shape, *shape), dtype=dtype)


@torch.library.custom_op("lowbit::packed_dense", mutates_args=())
def packed_dense(weight: Tensor, like: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    """W of `shape` and `dtype`; `like`: any tensor of its device."""
    return _find(weight).dequantize(dtype).contiguous()


@packed_dense.register_fake
def _(weight: Tensor, like: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    return like.new_empty(shape, dtype=dtype)
