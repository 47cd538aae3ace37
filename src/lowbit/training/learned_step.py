"""Gradients of rounding to a grid: of the value, of its step, of the minimum and of learned levels.

For y = s (Q(v) - z), v = x / s + z, with Q the nearest level of the grid and [lo, hi] its ends (LSQ, Esser et al. 2020,
equations 3 and 5, for any grid; LSQ+, Bhalgat et al. 2020, for the minimum of y = s Q((x - m) / s) + m):

    dy/dx = 1                   inside, lo <= v <= hi; 0 outside
    dy/ds = Q(v) - v            inside;  Q(v) - z outside
    dy/dm = 0                   inside;  1 outside
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lowbit.formats import Format, QTensor
from lowbit.formats.blocks import Block, as_matrices, map_blocks, reduce_blocks
from lowbit.formats.nearest import inverse


def highest(fmt: Format) -> float:
    """Q_p of the papers: the magnitude of the grid's farther end; 1 for learned levels that come with a scale."""
    return max(abs(fmt.grid.lo), abs(fmt.grid.hi))


def unit(fmt: Format) -> float:
    """The power of two nearest to 1 / Q_p. A step is learned as its multiple, which is about the end of the range, so that
    one learning rate suits weights and steps at any number of bits; a power of two rounds nothing."""
    return 2.0 ** -round(math.log2(highest(fmt)))


def block_sizes(block: Block, shape: tuple[int, ...]) -> Tensor | float:
    """How many elements share a step: a number where all blocks have as many, else float32 [1, row blocks, column blocks]."""
    _, rows, cols = as_matrices(shape)
    by_row, by_col = (_lengths(size, each) for size, each in ((rows, block.rows), (cols, block.cols)))
    if len({*by_row}) == 1 and len({*by_col}) == 1:
        return float(by_row[0] * by_col[0])
    return torch.outer(torch.tensor(by_row), torch.tensor(by_col)).to(torch.float32)[None]


def _lengths(size: int, block: int) -> list[int]:
    block = size if block == -1 else min(block, size)
    return [min(block, size - start) for start in range(0, size, max(1, block))]


def gain(sizes: Tensor | float, fmt: Format) -> Tensor | float:
    """LSQ's gradient scale 1 / sqrt(N Q_p) of each block, which LSQ+ takes for minima too."""
    found: Tensor | float = (sizes * highest(fmt)) ** -0.5
    return found


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, by: float, gain: Tensor | float) -> Tensor:
        ctx.gain = gain
        return x * by

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] * ctx.gain, None, None


def scaled(x: Tensor, by: float, gain: Tensor | float) -> Tensor:
    """`by` x, with `gain` times the gradient of the result as the gradient of x."""
    result: Tensor = _Scaled.apply(x, by, gain)
    return result


def step_of(end: Tensor, fmt: Format, gains: Tensor | float) -> Tensor:
    """The step of each block, u `end`. The gradient of `end` is g dL/ds (Esser et al. 2020, section 2.2), with g of `gains`.

    With this g the gradient of a step is about as large as those of its weights, so that it does not rule the norm by which
    gradients are clipped. Adam, which scales gradients, moves `end` as fast as weights; plain gradient descent moves the step u
    times as fast as in the paper, whose parameter is the step itself.
    """
    return scaled(end, unit(fmt), gains)


