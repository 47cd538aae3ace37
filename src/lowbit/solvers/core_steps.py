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
from lowbit.solvers.steps import improved

_MOST_LEVELS = 16  # of a table
_PRODUCTS = 1 << 37  # multiplications of a call, a few seconds, after which an interruption is heard


def core_takes(fmt: Format, weight: Tensor) -> bool:
    """Whether the C++ part is there and solves this: integers or a table of up to 16 levels, for a weight in this machine's memory."""
    known = isinstance(fmt.grid, IntGrid) or (isinstance(fmt.grid, TableGrid) and len(fmt.grid.table) <= _MOST_LEVELS)
    return known and weight.device.type == "cpu" and weight.numel() > 0 and core() is not None


class CoreSteps:
    """`isa`: a set of instructions by name, "" for the best. `most_kept`: bytes of products of groups with H that 16 rows keep from
    one round to the next; more are computed again."""

    def __init__(self, isa: str = "", most_kept: int = 24 << 20) -> None:
        self.isa, self.most_kept = isa, most_kept

    def solve(
        self, q: QTensor, target: Tensor, factor: Factor, still: Tensor | None, shift: Tensor | None, rounds: int
    ) -> tuple[QTensor, Tensor, Tensor]:
        refit = refits(q)
        if not refit or _refits_here(q.format, still):
            return self._run(q, target, factor, still, (shift,), rounds, refit)
        q, start, error = self._run(q, target, factor, still, (shift,), 0, False)

        def once(q: QTensor) -> tuple[QTensor, Tensor]:
            new = refit_scales(q, target, factor.hessian, still)
            new, _, e = self._run(new, target, factor, still, None, 1, False)
            return new, e

        q, error = improved(q, error, rounds, once)
        return q, start, error

    def _run(
        self, q: QTensor, target: Tensor, factor: Factor, still: Tensor | None, feed: tuple[Tensor | None] | None,
        rounds: int, refit: bool,
    ) -> tuple[QTensor, Tensor, Tensor]:  # fmt: skip
        """`feed`: the shift of error feedback, or None where `q` has codes."""
        module: Any = core()
        fmt, count = q.format, len(target)
        codes = torch.empty(target.shape, dtype=torch.uint8) if feed is not None else q.unpacked().clone()
        start, error = (torch.empty(count, dtype=torch.float64) for _ in range(2))
        scale, offset = _by_row(q)
        arrays = (target.contiguous(), scale, offset, _mask(still), codes, error, start)
        matrices = [None if m is None else m.contiguous().numpy() for m in (factor.root, *(feed or ()))]
        for rows in _parts(target):
            x, s, z, mask, c, e, nearest = (None if part is None else part[rows].numpy() for part in arrays)
            module.solve(
                pool(), self.isa, _levels(fmt), _offsets(fmt), _group(q), x, s, z, factor.hessian.numpy(),
                factor.perm.to(torch.int32).numpy(), mask, c, e, feed=None if feed is None else (*matrices, nearest), rounds=rounds,
                refit=refit, signed_scales=fmt.scale_signed, scale_store=fmt.scale if refit else "fp32",
                offset_store=_store(fmt) if refit else "fp32", most_kept=self.most_kept,
            )  # fmt: skip
        found = replace(q, codes=pack(codes, fmt.grid.cardinality))
        if refit and rounds:
            found = replace(found, scale=stores.to_store(scale[None], str(fmt.scale)))
            if fmt.offset_kind == "min" and offset is not None:
                found = replace(found, offset=stores.to_store(offset[None], _store(fmt)))
        return found, start, error


def _store(fmt: Format) -> str:
    """How minima are kept that are refitted."""
    return str(fmt.offset.store) if fmt.offset is not None and fmt.offset_kind == "min" else "fp32"


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
        return module.GridLevels((int(grid.lo), int(grid.hi)))
    assert isinstance(grid, TableGrid)
    levels, bounds, codes = grid.by_bounds()
    floats = (torch.tensor(levels).numpy(), torch.tensor(bounds[:-1]).numpy())
    return module.GridLevels(table=(*floats, torch.tensor(codes, dtype=torch.uint8).numpy()))


def _offsets(fmt: Format) -> Any:
    module: Any = core()
    if fmt.offset is None:
        return module.Offsets.none
    return module.Offsets.minima if fmt.offset_kind == "min" else module.Offsets.points


def _group(q: QTensor) -> int:
    size = q.format.block.cols
    return q.shape[1] if size == -1 else min(size, q.shape[1])


def _by_row(q: QTensor) -> tuple[Tensor, Tensor | None]:
    """float32 [N, groups], new: scales and offsets of each row, whatever block of rows they are shared by."""

    def spread(values: Tensor | None) -> Tensor | None:
        return None if values is None else _spread(values[0], q.format.block, q.shape[0]).clone()

    scale = spread(q.scales())
    assert scale is not None
    return scale, spread(q.offsets())


def _spread(values: Tensor, block: Block, rows: int) -> Tensor:
    if block.rows == 1:
        return values.contiguous()
    return values.repeat_interleave(rows if block.rows == -1 else block.rows, 0)[:rows].contiguous()


def _mask(still: Tensor | None) -> Tensor | None:
    return None if still is None else still.to(torch.uint8).contiguous()
