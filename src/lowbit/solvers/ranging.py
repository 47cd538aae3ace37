"""Which power of two a weight is divided by, so that its scales lie in the range of the type that stores them.

float16 holds scales from 2^-14 (the smallest with all bits; 2^-24 is the smallest at all) to 65504. A weight whose groups
need others is stored as w / 2^e, and the reader multiplies by 2^e: the format's exponent. Multiplying by powers of two rounds
nothing, so the codes are those of a weight of usual size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.formats import Format, IntGrid, stores
from lowbit.formats.blocks import reduce_blocks
from lowbit.formats.format import FARTHEST, Store
from lowbit.solvers.in_core import block_peaks

_ROOM = 2  # binades that a fit, error feedback or a refit may enlarge the largest scale by


@dataclass(frozen=True)
class Ranged:
    """A format, with an exponent where the weight needs one; `doubtful`: whether its scales may still lose single blocks."""

    format: Format
    doubtful: bool = False


def in_range(weight: Tensor, fmt: Format) -> Format:
    """`fmt`, with an exponent where scales, minima or learned levels of `weight` would leave the range of their type."""
    return ranged(weight, fmt).format


def ranged(weight: Tensor, fmt: Format) -> Ranged:
    """`in_range`, and whether the blocks are to be looked at afterwards.

    `weight` of any shape and float type, finite. What is stored of a block is foreseen from its largest magnitude: that over the
    reach of the grid for a scale, itself for a minimum or a level. The largest then lands below the end of the range,
    which leaves about 2^26 in float16 downwards for the smallest. A format that has an exponent keeps it.
    """
    if not weight.numel():
        return Ranged(fmt)
    block = fmt.block if fmt.codebook is None or fmt.scale is not None else fmt.codebook
    peaks = block_peaks(weight, block)
    if peaks is None:
        (peaks,) = reduce_blocks(lambda x: x.abs().amax(1), block, weight)
    assert peaks is not None
    kept = []
    if fmt.scale is None:
        kept += _stored(peaks, fmt.levels_store)
    else:
        kept += _stored(peaks / _reach(fmt), fmt.scale)
    if fmt.offset_kind == "min":
        kept += _stored(peaks, fmt.offset.store)  # type: ignore[union-attr]
    if not fmt.exponent and not all(_holds(values, name) for values, name in kept):
        found = max((_to_the_top(values, name) for values, name in kept if float(values.max()) > 0), default=0)
        fmt = replace(fmt, exponent=max(-FARTHEST, min(FARTHEST, found)))
    nested = any(isinstance(store, Format) for store in (fmt.scale, fmt.offset.store if fmt.offset else None))
    return Ranged(fmt, nested or any(_drowns(values, name, fmt.exponent) for values, name in kept))


class Lost:
    """Counts the blocks of a weight that came back as something else, over the slabs that it is solved in.

    A block of a row counts when it is off by three times as much as the slab as a whole, and by 30 % at least: its scale is
    so small next to the largest that no exponent serves both, or that a nested scale rounds it to nothing. Blocks of several
    rows share a scale by intent.
    """

    def __init__(self) -> None:
        self.count = self.blocks = 0

    def add(self, x: Tensor, dense: Tensor, fmt: Format, error: float) -> None:
        """A slab, what it came back as, and |x - dense| / |x|."""
        if fmt.codebook is not None or fmt.block.rows != 1 or not x.numel():
            return
        off, size = reduce_blocks(_norms, fmt.block, x, dense)
        assert off is not None and size is not None
        self.count += int(((off > max(0.3, 3 * error) * size) & (size > 0)).sum())
        self.blocks += off.numel()

    def warning(self, fmt: Format) -> str:
        """What is to be said; empty where nothing is lost."""
        if not self.count:
            return ""
        return (
            f"{self.count:,} of {self.blocks:,} blocks are so small beside the others that the scales of {fmt} "
            "do not hold them: they come back more than 30 % off; scales in float32 (s=fp32) hold them"
        )


def _norms(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.linalg.vector_norm(x - y, dim=1), torch.linalg.vector_norm(x, dim=1)


def _reach(fmt: Format) -> float:
    """Levels between the largest magnitude of a block and what its scale is."""
    if fmt.codebook is not None:
        return 1.0
    if fmt.offset is not None or isinstance(fmt.grid, IntGrid):
        return max(fmt.grid.hi - fmt.grid.lo, 2.0) / 2
    return fmt.grid.reach


def _stored(values: Tensor, how: Store) -> list[tuple[Tensor, str]]:
    """What is kept in a plain type of per-block values: themselves, or the scales of a nested format."""
    if isinstance(how, str):
        return [(values, how)]
    (peaks,) = reduce_blocks(lambda x: x.abs().amax(1), how.block, values.reshape(-1))
    assert peaks is not None
    return _stored(peaks / max(how.grid.hi, 1.0), how.scale)  # type: ignore[arg-type]


def _holds(values: Tensor, name: str) -> bool:
    """Whether a store holds these as they are. What is so far below the largest that no power of two brings both into its
    range, as the rows of dead neurons may be, does not count."""
    low, high = stores.span(name)
    largest = float(values.max())
    if float(values.min()) >= low and largest <= high / 2:
        return True
    alive = values[values > largest * (low / high * 2.0**-7)]
    return not alive.numel() or (float(alive.min()) >= low and largest <= high / 2)


def _drowns(values: Tensor, name: str, exponent: int) -> bool:
    """Whether a store loses bits of the smallest of these."""
    if not exponent and float(values.min()) >= stores.span(name)[0]:
        return False
    alive = values[values > 0]
    return bool(alive.numel()) and math.ldexp(float(alive.min()), -exponent) < stores.span(name)[0]


def _to_the_top(values: Tensor, name: str) -> int:
    """The power of two that leaves the largest of these _ROOM binades below the end of a store."""
    return math.frexp(float(values.max()))[1] - math.frexp(stores.span(name)[1])[1] + _ROOM
