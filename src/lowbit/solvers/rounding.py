"""Rounding one column at a time: scale and offset of every element, laid out by columns."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowbit.formats import Block, Format, QTensor, encode
from lowbit.formats.blocks import map_blocks
from lowbit.formats.nearest import inverse
from lowbit.formats.qtensor import Stored


def per_element(values: Tensor, shape: tuple[int, ...], block: Block) -> Tensor:
    """Per-block values [batch, row blocks, column blocks] spread over the elements: float32 of `shape`."""
    blank = torch.empty(shape, dtype=torch.float32)
    return map_blocks(lambda x, v: v[:, None].expand_as(x), block, blank, values, dtype=torch.float32)


class Rounder:
    """w -> (level - zero) scale with the stored scale and offset of `q` [N, K]; columns may be in any order.

    `value(k, w)` rounds w [N] as column k. Scale and zero are kept [K, N], so that a column is contiguous. `still` [N, K],
    in the weight's own order: elements that are rounded as zero, whatever error was fed to them.
    """

    def __init__(self, q: QTensor, perm: Tensor | None = None, still: Tensor | None = None) -> None:
        fmt, shape = q.format, q.shape
        scale = per_element(q.scales(), shape, fmt.block)  # type: ignore[arg-type]
        offset = q.offsets()
        zero = None
        if offset is not None:
            zero = per_element(offset, shape, fmt.block)
            if fmt.offset_kind == "min":  # w = s level + m, so z = -m / s
                zero = -zero * inverse(scale)
        self.grid, self.fmt = fmt.grid, fmt
        order = slice(None) if perm is None else perm
        self.scale = scale.T[order].contiguous()
        self.inverse = inverse(self.scale)
        self.zero = None if zero is None else zero.T[order].contiguous()
        self.still = None if still is None else still.T[order].contiguous()

    def value(self, k: int, w: Tensor) -> Tensor:
        """The nearest value that column k can store, for each row."""
        if self.still is not None:
            w = w.masked_fill(self.still[k], 0)
        if self.zero is None:
            return self.grid.round(w * self.inverse[k]).mul_(self.scale[k])
        zero = self.zero[k]
        return self.grid.round(torch.addcmul(zero, w, self.inverse[k])).sub_(zero).mul_(self.scale[k])


def empty(fmt: Format, shape: tuple[int, ...], scale: Tensor, offset: Tensor | None) -> QTensor:
    """A QTensor with this scale and offset as they are stored, and no codes yet."""
    return encode(torch.zeros(shape), fmt, scale, offset)


def with_values(q: QTensor, values: Tensor) -> QTensor:
    """`q` with the codes of `values` [N, K], which lie on its levels, under its own stored scale and offset."""
    from lowbit.formats.packing import pack
    from lowbit.formats.qtensor import nearest_codes

    return replace(q, codes=pack(nearest_codes(values, q), q.format.grid.cardinality))


def by_row(take: Tensor, new: QTensor, old: QTensor) -> QTensor:
    """Rows of `new` where `take` bool [N], else of `old`: two versions of one weight [N, K] whose rows share nothing that differs."""
    if bool(take.all()):
        return new
    if not bool(take.any()):
        return old
    from lowbit.formats.packing import pack

    rows = len(take)

    def chosen(a: Stored | None, b: Stored | None) -> Stored | None:
        if a is b or a is None or b is None:
            return b
        if isinstance(a, QTensor) and isinstance(b, QTensor):
            codes = choose(a.unpacked(), b.unpacked())
            parts = {"scale": chosen(a.scale, b.scale), "offset": chosen(a.offset, b.offset)}
            return replace(b, codes=pack(codes, b.format.grid.cardinality), **parts)  # type: ignore[arg-type]
        assert isinstance(a, Tensor) and isinstance(b, Tensor)
        return (
            b if torch.equal(a, b) else choose(a, b)
        )  # packed zero-points, which are the same, may have no rows of their own

    def choose(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(take[:, None], a.reshape(rows, -1), b.reshape(rows, -1)).view(b.shape)

    return chosen(new, old)  # type: ignore[return-value]
