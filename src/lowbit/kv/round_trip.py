"""What reading stored keys or values gives: the reference that every cache and kernel is held to."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from lowbit.errors import RecipeError
from lowbit.formats import QTensor, encode
from lowbit.kv.side import CacheSide
from lowbit.solvers import fit_blocks
from lowbit.transforms.hadamard import has_hadamard, multiply


@dataclass(frozen=True, eq=False)
class Tables:
    """What calibration found for one side of one layer.

    levels: float32 [cardinality], learned levels on the normalised axis, for all heads. scale, offset: float32 [heads, width], of formats
    whose scales serve all tokens. channels: int64 [heads, outliers], those that are stored as float16.
    """

    levels: Tensor | None = None
    scale: Tensor | None = None
    offset: Tensor | None = None
    channels: Tensor | None = None


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


def store(x: Tensor, side: CacheSide) -> QTensor:
    """x [..., tokens, width] float32, already rotated where the side rotates, in the side's format. Not for calibrated sides."""
    assert side.format is not None
    scale, offset = fit_blocks(x, side.format, side.fit_used)
    return encode(x, side.format, scale, offset)


def round_trip(x: Tensor, side: CacheSide, tables: Tables | None = None) -> Tensor:
    """x [heads, tokens, width] float32 as it is read back when every token is stored, recent ones and sinks included.

    tables: what calibration found, for sides that need it.
    """
    if side.exact:
        return x
    if side.calibrated or side.outliers:
        raise NotImplementedError
    y = store(rotated(x) if side.rotate else x, side).dequantize()
    return rotated(y, inverse=True) if side.rotate else y
