"""Integer weights as serving programs store them: unsigned codes, unsigned zero-points, one scale a row or group.

    w[o, i] = scale[o, g] * (code[o, i] - zero[o, g])        g the group of column i

A symmetric grid of b bits has the zero-point 2^(b-1) everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.formats import Format, QTensor
from lowbit.formats.grids import IntGrid

GROUPS = (128, 64, 32)  # what the fast kernels of vLLM know, besides a whole row


@dataclass(frozen=True)
class Integers:
    """codes uint8 [out, in], zeros uint8 [out, groups], scales float32 [out, groups]."""

    codes: Tensor
    zeros: Tensor
    scales: Tensor

    @staticmethod
    def of(q: QTensor) -> Integers:
        """The integers of a matrix that `why_not_integers` and `undivided` have nothing against."""
        fmt, rows = q.format, q.shape[0]
        grid, shift = _grid(fmt), _shift(fmt)
        codes = (grid.decode(q.unpacked()) + shift).to(torch.uint8)
        scales = by_rows(q.scales(), rows)
        offsets = q.offsets()
        zeros = scales.new_zeros(scales.shape) if offsets is None else by_rows(offsets, rows)
        return Integers(codes, (zeros + shift).to(torch.uint8), scales)


def by_rows(values: Tensor | None, rows: int) -> Tensor:
    """Values of blocks [1, row blocks, groups], row blocks 1 or `rows`, as [rows, groups]."""
    assert values is not None  # every integer grid has a scale
    return values[0].expand(rows, -1).contiguous()


def why_not_integers(fmt: Format) -> str | None:
    """Why weights of a format are no such integers; None where they are."""
    if not isinstance(fmt.grid, IntGrid):
        return "its levels are no consecutive integers"
    if fmt.offset is not None and fmt.offset.store != "grid":
        return "its zero-points are no integers of the same width"
    if fmt.block.rows not in (1, -1) or (fmt.block.rows == -1 and fmt.block.cols != -1):
        return f"its scales are for blocks of {fmt.block}, not for rows or groups of a row"
    return None


def undivided(fmt: Format, width: int) -> str | None:
    """Why the groups of a format are not for a weight of `width` inputs, or None."""
    if fmt.block.cols != -1 and width % fmt.block.cols:
        return f"groups of {fmt.block.cols} do not divide its {width} inputs"
    return None


def is_symmetric(fmt: Format) -> bool:
    """Whether zero is in the middle of the levels, so that no zero-point is stored."""
    return fmt.offset is None and fmt.grid.signed


def group_size(fmt: Format) -> int:
    """Inputs that share a scale; -1 for the whole row."""
    return fmt.block.cols


def group_count(fmt: Format, width: int) -> int:
    """Scales of a row."""
    return 1 if fmt.block.cols == -1 else width // fmt.block.cols


def nearest_block(fmt: Format, width: int) -> str:
    """The block that kernels know and `width` allows: the largest not wider than the format's own, else the smallest."""
    if -1 in (fmt.block.cols, fmt.block.rows) and fmt.block.rows != 1:
        return "channel"
    fitting = [size for size in GROUPS if width % size == 0]
    if fmt.block.cols == -1 or not fitting:
        return "channel"
    return f"g{next((size for size in fitting if size <= fmt.block.cols), fitting[-1])}"


def nearest_integers(fmt: Format, width: int, asymmetric: bool = True) -> str:
    """The text of the nearest integer format of 4 or 8 bits; with a zero-point only at 4 bits and where allowed."""
    bits = 4 if fmt.grid.bits <= 4 else 8
    block = nearest_block(fmt, width)
    if fmt.offset is not None and bits == 4 and asymmetric:
        return f"uint4:{block}:asym"
    return f"int{bits}:{block}"


def _grid(fmt: Format) -> IntGrid:
    assert isinstance(fmt.grid, IntGrid)
    return fmt.grid


def _shift(fmt: Format) -> int:
    """From a level to its unsigned code."""
    return 1 << (fmt.grid.bits - 1) if fmt.grid.signed else 0
