"""Fits and rounding as the C++ core computes them, which gives what the Python gives but for the order of sums, many times faster.

What the core does not take (blocks of several rows, floating-point grids, scales in e8m0 or e4m3 that a fit rounds to, another
device) is declined with None, and the Python that calls goes on by itself. The same bytes for any number of threads and, on
one processor, every time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lowbit.formats import Block, Format, IntGrid, QTensor, TableGrid, stores
from lowbit.formats.packing import pack, packed_shape, unit
from lowbit.formats.qtensor import without_codes
from lowbit.kernels.core import core
from lowbit.kernels.thread_pool import pool

if TYPE_CHECKING:
    pass

_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_MOST_LEVELS = 16  # of a table


@dataclass(frozen=True)
class CoreFit:
    """A fit as the core knows it, its options worked out.

    absmax: s = max|x| / `reach`. minmax: the range of the block to that of the grid. search: what `factors` make of that range,
    each refitted, errors weighed by |x|^`emphasis` (0 or 1) where no importance is given.
    """

    kind: Literal["absmax", "minmax", "search"]
    reach: float = 1.0
    factors: tuple[float, ...] = ()
    emphasis: float = 0.0


@dataclass(frozen=True)
class BlockFits:
    """Per block [batch, row blocks, column blocks]: scale, offset in levels (or None), both float32 and before what concerns
    constant blocks and zeros; the value of constant blocks, NaN for others, or None where there are none; which blocks have
    zeros that are meant, or None."""

    scale: Tensor
    offset: Tensor | None
    constant: Tensor | None
    zeros: Tensor | None


def made_by() -> str:
    """Which of the two computes fits and codes here: "core" or "python"."""
    return "python" if core() is None else "core"


def fit_blocks(
    weight: Tensor, fmt: Format, form: CoreFit | None, importance: Tensor | None, isa: str = ""
) -> BlockFits | None:
    """Scale and offset of every block of `weight` [..., rows, cols], finite; None where the core does not take it.

    `importance`: broadcastable to the weight, or None. `isa`: a set of instructions by name, "" for the best.
    """
    module: Any = core()
    matrix = _matrix(weight, fmt.block)
    spec = None if module is None or form is None or matrix is None else _spec(module, fmt, form)
    if module is None or form is None or matrix is None or spec is None:
        return None
    weighs, by_magnitude = None, False
    if form.kind == "search" and importance is not None:
        weighs = _importance(importance, weight).numpy()
    elif form.kind == "search":
        by_magnitude = form.emphasis == 1
    counts = fmt.block.counts(tuple(weight.shape))
    count = math.prod(counts)
    scale, constant = torch.empty(count), torch.empty(count)
    offset = None if fmt.offset is None else torch.empty(count)
    zeros = None if fmt.offset is None else torch.empty(count, dtype=torch.uint8)
    fits, constants, many = module.fit_blocks(
        spec, pool(), isa, *matrix.place(), scale.numpy(), None if offset is None else offset.numpy(), constant.numpy(),
        None if zeros is None else zeros.numpy(), weighs, by_magnitude,
    )  # fmt: skip
    if not fits:  # the Python says which type is too small for what
        return None
    return BlockFits(
        scale.view(counts), None if offset is None else offset.view(counts),
        constant.view(counts) if constants else None, None if zeros is None or not many else zeros.view(counts) > 0,
    )  # fmt: skip


def encoded(
    x: Tensor, fmt: Format, scale: Tensor, offset: Tensor | None, isa: str = ""
) -> tuple[QTensor, float, float] | None:
    """`formats.encode` with the squares |x|^2 and |x - x_q|^2; None where the core does not take it."""
    module: Any = core()
    matrix = _matrix(x, fmt.block)
    levels = None if module is None or matrix is None else _levels(module, fmt)
    if matrix is None or levels is None or fmt.exponent:
        return None
    q = without_codes(tuple(x.shape), fmt, scale, offset)
    offsets = q.offsets()
    shape, base = tuple(x.shape), fmt.grid.cardinality
    packed = shape[-1] % unit(base)[0] == 0
    width = 0 if not packed else -3 if base == 3 else max(1, (base - 1).bit_length())
    codes = torch.empty(packed_shape(shape, base) if packed else shape, dtype=torch.uint8)
    norm, error = module.round_blocks(
        levels, pool(), isa, *matrix.place(), q.scales().reshape(-1).contiguous().numpy(),  # type: ignore[union-attr]
        None if offsets is None else offsets.reshape(-1).contiguous().numpy(), fmt.offset_kind == "min", width,
        codes.view(-1).numpy(),
    )  # fmt: skip
    return replace(q, codes=codes if packed else pack(codes, base)), norm, error


def block_peaks(weight: Tensor, block: Block, isa: str = "") -> Tensor | None:
    """float32 [batch, row blocks, column blocks]: the largest magnitudes, NaN where not all is finite; None where the core does
    not take it."""
    module: Any = core()
    matrix = _matrix(weight, block)
    if module is None or matrix is None:
        return None
    counts = block.counts(tuple(weight.shape))
    peaks = torch.empty(counts)
    module.block_peaks(pool(), isa, *matrix.place(), peaks.view(-1).numpy())
    return peaks


@dataclass(frozen=True)
class _Matrix:
    """Rows under rows in memory, and how wide a block is."""

    values: Tensor
    rows: int
    cols: int
    size: int

    def place(self) -> tuple[int, str, int, int, int]:
        return self.values.data_ptr(), _TYPES[self.values.dtype], self.rows, self.cols, self.size


def _matrix(weight: Tensor, block: Block) -> _Matrix | None:
    if (
        weight.device.type != "cpu"
        or weight.dtype not in _TYPES
        or not weight.dim()
        or not weight.numel()
        or block.rows != 1
    ):
        return None
    cols = weight.shape[-1]
    size = cols if block.cols == -1 else min(block.cols, cols)
    return _Matrix(weight.detach().contiguous(), weight.numel() // cols, cols, size)


def _importance(importance: Tensor, weight: Tensor) -> Tensor:
    """float32 [cols], or an element for each of the weight."""
    cols = weight.shape[-1]
    by_column = importance.numel() == cols == importance.shape[-1]
    spread = importance if by_column else importance.expand(weight.shape)
    return spread.detach().to(torch.float32).contiguous().view(-1)


def _levels(module: Any, fmt: Format) -> Any | None:
    grid = fmt.grid
    if isinstance(grid, IntGrid):
        return module.Levels(grid.lo, grid.hi)
    if not isinstance(grid, TableGrid) or grid.cardinality > _MOST_LEVELS:
        return None
    levels, bounds, codes = grid.by_bounds()
    return module.Levels(grid.lo, grid.hi, list(zip(levels, bounds, codes, strict=True)))


def _spec(module: Any, fmt: Format, form: CoreFit) -> Any | None:
    plain = fmt.scale in stores.FLOAT_STORES
    if fmt.codebook is not None or not (plain or isinstance(fmt.scale, Format) or form.kind == "absmax"):
        return None
    levels = _levels(module, fmt)
    if levels is None or form.reach == 0 or fmt.grid.extreme == 0:
        return None
    store = None if fmt.offset is None else fmt.offset.store
    kind = "" if store is None else "nested" if isinstance(store, Format) else store
    if fmt.offset is not None and fmt.offset.kind != "zero" and kind != "nested":
        kind = fmt.offset.kind
    return module.FitSpec(
        kind=form.kind, grid=levels, offset=kind, scale_store=fmt.scale if plain else "",
        offset_store=store if kind in ("float", "min") else "", spans_zero=fmt.spans_zero, signed_scale=fmt.scale_signed,
        two_signs=fmt.scale_signed and fmt.grid.signed and not _symmetric(fmt.grid.levels.tolist()), reach=form.reach,
        extreme=fmt.grid.extreme, factors=list(form.factors),
    )  # fmt: skip


def _symmetric(levels: Sequence[float]) -> bool:
    """Whether every level has its negative."""
    found = sorted(levels)
    return all(a == -b for a, b in zip(found, reversed(found)))
