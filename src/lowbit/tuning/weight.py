"""A stored weight as a function of parameters: what gradient descent may move, and what is stored of it.

Parameters are relative and start at 0, so that one learning rate suits scales of every size: a scale is s0 (1 + d), a
minimum m0 + d s0 R and a float zero-point z0 + d R, with R the reach of the grid. A scale that is itself quantized keeps its
format: its own scale is a parameter, and so are its codes, which are rounded straight through.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lowbit.formats import QTensor, stores
from lowbit.formats.blocks import map_blocks
from lowbit.formats.format import Format, Store
from lowbit.formats.grids import IntGrid
from lowbit.formats.nearest import inverse
from lowbit.formats.packing import pack
from lowbit.formats.qtensor import Stored, load, save
from lowbit.tuning.expand import expand, look_up
from lowbit.tuning.straight_through import round_to_grid

# Stores that are fine enough for small steps. An exponent or an fp8 scale stays as it is.
_SMOOTH = ("fp32", "fp16", "bf16")


def moves_scales(fmt: Format) -> bool:
    """Whether anything but codes can be moved: scales, offsets or learned levels in a type that is fine enough."""
    kept = [fmt.scale, fmt.offset.store if fmt.offset is not None else None]
    return fmt.codebook is not None or any(isinstance(store, Format) or store in _SMOOTH for store in kept)


class PerBlock:
    """Scales or offsets: fixed, relative to what they were, or a quantized tensor of their own."""

    def __init__(self, stored: Stored, store: Store, counts: tuple[int, ...], unit: Tensor | None = None) -> None:
        """`unit`: what d = 1 stands for; the values themselves when None. Broadcasts to `counts`."""
        self.stored, self.store, self.counts = stored, store, counts
        self.inner: TunableWeight | None = None
        self.delta: Tensor | None = None
        self.start = load(stored, store, counts) if store != "grid" else torch.empty(0)
        self.unit = self.start if unit is None else unit
        if isinstance(stored, QTensor):
            self.inner = TunableWeight(stored)
            self.inner.free_codes()
        elif store in _SMOOTH:
            self.delta = torch.zeros(counts, requires_grad=True)

    def parameters(self) -> Iterator[Tensor]:
        if self.inner is not None:
            yield from self.inner.parameters()
        elif self.delta is not None:
            yield self.delta

    def values(self) -> Tensor:
        """float32 `counts`, a function of the parameters."""
        if self.inner is not None:
            return self.inner.dense().view(self.counts)
        return self.start if self.delta is None else self.start + self.unit * self.delta

    def kept(self) -> Stored:
        """What is stored of the present values."""
        if self.inner is not None:
            return self.inner.tuned()
        return self.stored if self.delta is None else save(self.values().detach(), self.store)


class TunableWeight:
    """A QTensor whose scales, offsets and learned levels (and, once `free_codes` was called, codes) can be moved."""

    def __init__(self, q: QTensor) -> None:
        self.q, self.exponent = q, q.format.exponent
        q = replace(q, format=q.format.plain)  # parameters are of what is stored
        fmt = q.format
        self.codes: Tensor | None = q.unpacked()
        self.latent: Tensor | None = None  # level units; the codes are its rounding
        self.move: Tensor | None = None
        self.unit = torch.tensor(1.0)
        counts = fmt.block.counts(q.shape)
        self.scale = None if q.scale is None or fmt.scale is None else PerBlock(q.scale, fmt.scale, counts)
        self.offset: PerBlock | None = None
        self.fixed_offset = q.offsets() if fmt.offset is not None and fmt.offset.store in ("grid", "int32") else None
        if q.offset is not None and fmt.offset is not None and self.fixed_offset is None:
            reach = torch.tensor(max(abs(fmt.grid.lo), abs(fmt.grid.hi)))
            unit = reach * q.scales().abs() if fmt.offset.kind == "min" else reach  # type: ignore[union-attr]
            self.offset = PerBlock(q.offset, fmt.offset.store, counts, unit)
        self.levels: PerBlock | None = None
        if q.levels is not None:
            size = q.levels.float().square().mean(-1, keepdim=True).sqrt()
            self.levels = PerBlock(q.levels, fmt.levels_store, tuple(q.levels.shape), size)

    def free_codes(self, weight: Tensor | None = None) -> None:
        """Let the codes move: level = round(t + u d). Learned codebooks move their levels instead.

        t is the level of the present code. With `weight`, the float weight of the same shape, it is what that asks for,
        w / s + z, where that rounds to the present code. Where it does not, as a solver chose another one, it is mirrored
        at the cell's edge: a code further away is held faster, and no crowd of weights waits at the edge to cross it in
        one step. u is the distance of levels, so that |d| <= 1/2 reaches neighbours only. Without `weight`, u is the reach
        of the grid: d is relative.
        """
        fmt = self.q.format
        if fmt.codebook is not None or self.codes is None:
            return
        level = fmt.grid.decode(self.codes)
        self.latent = level
        if weight is not None:
            self.unit = spacing(level, fmt)
            away = (_in_levels(weight.to(torch.float32), self.q) - level) / self.unit
            away = torch.where(away.abs() > 0.5, away.sign() * (1 - away.abs()).clamp_min(0), away)
            self.latent = level + self.unit * away.clamp(-0.499, 0.499)  # ties go to either side, so keep off them
        elif isinstance(fmt.grid, IntGrid):
            self.unit = torch.tensor(max(abs(fmt.grid.lo), abs(fmt.grid.hi)))
        else:
            self.unit = level.abs()
        self.move, self.codes = torch.zeros_like(level, requires_grad=True), None

    def parameters(self) -> Iterator[Tensor]:
        """Leaves that ask for gradients, in a fixed order."""
        if self.move is not None:
            yield self.move
        for part in (self.scale, self.offset, self.levels):
            if part is not None:
                yield from part.parameters()

    def _level(self) -> Tensor:
        if self.move is None or self.latent is None:
            assert self.codes is not None
            return self.codes
        return round_to_grid(self.latent + self.unit * self.move, self.q.format)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight, `q.shape`, as `q.dequantize(dtype)` at the start; a function of the parameters."""
        fmt = self.q.format
        level = self._level()
        if self.levels is not None:
            level = look_up(level, self.levels.values(), fmt)
            if self.scale is None:
                return self._real(level).to(dtype)
        assert self.scale is not None
        offset = self.fixed_offset if self.offset is None else self.offset.values()
        if not self.exponent:
            return expand(level, self.scale.values(), offset, fmt, dtype)
        return self._real(expand(level, self.scale.values(), offset, fmt, torch.float32)).to(dtype)

    def _real(self, values: Tensor) -> Tensor:
        return stores.times_power(values, self.exponent) if self.exponent else values

    @torch.no_grad()
    def tuned(self) -> QTensor:
        """The present state as it is stored: codes packed, scales rounded to their type."""
        q = self.q
        if self.move is not None and self.latent is not None:
            codes = q.format.grid.encode(self.latent + self.unit * self.move)
            q = replace(q, codes=pack(codes, q.format.grid.cardinality))
        if self.scale is not None:
            q = replace(q, scale=self.scale.kept())
        if self.offset is not None:
            q = replace(q, offset=self.offset.kept())
        if self.levels is not None:
            q = replace(q, levels=stores.to_store(self.levels.values(), q.format.levels_store))
        return q


