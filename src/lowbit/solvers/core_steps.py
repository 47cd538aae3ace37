"""Feedback and polish by the C++ part: the same steps as in `steps.py`, many times as fast.

Sums are in another order than PyTorch's, so that a few codes between two levels differ. They are the same for any
number of threads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowbit.formats import Block, Format, IntGrid, QTensor, TableGrid, stores
from lowbit.formats.packing import pack
from lowbit.kernels.core import core
from lowbit.kernels.thread_pool import pool
from lowbit.solvers.hessian import Factor
from lowbit.solvers.refit import refit_scales, refits
from lowbit.solvers.rounding import by_row

_MOST_LEVELS = 16  # of a table
_PRODUCTS = 1 << 37  # multiplications of a call, a few seconds, after which an interruption is heard


def core_takes(fmt: Format, weight: Tensor) -> bool:
    """Whether the C++ part is there and solves this: integers or a table of up to 16 levels, for a weight in this machine's memory."""
    known = isinstance(fmt.grid, IntGrid) or (isinstance(fmt.grid, TableGrid) and len(fmt.grid.table) <= _MOST_LEVELS)
    return known and weight.device.type == "cpu" and weight.numel() > 0 and core() is not None


class CoreSteps:
    """`isa`: a set of instructions by name, "" for the best."""

    def __init__(self, isa: str = "") -> None:
        self.isa = isa

    def feed(
        self, q: QTensor, weight: Tensor, factor: Factor, still: Tensor | None, shift: Tensor | None
    ) -> tuple[QTensor, Tensor, Tensor]:
        module: Any = core()
        weight = weight.contiguous()
        codes = torch.empty(weight.shape, dtype=torch.uint8)
        start, error = (torch.empty(len(weight), dtype=torch.float64) for _ in range(2))
        scale, offset = _by_row(q)
        mask, order = _mask(still), factor.perm.to(torch.int32)
        p = None if shift is None else shift.contiguous().numpy()
        for rows in _parts(weight):
            module.feed_errors(
                pool(), self.isa, _levels(q.format), _offsets(q.format), _group(q), weight[rows].numpy(), scale[rows].numpy(),
                None if offset is None else offset[rows].numpy(), factor.hessian.numpy(), factor.upper.contiguous().numpy(), p,
                order.numpy(), None if mask is None else mask[rows].numpy(), codes[rows].numpy(), start[rows].numpy(), error[rows].numpy(),
            )  # fmt: skip
        return replace(q, codes=pack(codes, q.format.grid.cardinality)), start, error

    def polish(
        self, q: QTensor, error: Tensor, target: Tensor, factor: Factor, still: Tensor | None, rounds: int
    ) -> tuple[QTensor, Tensor]:
        refit = refits(q)
        if not refit or _refits_here(q.format, still):
            return self._polished(q, target, factor, still, rounds, refit)
        helped = torch.ones(len(error), dtype=torch.bool)
        for _ in range(rounds):
            new = refit_scales(q, target, factor.hessian, still)
            new, e = self._polished(new, target, factor, still, 1, False)
            helped &= e < error
            if not bool(helped.any()):
                break
            q, error = by_row(helped, new, q), torch.where(helped, e, error)
        return q, error

    def _polished(
        self, q: QTensor, target: Tensor, factor: Factor, still: Tensor | None, rounds: int, refit: bool
    ) -> tuple[QTensor, Tensor]:
        module: Any = core()
        fmt, target = q.format, target.contiguous()
        codes, error = q.unpacked().contiguous().clone(), torch.empty(len(target), dtype=torch.float64)
        scale, offset = (None if part is None else part.clone() for part in _by_row(q))
        assert scale is not None
        mask, order = _mask(still), factor.perm.to(torch.int32)
        kept = fmt.scale if refit else "fp32", fmt.offset.store if refit and fmt.offset_kind == "min" else "fp32"  # type: ignore[union-attr]
        for rows in _parts(target):
            module.polish(
                pool(), self.isa, _levels(fmt), _offsets(fmt), _group(q), target[rows].numpy(), scale[rows].numpy(),
                None if offset is None else offset[rows].numpy(), factor.hessian.numpy(), order.numpy(),
                None if mask is None else mask[rows].numpy(), codes[rows].numpy(), error[rows].numpy(), rounds, refit,
                fmt.scale_signed, *kept,
            )  # fmt: skip
        found = replace(q, codes=pack(codes, fmt.grid.cardinality))
        if refit:
            found = replace(found, scale=stores.to_store(scale[None], str(fmt.scale)))
        if refit and fmt.offset_kind == "min":
            assert offset is not None
            found = replace(found, offset=stores.to_store(offset[None], kept[1]))  # type: ignore[arg-type]
        return found, error


def _refits_here(fmt: Format, still: Tensor | None) -> bool:
    """Scales and minima in plain types. Zeros that have to stay beside minima, and exponents, are PyTorch's."""
    plain = isinstance(fmt.scale, str) and (fmt.offset is None or isinstance(fmt.offset.store, str))
    return plain and fmt.exponent == 0 and (still is None or fmt.offset_kind != "min")


def _parts(weight: Tensor) -> list[slice]:
    rows, cols = weight.shape
    step = max(64, _PRODUCTS // cols**2 // 64 * 64)
    return [slice(begin, begin + step) for begin in range(0, rows, step)]


def _levels(fmt: Format) -> Any:
    module: Any = core()
    grid = fmt.grid
    if isinstance(grid, IntGrid):
        return module.Levels.integers(int(grid.lo), int(grid.hi))
    assert isinstance(grid, TableGrid)
    search = grid.search
    return module.Levels.table(search.sorted.numpy(), search.bounds.numpy(), search.codes.numpy())


def _offsets(fmt: Format) -> Any:
    module: Any = core()
    if fmt.offset is None:
        return module.Offsets.none
    return module.Offsets.minima if fmt.offset_kind == "min" else module.Offsets.points


def _group(q: QTensor) -> int:
    size = q.format.block.cols
    return q.shape[1] if size == -1 else min(size, q.shape[1])


def _by_row(q: QTensor) -> tuple[Tensor, Tensor | None]:
    """float32 [N, groups]: scales and offsets of each row, whatever block of rows they are shared by."""

    def spread(values: Tensor | None) -> Tensor | None:
        return None if values is None else _spread(values[0], q.format.block, q.shape[0])

    scale = spread(q.scales())
    assert scale is not None
    return scale, spread(q.offsets())


def _spread(values: Tensor, block: Block, rows: int) -> Tensor:
    if block.rows == 1:
        return values.contiguous()
    return values.repeat_interleave(rows if block.rows == -1 else block.rows, 0)[:rows].contiguous()


def _mask(still: Tensor | None) -> Tensor | None:
    return None if still is None else still.to(torch.uint8).contiguous()