def residual(
    x: Tensor, fmt: Format, scale: Tensor, offset: Tensor | None, levels: Tensor | None = None, *, minimum: bool | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dy/ds (float32) and whether it is inside (bool), both of the shape of `x`.

    Scale and offset float32 per block [batch, row blocks, column blocks]. `minimum`: whether the offset is a minimum, and not in
    level units; None: as `fmt` stores it. `levels` float32, of the shape of `x`: the level of each element, where levels are learned.
    """
    if minimum is None:
        minimum = fmt.offset_kind == "min"
    lo, hi = fmt.grid.lo, fmt.grid.hi

    def position(block: Tensor, s: Tensor, o: Tensor | None) -> Tensor:
        if minimum and o is not None:
            block = block - o[:, None]
        return block * inverse(s)[:, None]

    def levelled(v: Tensor, s: Tensor, o: Tensor | None) -> Tensor:
        return v if o is None or minimum else v + o[:, None]

    def within(block: Tensor, s: Tensor, o: Tensor | None) -> Tensor:
        v = levelled(position(block, s, o), s, o)
        return (v >= lo) & (v <= hi)

    def change(block: Tensor, s: Tensor, o: Tensor | None) -> Tensor:
        v = position(block, s, o)
        at = levelled(v, s, o)
        level = fmt.grid.round(at.clone())
        if o is not None and not minimum:
            level = level - o[:, None]
        return level - torch.where((at >= lo) & (at <= hi), v, 0.0)

    if levels is None:
        inside = map_blocks(within, fmt.block, x, scale, offset, dtype=torch.bool)
        return map_blocks(change, fmt.block, x, scale, offset, dtype=torch.float32), inside
    lo, hi = float(levels.min()), float(levels.max())
    v = map_blocks(position, fmt.block, x, scale, None, dtype=torch.float32)
    inside = (v >= lo) & (v <= hi)
    return levels - torch.where(inside, v, 0.0), inside


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, q: QTensor, scale: Tensor | None, minimum: Tensor | None, levels: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x)
        # Of a codebook the codes are kept, packed; those of a grid are found again.
        ctx.q = None if q.levels is None else q
        ctx.stored = q.format, q.scales(), q.offsets()
        return q.dequantize(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        fmt, scale, offset = ctx.stored
        grad = gradients[0].to(torch.float32)
        if scale is None:
            return gradients[0], None, None, None, _by_code(grad, ctx.q) if ctx.needs_input_grad[4] else None
        level = None if ctx.q is None else _levels(ctx.q)
        change, inside = residual(x.detach().to(torch.float32), fmt, scale, offset, level)
        of_scale = of_minimum = of_levels = None
        if ctx.needs_input_grad[2]:
            (of_scale,) = reduce_blocks(lambda g, r: (g * r).sum(1), fmt.block, grad, change)
        if ctx.needs_input_grad[3]:
            (of_minimum,) = reduce_blocks(lambda g: g.sum(1), fmt.block, grad.masked_fill(inside, 0))
        if ctx.needs_input_grad[4]:
            spread = map_blocks(lambda g, s: g * s[:, None], fmt.block, grad, scale, dtype=torch.float32)
            of_levels = _by_code(spread, ctx.q)
        return gradients[0] * inside, None, of_scale, of_minimum, of_levels


def rounded(
    x: Tensor, q: QTensor, scale: Tensor | None = None, minimum: Tensor | None = None, levels: Tensor | None = None
) -> Tensor:
    """`q.dequantize()` in the type of x [..., rows, columns], which it was rounded from, with the gradients above.

    `scale`, `minimum`, `levels`: the values that `q` has stored of them, as functions of what is learned; None: not
    learned. Kept for the backward pass is x, which is the weight itself; codes are found again.
    """
    result: Tensor = _Rounded.apply(x, q, scale, minimum, levels)
    return result


def _levels(q: QTensor) -> Tensor:
    """float32, of the shape of `q`: the learned level of each element."""
    assert q.format.codebook is not None
    return map_blocks(
        lambda c, v: v.gather(1, c.long()), q.format.codebook, q.unpacked(), q.codebooks(), dtype=torch.float32
    )


def _by_code(grad: Tensor, q: QTensor) -> Tensor:
    """The gradient of each level: the sum over the weights that have it (Han et al. 2016, Deep Compression, section 3.3)."""
    fmt = q.format
    assert fmt.codebook is not None

    def sums(g: Tensor, c: Tensor) -> Tensor:
        return g.new_zeros(len(g), fmt.grid.cardinality).scatter_add_(1, c.long(), g)

    (found,) = reduce_blocks(sums, fmt.codebook, grad, q.unpacked())
    assert found is not None
    return found
