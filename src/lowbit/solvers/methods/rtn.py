"""rtn: every weight to its nearest level."""

from __future__ import annotations

from torch import Tensor

from lowbit.formats import Format, QTensor, encode
from lowbit.solvers.fitting import fit_blocks
from lowbit.solvers.registry import Call, solver


@solver()
def rtn(weight: Tensor, fmt: Format, fit: Call, importance: Tensor | None = None) -> QTensor:
    """Round to nearest: code = argmin |w - s (level - z)| for each weight on its own.

    `weight` float [..., rows, cols], finite. Error: half the gap between levels times the scale, wherever the
    fit does not clip.
    """
    scale, offset = fit_blocks(weight, fmt, fit, importance)
    return encode(weight, fmt, scale, offset)