class TunableVector:
    """A tensor that stays float, such as a norm's weight: p0 + d max(|p0|, rms p0); d alone where p0 is all zero."""

    def __init__(self, value: Tensor) -> None:
        self.dtype, self.start = value.dtype, value.to(torch.float32)
        rms = self.start.square().mean().sqrt()
        self.unit = torch.maximum(self.start.abs(), rms) if float(rms) > 0 else torch.ones_like(self.start)
        self.delta = torch.zeros_like(self.start, requires_grad=True)

    def parameters(self) -> Iterator[Tensor]:
        yield self.delta

    def dense(self) -> Tensor:
        """float32, a function of the parameter."""
        return self.start + self.unit * self.delta

    @torch.no_grad()
    def tuned(self) -> Tensor:
        """As it is stored, in the type it came in."""
        return self.dense().to(self.dtype)


def spacing(level: Tensor, fmt: Format) -> Tensor:
    """The distance of each `level` from its nearer neighbour on the grid; 1 on integer grids. Broadcasts to `level`."""
    if isinstance(fmt.grid, IntGrid):
        return torch.tensor(1.0)
    table = fmt.grid.levels
    table = table[table.isfinite()].unique()
    gaps = table.diff()
    nearer = torch.minimum(torch.cat([gaps[:1], gaps]), torch.cat([gaps, gaps[-1:]]))
    return nearer[torch.searchsorted(table, level.contiguous()).clamp_max(len(table) - 1)]


def _in_levels(weight: Tensor, q: QTensor) -> Tensor:
    """What a float weight asks for, in level units; never NaN."""

    def levels(block: Tensor, s: Tensor, o: Tensor | None) -> Tensor:
        back = inverse(s)[:, None]
        if o is None:
            return block * back
        return (block - o[:, None]) * back if q.format.offset_kind == "min" else block * back + o[:, None]

    return map_blocks(levels, q.format.block, weight, q.scales(), q.offsets(), dtype=torch.float32)
