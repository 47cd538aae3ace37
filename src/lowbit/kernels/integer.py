"""A readable integer matrix product: multiply codes, correct for the zero-points, scale at the end.

Quantization makes sense of speed only if the product is taken on the small integers themselves. With
a = s_a (q_a - z_a) and b = s_b (q_b - z_b), K the length of the sum,

    sum_k a b = s_a s_b (sum q_a q_b  -  z_b sum q_a  -  z_a sum q_b  +  K z_a z_b)

so that only the first sum runs over both operands; the others are sums of one of them, or no sum at all.

What changes with finer granularity ("Quantization in Large Language Models", extra stuff):

- One scale and zero-point per *row* of W (output channel) or of x (token): nothing but shapes. Every element of
  the result still belongs to one row of each, so s_a becomes a column vector and s_b a row vector, outside the
  sum. The result improves because each row uses its whole range; the integer work is the same.
- Per *group* of columns: the scale changes along k, so the sum is cut at the borders of the groups of
  either operand. Each part has its own correction and its own scales, and the parts are added as floats.
- Per *column* of W (input channel): groups of one. s_b(k) stands inside the sum and nothing integer is left of
  it: this is why weights are scaled along rows and groups, and why SmoothQuant moves column scales into x first.

The sum of integers must not wrap. An int8 accumulator does at once (the document shows it); an int32 one holds
K products of 8-bit codes up to K = 33025, and longer sums are cut here as if another group began.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.formats import CodebookGrid, QTensor

_INT32_MAX = 2**31 - 1


def integer_matmul(a: QTensor, b: QTensor) -> Tensor:
    """a @ b.T in integer arithmetic: float32 [M, N] for `a` [M, K] and `b` [N, K].

    `a` holds activations (one token a row) and `b` a weight as `nn.Linear` stores it, so that this is
    `F.linear`; the product `W @ x` of a matrix and a vector is `integer_matmul(x, W)`. A 1-D operand is one row,
    and its dimension is left out of the result. Grids with integer levels only (int, uint, ternary, binary, iq4nl),
    any block, with no offset, a rounded or unrounded zero-point or a float minimum. Products are summed in
    int32, exactly; corrections and scales are applied in float64. FormatError for operands that do not fit.

    >>> x, w = (lowbit.quantize_tensor(torch.randn(rows, 64), "absmax@int8:channel") for rows in (2, 8))
    >>> lowbit.integer_matmul(x, w).shape
    torch.Size([2, 8])
    """
    k = _check(a, b)
    codes_a, codes_b = _codes(a), _codes(b)
    out = torch.zeros(codes_a.shape[0], codes_b.shape[0], dtype=torch.float64, device=codes_a.device)
    for start, stop in pairwise(_borders(a, b, k)):
        q_a, q_b = codes_a[:, start:stop], codes_b[:, start:stop]
        (s_a, m_a), (s_b, m_b) = _scale_and_minimum(a, start), _scale_and_minimum(b, start)
        # With m = -s z the formula above reads, multiplied out (and holds where a scale is 0 and z is not defined):
        both = _product(q_a, q_b).double()  # sum q_a q_b
        sum_a = q_a.sum(1, dtype=torch.int64).double()[:, None]  # sum q_a, [M, 1]
        sum_b = q_b.sum(1, dtype=torch.int64).double()[None, :]  # sum q_b, [1, N]
        s_b, m_b = s_b.T, m_b.T
        out += s_a * s_b * both + s_a * m_b * sum_a + m_a * s_b * sum_b + (stop - start) * m_a * m_b
    shape = (*a.shape[:-1], *b.shape[:-1])
    return out.to(torch.float32).view(shape)


def _check(a: QTensor, b: QTensor) -> int:
    for q in (a, b):
        grid = q.format.grid
        if isinstance(grid, CodebookGrid) or not bool((grid.levels == grid.levels.round()).all()):
            raise FormatError(f"an integer product needs integer levels; {grid} has others, so dequantize() it first")
        if len(q.shape) not in (1, 2):
            raise FormatError(f"an integer product takes vectors and matrices, not a tensor of shape {q.shape}")
    if a.shape[-1] != b.shape[-1]:
        raise FormatError(f"{a.shape} and {b.shape} do not multiply: the last dimensions must be equal (a @ b.T)")
    return a.shape[-1]


def _codes(q: QTensor) -> Tensor:
    """The integer levels, int32 [rows, K]."""
    return torch.atleast_2d(q.format.grid.decode(q.unpacked()).to(torch.int32))


def _borders(a: QTensor, b: QTensor, k: int) -> list[int]:
    """Where along k a scale of either operand changes, or int32 could overflow; with both ends."""
    largest = [max(abs(q.format.grid.lo), abs(q.format.grid.hi)) for q in (a, b)]
    widths = [q.format.block.cols for q in (a, b)] + [int(_INT32_MAX // (largest[0] * largest[1]))]
    inner = {at for width in widths if width != -1 for at in range(0, k, width)}
    return sorted(inner | {0, k})


def _scale_and_minimum(q: QTensor, column: int) -> tuple[Tensor, Tensor]:
    """Scale s and minimum m = -s z of each row, for the group that `column` lies in: float64 [rows, 1] each."""
    block, rows = q.format.block, q.shape[0] if len(q.shape) == 2 else 1
    group = 0 if block.cols == -1 else column // block.cols
    row = torch.arange(rows, device=q.codes.device)
    row = torch.zeros_like(row) if block.rows == -1 else row // block.rows

    def pick(per_block: Tensor) -> Tensor:
        return per_block[0, row, group].double()[:, None]

    scale = pick(q.scales())  # type: ignore[arg-type]
    offset = q.offsets()
    if offset is None:
        return scale, torch.zeros_like(scale)
    return scale, pick(offset) if q.format.offset_kind == "min" else -scale * pick(offset)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T of int32 matrices, summed in int32; torch has no such product on CUDA, where float64 is as exact."""
    if a.device.type == "cpu":
        return a @ b.T
    return (a.double() @ b.double().T).to(torch.int32)
