"""w = scale * (level - offset), with gradients; what `QTensor.dequantize` computes, bit for bit.

Forward and backward work on blocks in chunks that stay in the cache. Only codes and per-block values are kept for the
backward pass, so that it needs no second copy of the weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.formats import Format
from lowbit.formats.blocks import map_blocks, reduce_blocks


def expand(levels: Tensor, scale: Tensor, offset: Tensor | None, fmt: Format, dtype: torch.dtype) -> Tensor:
    """The weight [..., N, K] of type `dtype`.

    `levels` are codes (uint8; they get no gradient) or levels themselves (float32), of the weight's shape. `scale` and
    `offset` float32 [batch, row blocks, column blocks]; the offset is a zero-point or a minimum, as `fmt` says.
    """
    result: Tensor = _Expand.apply(levels, scale, offset, fmt, dtype)
    return result


def look_up(codes: Tensor, levels: Tensor, fmt: Format) -> Tensor:
    """float32 levels of `codes` (uint8) in the learned codebooks `levels` [batch, nR, nC, cardinality] of `fmt`."""
    result: Tensor = _LookUp.apply(codes, levels, fmt)
    return result


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, levels: Tensor, scale: Tensor, offset: Tensor | None, fmt: Format, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(levels, scale, offset)
        ctx.format = fmt

        def value(block: Tensor, s: Tensor, o: Tensor | None) -> Tensor:
            level = fmt.grid.decode(block) if block.dtype is torch.uint8 else block
            if o is None:
                return level * s[:, None]
            if fmt.offset_kind == "min":
                return level * s[:, None] + o[:, None]
            return (level - o[:, None]) * s[:, None]

        return map_blocks(value, fmt.block, levels, scale, offset, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        levels, scale, offset = ctx.saved_tensors
        fmt: Format = ctx.format

        def sums(grad: Tensor, block: Tensor) -> tuple[Tensor, Tensor | None]:
            level = fmt.grid.decode(block) if block.dtype is torch.uint8 else block
            return (grad * level).sum(1), None if offset is None else grad.sum(1)

        by_level, plain = reduce_blocks(sums, fmt.block, g, levels)
        of_scale, of_offset = by_level, None
        if offset is not None:
            assert by_level is not None and plain is not None
            minimum = fmt.offset_kind == "min"
            of_scale = by_level if minimum else by_level - offset * plain
            of_offset = plain if minimum else -scale * plain
        of_levels = None
        if ctx.needs_input_grad[0]:
            of_levels = map_blocks(lambda b, s: b * s[:, None], fmt.block, g, scale, dtype=torch.float32)
        return of_levels, of_scale, of_offset, None, None


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, codes: Tensor, levels: Tensor, fmt: Format) -> Tensor:
        assert fmt.codebook is not None
        ctx.save_for_backward(codes)
        ctx.block, ctx.count = fmt.codebook, levels.shape[-1]
        return map_blocks(lambda c, v: v.gather(1, c.long()), fmt.codebook, codes, levels, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (codes,) = ctx.saved_tensors

        def sums(grad: Tensor, code: Tensor) -> Tensor:
            return grad.new_zeros(len(grad), ctx.count).scatter_add_(1, code.long(), grad)

        (found,) = reduce_blocks(sums, ctx.block, gradients[0], codes)
        return None, found, None
