"""Blocks: which elements share a scale. The only place in the project that reshapes weights.

A block is `(rows, cols)` over the last two dimensions; leading dimensions (the experts of a 3-D
weight) never share one, and a 1-D tensor is one row. `-1` means the whole dimension. A dimension
that does not divide gets one short last block; nothing is padded: the tensor is cut into at most
four regions of equal blocks, and functions see each region as a matrix [blocks, block size].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import FormatError

# Elements a function sees at a time: 1 MiB of float32, which stays in the second-level cache.
CHUNK = 1 << 18


@dataclass(frozen=True)
class Block:
    """`rows` x `cols` elements share one scale; -1 stands for the whole dimension."""

    rows: int
    cols: int

    def __post_init__(self) -> None:
        for size in (self.rows, self.cols):
            if size == 0 or size < -1:
                raise FormatError(f"a block is at least 1 wide (or -1 for the whole dimension), not {size}")

    def __str__(self) -> str:
        if (self.rows, self.cols) == (-1, -1):
            return "tensor"
        if self.rows == 1:
            return "channel" if self.cols == -1 else f"g{self.cols}"
        return "x".join("*" if size == -1 else str(size) for size in (self.rows, self.cols))

    def counts(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(matrices, row blocks, column blocks) of a tensor of this shape; what a scale is shaped like."""
        batch, rows, cols = as_matrices(shape)
        return batch, _count(rows, self.rows), _count(cols, self.cols)


TENSOR = Block(-1, -1)
CHANNEL = Block(1, -1)


def group(size: int) -> Block:
    """`size` consecutive weights of one row."""
    return Block(1, size)


