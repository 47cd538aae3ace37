"""From a QTensor to what the C++ kernels pack: unsigned codes, a scale and a minimum for each group of a row.

    w = scale * (level - zero) + minimum

where level is the code itself (4 or 8 bits) or its entry in a table of 16 bytes. Every format whose levels are small
integers up to a common factor fits: int1 to int8, ternary, iq4nl, e2m1 (twice its levels are integers), fp6 e2m3.
Levels of other tables of 16, such as nf4, are rounded to multiples of 1/127 of the largest, which is said; what is left
of them can be packed as a second weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from lowbit.formats import Grid, QTensor

_TILE = 16
_RESIDUAL_STEPS = 254.0  # steps of what is left of a rounded level, which is at most half a step of the first table
_CHUNK = 1 << 22


@dataclass(frozen=True, eq=False)
class Codes:
    """A weight [rows, cols] as the kernels read it.

    codes uint8 [rows, cols]; scale, minimum float32 [rows, groups], minimum None where it is zero; group: columns, 0 for
    the whole row; table uint8 [16] or None; rounded: whether levels had to be rounded to fit.
    """

    bits: int
    group: int
    zero: int
    codes: Tensor
    scale: Tensor
    minimum: Tensor | None
    table: Tensor | None
    rounded: bool

    @property
    def kind(self) -> tuple[object, ...]:
        """Weights of one kind can be packed one after another."""
        table = None if self.table is None else tuple(self.table.tolist())
        return self.bits, self.group, self.zero, table, self.minimum is None

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    def part(self, first: int, last: int) -> Codes:
        """Rows [first, last)."""
        minimum = None if self.minimum is None else self.minimum[first:last].contiguous()
        codes, scale = self.codes[first:last].contiguous(), self.scale[first:last].contiguous()
        return replace(self, codes=codes, scale=scale, minimum=minimum)


@dataclass(frozen=True, eq=False)
class Floats:
    """A weight [rows, cols] that stays float: float32, float16 or bfloat16."""

    values: Tensor

    @property
    def kind(self) -> tuple[object, ...]:
        return (self.values.dtype,)

    @property
    def rows(self) -> int:
        return self.values.shape[0]

    def part(self, first: int, last: int) -> Floats:
        """Rows [first, last)."""
        return Floats(self.values[first:last].contiguous())


@dataclass(frozen=True)
class _Levels:
    bits: int
    zero: int
    factor: float  # level of the format = (level here - zero) / factor
    code: tuple[int, ...]  # new code of each code
    table: tuple[int, ...] | None
    rounded: bool


@lru_cache(maxsize=64)
def _levels_of(grid: Grid) -> _Levels | str:
    """How the kernels can hold the levels of a grid, or why not."""
    levels = grid.levels.double()
    if not bool(levels.isfinite().all()):
        return f"{grid} has codes without a value"
    for factor in (1.0, 2.0, 4.0, 8.0, 16.0):
        whole = levels * factor
        if bool((whole == whole.round()).all()) and float(whole.abs().max()) <= 255:
            return _whole_levels(grid, whole, factor)
    if grid.cardinality > 16:
        return f"the levels of {grid} are no small integers"
    # The factor that leaves the least error: a few percent below 127 it may be half of what 127 leaves.
    reach = float(levels.abs().max())
    factors = torch.linspace(96, 127, 3101, dtype=torch.float64) / reach
    scaled = levels[None] * factors[:, None]
    best = int(((scaled - scaled.round()).square().sum(1) / factors.square()).argmin())
    return _table(scaled[best].round(), float(factors[best]), True)


def _whole_levels(grid: Grid, whole: Tensor, factor: float) -> _Levels | str:
    low, high = int(whole.min()), int(whole.max())
    for bits, zeros in ((4, (0, 1, 2, 4, 8)), (8, (0, 128))):
        for zero in zeros:
            if low + zero >= 0 and high + zero < 1 << bits:
                return _Levels(bits, zero, factor, tuple(int(v) + zero for v in whole), None, False)
        if grid.cardinality <= 16 and low >= -128 and high <= 127:
            return _table(whole, factor, False)
    return f"the levels of {grid} span more than a byte"


def _table(whole: Tensor, factor: float, rounded: bool) -> _Levels:
    entries = [int(v) + 128 for v in whole] + [128] * (16 - len(whole))
    return _Levels(4, 128, factor, tuple(range(len(whole))), tuple(entries), rounded)


def why_not(q: QTensor, stack: bool = False) -> str | None:
    """Why the kernels cannot hold this weight, or None. Looks at the format and the shape only.

    stack: it is several matrices [count, rows, cols].
    """
    fmt = q.format
    if len(q.shape) != 2 + stack or 0 in q.shape:
        return "they multiply matrices"
    if fmt.codebook is not None:
        return "its levels are learned for each block"
    if fmt.block.cols not in (-1, q.shape[-1]) and fmt.block.cols % 16:
        return f"scales change every {fmt.block.cols} columns; multiples of 16 are served"
    levels = _levels_of(fmt.grid)
    return levels if isinstance(levels, str) else None


def codes_of(q: QTensor) -> Codes:
    """The weight as the kernels read it; only for one that `why_not` has nothing against. Of a stack all rows, one matrix
    after another."""
    fmt, (rows, cols) = q.format, q.shape[-2:]
    levels = _levels_of(fmt.grid)
    if isinstance(levels, str):
        raise ValueError(levels)
    codes = q.unpacked().view(-1, cols)
    if levels.code != tuple(range(len(levels.code))):
        codes = _look_up(torch.tensor(levels.code, dtype=torch.uint8), codes)
    scale, offset = q.scales(), q.offsets()
    assert scale is not None  # only learned levels come without
    minimum = None
    if offset is not None:
        minimum = offset if fmt.offset_kind == "min" else -scale * offset
    row = torch.zeros(rows, dtype=torch.int64) if fmt.block.rows == -1 else torch.arange(rows) // fmt.block.rows
    spread = [None if t is None else t[:, row].flatten(0, 1).float().contiguous() for t in (scale, minimum)]
    assert spread[0] is not None
    group = 0 if fmt.block.cols in (-1, cols) else fmt.block.cols
    table = None if levels.table is None else torch.tensor(levels.table, dtype=torch.uint8)
    return Codes(
        levels.bits, group, levels.zero, codes.contiguous(), spread[0] / levels.factor, spread[1], table, levels.rounded
    )


def _look_up(table: Tensor, codes: Tensor) -> Tensor:
    """table[codes] for uint8 codes, in chunks: an index takes eight bytes."""
    flat, out = codes.reshape(-1), torch.empty(codes.numel(), dtype=table.dtype)
    for chunk, into in zip(flat.split(_CHUNK), out.split(_CHUNK)):
        torch.index_select(table, 0, chunk.int(), out=into)
    return out.view(codes.shape)


def residual_of(q: QTensor, codes: Codes) -> Codes | None:
    """What rounding the levels left of `codes_of(q)`, as a weight to add to it; None where nothing was rounded.

    With it a level is off by at most 1/(4 * 127 * 127) of the largest.
    """
    levels = _levels_of(q.format.grid)
    if isinstance(levels, str) or not codes.rounded or levels.table is None:
        return None
    exact = q.format.grid.levels.double() * levels.factor
    kept = torch.tensor(levels.table[: len(exact)], dtype=torch.float64) - levels.zero
    left = ((exact - kept) * _RESIDUAL_STEPS).round().to(torch.int64) + 128
    table = torch.full((16,), 128, dtype=torch.uint8)
    table[: len(left)] = left.to(torch.uint8)
    return replace(codes, zero=128, scale=codes.scale / _RESIDUAL_STEPS, minimum=None, table=table)


def pack(core: object, sources: list[Codes] | list[Floats], paired: bool = False, segment: int = 0) -> object:
    """A `Weight` of `lowbit._core` of these weights one after another, or alternately by tiles where they are a pair.

    segment: columns of activations that share a scale, 0 for what suits the kernel.
    """
    first = sources[0]
    if isinstance(first, Floats):
        types = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
        values = [s.values.view(torch.int16) if s.values.dtype != torch.float32 else s.values for s in sources]  # type: ignore[union-attr]
        return core.pack_floats(types[first.values.dtype], [v.numpy() for v in values], paired)  # type: ignore[attr-defined]
    given = [
        (s.codes.numpy(), s.scale.numpy(), None if s.minimum is None else s.minimum.numpy())  # type: ignore[union-attr]
        for s in sources
    ]
    table = None if first.table is None else first.table.numpy()
    return core.pack(first.bits, first.group, first.zero, given, table, paired, segment)  # type: ignore[attr-defined]


def can_join(sources: list[Codes] | list[Floats], paired: bool) -> bool:
    """Whether these weights can be packed as one: of one kind, and all but the last in whole tiles."""
    same = len({s.kind for s in sources}) == 1
    if paired:
        return same and len(sources) == 2 and sources[0].rows == sources[1].rows and sources[0].rows % _TILE == 0
    return same and all(s.rows % _TILE == 0 for s in sources[:-1])
