"""What reading stored keys or values gives: the reference that every cache and kernel is held to."""

from __future__ import annotations

from torch import Tensor

from lowbit.errors import RecipeError
from lowbit.formats import QTensor, encode
from lowbit.kv.side import CacheSide
from lowbit.kv.storing import Storing, largest_channels
from lowbit.kv.storing import rotated as rotated
from lowbit.kv.tables import Tables, check_tables
from lowbit.solvers import fit_blocks


def store(x: Tensor, side: CacheSide) -> QTensor:
    """x [..., tokens, width] float32, already rotated where the side rotates, in the side's format. Not for calibrated sides."""
    assert side.format is not None
    scale, offset = fit_blocks(x, side.format, side.fit_used)
    return encode(x, side.format, scale, offset)


def round_trip(x: Tensor, side: CacheSide, tables: Tables | None = None) -> Tensor:
    """x [heads, tokens, width] float32 as it is read back when every token is stored, recent ones and sinks included.

    tables: what calibration found, for sides that need it: RecipeError without, SourceError where they are of another
    side or shape. Outlier channels are those of the tables; where there are none, `largest_channels` chooses them by the
    first tokens of x. A group of tokens that is not complete shares scales as if it were one.
    """
    if side.exact or not x.numel():
        return x
    heads, _, width = x.shape
    if tables is not None:
        check_tables(tables, side, heads, width)
    elif side.calibrated:
        raise RecipeError(
            f"{side} has numbers that are found on calibration text; give the tables of lowbit.kv.calibrate"
        )
    found = tables or Tables()
    channels = found.channels
    if side.outliers and channels is None:
        channels = largest_channels(x, side)
    storing = Storing(side, width, found)
    return storing.decode(storing.encode(x, channels), channels)