def as_matrices(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(batch, rows, cols): a scalar is 1x1x1, a vector one row, and leading dimensions are a batch."""
    if not shape:
        return 1, 1, 1
    cols = shape[-1]
    rows = shape[-2] if len(shape) > 1 else 1
    batch = 1
    for size in shape[:-2]:
        batch *= size
    return batch, rows, cols


def _count(size: int, block: int) -> int:
    if size == 0:
        return 0
    return 1 if block == -1 else -(-size // block)


def _spans(size: int, block: int) -> list[tuple[int, int, int]]:
    """(start, stop, block) of the part with whole blocks and of the short last block, if any."""
    block = size if block == -1 else min(block, size)
    if size == 0:
        return []
    whole = size - size % block
    spans = [(0, whole, block)]
    if whole < size:
        spans.append((whole, size, size - whole))
    return spans


@dataclass(frozen=True)
class Region:
    """Equal blocks: rows r0:r1 in blocks of r, columns c0:c1 in blocks of c; plus where their scales go."""

    r0: int
    r1: int
    r: int
    c0: int
    c1: int
    c: int
    br: int
    bc: int

    def split(self, x: Tensor) -> Tensor:
        """[batch, rows, cols] -> [blocks, r * c]; a view when a block lies in one row of the whole width."""
        part = x[:, self.r0 : self.r1, self.c0 : self.c1]
        nr, nc = (self.r1 - self.r0) // self.r, (self.c1 - self.c0) // self.c
        part = part.reshape(x.shape[0], nr, self.r, nc, self.c)
        return part.transpose(2, 3).reshape(x.shape[0] * nr * nc, self.r * self.c)

    def merge(self, blocks: Tensor, out: Tensor) -> None:
        """Write [blocks, r * c] back into its place in `out` [batch, rows, cols]."""
        nr, nc = (self.r1 - self.r0) // self.r, (self.c1 - self.c0) // self.c
        part = blocks.view(out.shape[0], nr, nc, self.r, self.c).transpose(2, 3)
        target = out[:, self.r0 : self.r1, self.c0 : self.c1]
        target.copy_(part.reshape(out.shape[0], nr * self.r, nc * self.c))

    def scales(self, per_block: Tensor) -> Tensor:
        """The part of a per-block tensor [batch, nR, nC, ...] that belongs here, as [blocks, ...]."""
        nr, nc = (self.r1 - self.r0) // self.r, (self.c1 - self.c0) // self.c
        part = per_block[:, self.br : self.br + nr, self.bc : self.bc + nc]
        return part.reshape(-1, *per_block.shape[3:])

    def put_scales(self, values: Tensor, per_block: Tensor) -> None:
        """Write [blocks, ...] into the per-block tensor [batch, nR, nC, ...]."""
        nr, nc = (self.r1 - self.r0) // self.r, (self.c1 - self.c0) // self.c
        per_block[:, self.br : self.br + nr, self.bc : self.bc + nc] = values.view(
            per_block.shape[0], nr, nc, *per_block.shape[3:]
        )


def regions(shape: tuple[int, ...], block: Block) -> Iterator[Region]:
    """At most four regions of equal blocks that together cover the tensor."""
    _, rows, cols = as_matrices(shape)
    for i, (r0, r1, r) in enumerate(_spans(rows, block.rows)):
        for j, (c0, c1, c) in enumerate(_spans(cols, block.cols)):
            yield Region(r0, r1, r, c0, c1, c, r0 // block.rows if i else 0, c0 // block.cols if j else 0)


BlockFunction = Callable[..., "Tensor | tuple[Tensor | None, ...]"]


def reduce_blocks(function: BlockFunction, block: Block, x: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """Call `function` on blocks [n, size]; collect what it returns per block.

    `x` and `others` have the same shape (an `other` may be None); they arrive as float32. `function`
    returns one tensor [n] or [n, k] (or a tuple of them, entries may be None). Each comes back as
    [batch, row blocks, column blocks] or with k behind. Work goes by chunks that fit the cache.
    For an empty `x`, `function` is called once, on no blocks.
    """
    batch, nr, nc = block.counts(tuple(x.shape))
    inputs = [None if t is None else t.reshape(as_matrices(tuple(t.shape))) for t in (x, *others)]
    if not x.numel():  # no blocks: what comes back is seen from a call on none of them
        value = function(*(None if t is None else _float(t.reshape(0, 1)) for t in inputs))
        values = value if isinstance(value, tuple) else (value,)
        return [None if v is None else v.new_zeros((batch, nr, nc, *v.shape[1:])) for v in values]
    results: list[Tensor | None] = []
    for region in regions(tuple(x.shape), block):
        parts = [None if t is None else region.split(t) for t in inputs]
        collected: list[tuple[Tensor | None, ...]] = []
        for chunk in _chunks(parts):
            value = function(*chunk)
            collected.append(value if isinstance(value, tuple) else (value,))
        for k in range(len(collected[0])):
            pieces = [c[k] for c in collected if c[k] is not None]
            if len(results) <= k:
                results.append(None)
            if pieces:
                joined = torch.cat(pieces)
                if results[k] is None:
                    results[k] = joined.new_zeros((batch, nr, nc, *joined.shape[1:]))
                region.put_scales(joined, results[k])
    return results


def map_blocks(
    function: Callable[..., Tensor], block: Block, x: Tensor, *per_block: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Call `function(blocks [n, size], *per block [n, ...])` and put its [n, size] results where `x` was.

    `per_block` tensors have the shape [batch, row blocks, column blocks, ...]. The result has the shape
    of `x` and the type `dtype`.
    """
    out = torch.empty(as_matrices(tuple(x.shape)), dtype=dtype, device=x.device)
    flat = x.reshape(out.shape)
    for region in regions(tuple(x.shape), block):
        blocks = region.split(flat)
        scales = [None if p is None else region.scales(p) for p in per_block]
        result = torch.empty(blocks.shape, dtype=dtype, device=x.device)
        step = max(1, CHUNK // max(1, blocks.shape[1]))
        for start in range(0, blocks.shape[0], step):
            rows = slice(start, start + step)
            result[rows] = function(_float(blocks[rows]), *(None if s is None else s[rows] for s in scales))
        region.merge(result, out)
    return out.view(x.shape)


def _chunks(parts: list[Tensor | None]) -> Iterator[list[Tensor | None]]:
    first = parts[0]
    if first is None:
        raise FormatError("blocks need at least one tensor")
    step = max(1, CHUNK // max(1, first.shape[1]))
    for start in range(0, first.shape[0], step):
        yield [None if p is None else _float(p[start : start + step]) for p in parts]


def _float(x: Tensor) -> Tensor:
    """float32, except that codes (uint8) stay as they are."""
    return x if x.dtype in (torch.float32, torch.uint8) else x.to(torch.float32)
