"""Storing: keys or values to packed parts and back, for any number of sequences, heads and tokens in one go.

The steps, each of them left out where the side has no use for it:

    1. the outlier channels are set aside as float16, and are zero from here on
    2. the rest is rotated
    3. each block (or with calibrated scales, each channel) gets its scale and offset, each number the nearest level
    4. codes are packed, those of every vector from a new byte on

Reading goes the same way back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowbit.errors import RecipeError
from lowbit.formats import Format, QTensor, TableGrid, encode, stores
from lowbit.formats.nearest import inverse
from lowbit.formats.packing import pack, packed_bytes, unit, unpack
from lowbit.kv.side import CacheSide
from lowbit.kv.tables import AXIS, Tables
from lowbit.solvers.fitting import run_fit
from lowbit.transforms.hadamard import has_hadamard, multiply

# Channels are chosen by the first so many tokens, where calibration has not chosen them.
CHOOSING = 32
_HALF = torch.finfo(torch.float16).max
# What is stored of vectors, by name: codes and outliers have a row for each token, scale and offset one for each group.
Parts = dict[str, Tensor]


@dataclass(frozen=True)
class LearnedGrid(TableGrid):
    """Levels from calibration. They lie somewhere on the axis of int8, whose end a fit gives to the largest magnitude."""

    @property
    def reach(self) -> float:
        return float(AXIS)

    @property
    def extreme(self) -> float:
        return float(AXIS)


def rotated(x: Tensor, inverse: bool = False) -> Tensor:
    """x H / sqrt(width), or back: [..., width] of an order for which `transforms.hadamard` has a matrix.

    RecipeError for other widths. Scores do not change where queries are rotated as keys are: (q H)(k H)' = n q k'.
    """
    width = x.shape[-1]
    if not has_hadamard(width):
        raise RecipeError(
            f"heads of {width} channels cannot be rotated: no Hadamard matrix of that order is known here; leave rotate out"
        )
    return multiply(x, transposed=inverse) / math.sqrt(width)


def largest_channels(x: Tensor, side: CacheSide, tokens: int = CHOOSING) -> Tensor:
    """int64 [..., outliers], ascending: the channels of x [..., tokens, width] with the largest mean magnitude.

    By the first 32 (`tokens`) tokens after the sinks, or by those of them that are there; sinks have channels of their own.
    """
    first = x[..., side.sinks : side.sinks + tokens, :] if x.shape[-2] > side.sinks else x[..., :tokens, :]
    count = min(side.outliers, x.shape[-1])
    # stable, so that equal magnitudes are the same channels everywhere
    order = first.float().abs().mean(-2).sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values


@dataclass(frozen=True, eq=False)
class Storing:
    """How one side of one layer stores vectors of `width` channels. `tables` on the device of the vectors."""

    side: CacheSide
    width: int
    tables: Tables

    def __deepcopy__(self, memo: object) -> Storing:
        return self

    @property
    def format(self) -> Format:
        """The format, its learned levels in place."""
        fmt = self.side.format
        assert fmt is not None
        if fmt.codebook is None:
            return fmt
        assert self.tables.levels is not None
        grid = LearnedGrid("learned", tuple(self.tables.levels.tolist()))
        return replace(fmt, grid=grid, codebook=None, levels_store="fp16")

    def prepared(self, x: Tensor, channels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x float32 [..., tokens, width] as its codes are chosen, without outliers and rotated; the outliers as float16."""
        apart = None
        if channels is not None:
            at = _at(channels, x)
            apart = x.gather(-1, at).clamp(-_HALF, _HALF).to(torch.float16)
            x = x.scatter(-1, at, 0.0)
        return (rotated(x) if self.side.rotate else x), apart

    def encode(self, x: Tensor, channels: Tensor | None = None) -> Parts:
        """What is stored of x [..., tokens, width], float32; `channels` [..., outliers] of sides that keep some."""
        fmt = self.format
        y, apart = self.prepared(x, channels)
        parts: Parts = {} if apart is None else {"outliers": apart}
        if self.side.static:
            parts["codes"] = _packed(self._static_codes(y, fmt), fmt)
            return parts
        y = y.contiguous()
        matrices = y.view(math.prod(y.shape[:-2]), *y.shape[-2:])
        q = encode(matrices, fmt, *run_fit(matrices, fmt, self.side.fit_used))
        aligned = q.codes.dim() == 3
        parts["codes"] = (q.codes if aligned else _packed(q.unpacked(), fmt)).view(*y.shape[:-1], -1)
        assert isinstance(q.scale, Tensor)
        groups = (*y.shape[:-2], q.scale.shape[-2])
        parts["scale"] = q.scale.view(*groups, -1)
        if fmt.offset is not None:
            parts["offset"] = self._kept_offset(q, fmt).view(*groups, -1)
        return parts

    def decode(self, parts: Mapping[str, Tensor], channels: Tensor | None = None) -> Tensor:
        """float32 [..., tokens, width] of what `encode` returned."""
        fmt = self.format
        y = fmt.grid.decode(_unpacked(parts["codes"], self.width, fmt))
        if self.side.static:
            assert self.tables.scale is not None
            y.mul_(self.tables.scale[:, None])
            if self.tables.offset is not None:
                y.add_(self.tables.offset[:, None])
        else:
            blocks, scale = self._facing(y, stores.from_store(parts["scale"], str(fmt.scale)))
            offset = None if fmt.offset is None else self._facing(y, self._offset(parts, fmt))[1]
            if offset is not None and fmt.offset_kind != "min":
                blocks.sub_(offset)
            blocks.mul_(scale)
            if offset is not None and fmt.offset_kind == "min":
                blocks.add_(offset)
        if self.side.rotate:
            y = rotated(y, inverse=True)
        if channels is not None:
            y.scatter_(-1, _at(channels, y), parts["outliers"].float())
        return y

    def _static_codes(self, y: Tensor, fmt: Format) -> Tensor:
        assert self.tables.scale is not None
        if self.tables.offset is not None:
            y = y - self.tables.offset[:, None]
        return fmt.grid.encode(y * inverse(self.tables.scale)[:, None])

    def _kept_offset(self, q: QTensor, fmt: Format) -> Tensor:
        assert fmt.offset is not None and isinstance(q.offset, Tensor)
        if fmt.offset.store != "grid":
            return q.offset
        offsets = q.offsets()
        assert offsets is not None
        return _packed(fmt.grid.encode(offsets), fmt)

    def _offset(self, parts: Mapping[str, Tensor], fmt: Format) -> Tensor:
        assert fmt.offset is not None
        if fmt.offset.store == "grid":
            return fmt.grid.decode(_unpacked(parts["offset"], parts["scale"].shape[-1], fmt))
        return stores.from_store(parts["offset"], str(fmt.offset.store))

    def _facing(self, y: Tensor, per_block: Tensor) -> tuple[Tensor, Tensor]:
        """A view of y [..., tokens, width], and per_block [..., groups, column blocks] so that it broadcasts to it."""
        rows, cols = self.side.group, self.format.block.cols
        if per_block.shape[-1] not in (1, self.width):
            if self.width % cols == 0:
                return y.unflatten(-1, (-1, cols)), per_block.unsqueeze(-1)
            per_block = per_block.repeat_interleave(cols, -1)[..., : self.width]
        if rows == 1:
            return y, per_block
        if y.shape[-2] % rows == 0:
            return y.unflatten(-2, (-1, rows)), per_block.unsqueeze(-2)
        return y, per_block.repeat_interleave(rows, -2)[..., : y.shape[-2], :]


def _at(channels: Tensor, x: Tensor) -> Tensor:
    """channels [..., n] as indices into the last dimension of x [..., tokens, width]."""
    return channels.to(torch.int64).unsqueeze(-2).expand(*x.shape[:-1], channels.shape[-1])


def _packed(codes: Tensor, fmt: Format) -> Tensor:
    """uint8 [..., width] -> [..., bytes]: each row from a new byte on."""
    card, width = fmt.grid.cardinality, codes.shape[-1]
    whole = pad(codes, (0, -width % unit(card)[0]))
    return pack(whole, card)[..., : packed_bytes(width, card)]


def _unpacked(packed: Tensor, width: int, fmt: Format) -> Tensor:
    """What `_packed` packed, [..., width]."""
    per_unit, size = unit(fmt.grid.cardinality)
    whole = pad(packed, (0, -packed.shape[-1] % size))
    codes = whole.shape[-1] // size * per_unit
    return unpack(whole, (*packed.shape[:-1], codes), fmt.grid.cardinality)[..., :width]
