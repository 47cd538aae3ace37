"""The codes of a weight under another layout of scales: what one program keeps once a row, another keeps once in 32 weights.

A scale is repeated for every smaller block that it covers, so that codes stay as they are. A scale or minimum that the new layout
keeps in float16 is rounded to it; nothing else changes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowbit.errors import ExportError
from lowbit.formats import Format, QTensor, stores
from lowbit.formats.blocks import Block, as_matrices
from lowbit.formats.format import Offset
from lowbit.formats.grids import IntGrid
from lowbit.formats.packing import pack
from lowbit.interchange.exporters.common.exponents import held

# |a - b| / |b| at most: of a scale that `held` lets pass, and where a minimum in float16 stands for a zero-point, which is far from
# the weights themselves where a block is narrow.
OF_SCALES, OF_MINIMA = 2.0**-9, 2.0**-7


def can_be(fmt: Format, to: Format, shape: tuple[int, ...]) -> bool:
    """Whether a weight [..., out, in] of `shape` in the format `fmt` has all of its codes in the format `to`.

    Integer zero-points must also be on the grid of `to`, which only the weight itself shows; `relaid` says where they are not.
    """
    rows, width = as_matrices(shape)[1:]
    if fmt.codebook is not None or to.codebook is not None or not isinstance(to.scale, str):
        return False
    if not (_covers(fmt.block.rows, to.block.rows, rows) and _covers(fmt.block.cols, to.block.cols, width)):
        return False
    if to.scale not in stores.FLOAT_STORES and to.scale != fmt.scale:
        return False
    if not (isinstance(fmt.grid, IntGrid) and isinstance(to.grid, IntGrid)):
        return fmt.grid == to.grid
    if to.offset is None:
        return fmt.offset is None and to.grid.lo <= fmt.grid.lo and fmt.grid.hi <= to.grid.hi
    if fmt.grid.bits > to.grid.bits or (fmt.grid.signed and not to.grid.signed and fmt.grid.bits != to.grid.bits):
        return False
    if to.offset.kind == "min":
        return to.offset.store in stores.FLOAT_STORES
    return to.offset.store == "grid" and (fmt.offset is None or fmt.offset.kind == "zero")


def loses(fmt: Format, to: Format) -> float:
    """How far a weight may be from what it was, |a - b| / |b|, by `relaid`."""
    minimum = to.offset is not None and to.offset.kind == "min"
    return OF_MINIMA if minimum and fmt.offset != to.offset else OF_SCALES


def relaid(q: QTensor, to: Format, name: str) -> QTensor:
    """The weight `name` in the format `to`, which `can_be` has passed. ExportError for a scale or zero-point that `to` cannot keep."""
    fmt, (_, rows, width) = q.format, as_matrices(q.shape)
    assert isinstance(to.scale, str)
    down, along = _sources(fmt.block.rows, to.block.rows, rows), _sources(fmt.block.cols, to.block.cols, width)

    def spread(values: Tensor | None) -> Tensor:
        assert values is not None
        return values[:, down][:, :, along].contiguous()

    scales = spread(q.scales())
    keeps = to.scale == fmt.scale and not fmt.exponent
    kept = spread(_stored(q)) if keeps else held(scales, stores.stored_dtype(to.scale), name)
    codes, shift = q.codes, _shift(fmt, to)
    if fmt.grid != to.grid:
        codes = pack(to.grid.encode(fmt.grid.decode(q.unpacked()) + shift), to.grid.cardinality)
    offset = None
    if to.offset is not None:
        given = torch.zeros_like(scales) if q.offset is None else spread(q.offsets())
        if to.offset.kind == "min":
            base = given - shift * scales if fmt.offset_kind == "min" else -(given + shift) * kept.to(torch.float32)
            offset = base.to(stores.stored_dtype(str(to.offset.store)))
            if not bool(offset.isfinite().all()):
                raise ExportError(
                    f"{name} has a minimum of {float(base.abs().max()):.3g}, too large for {to.offset.store}"
                )
        else:
            zeros = given + shift
            if bool((zeros < to.grid.lo).any()) or bool((zeros > to.grid.hi).any()):
                raise ExportError(
                    f"{name} has zero-points from {int(zeros.min())} to {int(zeros.max())}, and there is room for "
                    f"{int(to.grid.lo)} to {int(to.grid.hi)}; quantize it with an offset of the kind asym"
                )
            offset = pack(to.grid.encode(zeros), to.grid.cardinality)
    return QTensor(to, q.shape, codes, kept, offset)


def blocks_within(fmt: Format, shape: tuple[int, ...], sizes: tuple[int, ...]) -> list[Block]:
    """Blocks of one row that the blocks of `fmt` consist of, the largest first: whole rows (-1), then groups of these sizes."""
    width = as_matrices(shape)[2]
    return [Block(1, size) for size in (-1, *sizes) if _covers(fmt.block.cols, size, width)]


def with_block(fmt: Format, block: Block) -> Format:
    """`fmt` with this block, no exponent, a plain scale, and rounded zero-points in the bits of the grid."""
    scale = fmt.scale if fmt.scale in stores.FLOAT_STORES else "fp32"
    zero = fmt.offset is not None and fmt.offset.kind == "zero"
    return replace(fmt.plain, block=block, scale=scale, offset=Offset("zero", "grid") if zero else fmt.offset)


def _stored(q: QTensor) -> Tensor:
    assert isinstance(q.scale, Tensor)
    return q.scale.view(q.format.block.counts(q.shape))


def _covers(block: int, part: int, size: int) -> bool:
    """Whether every block of `part` lies within one of `block`, along a dimension of `size`."""
    whole = size if block == -1 else min(block, size)
    piece = size if part == -1 else part
    return piece <= size and size % piece == 0 and (whole == size or whole % piece == 0)


def _sources(block: int, part: int, size: int) -> Tensor:
    """int64: which block each part lies in."""
    whole, piece = (size if side == -1 else side for side in (block, part))
    return torch.arange(size // piece) * piece // whole


def _shift(fmt: Format, to: Format) -> int:
    """What is added to a level: half of the grid where a signed one becomes an unsigned one."""
    return 1 << (fmt.grid.bits - 1) if fmt.grid.signed and not to.grid.signed else 0
