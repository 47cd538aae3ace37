"""Learning: from keys or values that a layer made on calibration text to its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.formats import Format
from lowbit.formats.nearest import inverse
from lowbit.kv.side import CacheSide
from lowbit.kv.storing import LearnedGrid, Storing, largest_channels
from lowbit.kv.tables import AXIS, Tables
from lowbit.solvers.fitting import run_fit
from lowbit.solvers.methods.kmeans import lloyd

_ROUNDS = 3  # of levels and scales in turn
_STEPS = 30  # of Lloyd's iteration


@dataclass(frozen=True, eq=False)
class Observed:
    """x [..., heads, tokens, width], and the gradient of the loss with respect to it where it was asked for."""

    x: Tensor
    gradient: Tensor | None = None

    @staticmethod
    def joined(parts: Sequence[Observed]) -> Observed:
        """All of them as float32 [heads, tokens, width], one sequence after the other."""

        def join(tensors: list[Tensor]) -> Tensor:
            flat = [t.float().reshape(-1, *t.shape[-3:]) for t in tensors]
            return torch.cat([t.transpose(0, 1).reshape(t.shape[1], -1, t.shape[3]) for t in flat], dim=1)

        gradients = [part.gradient for part in parts if part.gradient is not None]
        return Observed(join([part.x for part in parts]), join(gradients) if len(gradients) == len(parts) else None)


def learn_tables(side: CacheSide, seen: Observed) -> Tables:
    """Tables for a side from x float32 [heads, tokens, width], without sinks.

    Outlier channels: those with the largest mean magnitude. What is left is rotated where the side rotates, and the gradient
    with it, so that the weight of an error is that of what is stored.
    """
    x, gradient = seen.x, seen.gradient
    channels = None
    if side.outliers:
        # all tokens count here, and sinks are gone already
        channels = largest_channels(x, replace(side, sinks=0), tokens=x.shape[1])
    if not side.calibrated:
        return Tables(channels=channels)
    storing = Storing(side, x.shape[-1], Tables(channels=channels))
    y, _ = storing.prepared(x, channels)
    weight = None
    if gradient is not None:
        weight = storing.prepared(gradient, channels)[0].square()
        mean = float(weight.mean())
        # the floor lets a number without any gradient count for a little
        weight = weight / mean + 1e-3 if mean > 0 else None
    assert side.format is not None
    if side.format.codebook is None:
        scale, offset = _static(y, weight, side)
        return Tables(None, scale, offset, channels)
    if side.static:
        levels, scale, offset = _per_channel(y, weight, side)
        return Tables(levels, scale, offset, channels)
    return Tables(_per_token(y, weight, side), None, None, channels)


def _static(y: Tensor, weight: Tensor | None, side: CacheSide) -> tuple[Tensor, Tensor | None]:
    """Scales and offsets (the real value of level zero) of fixed levels, by the side's fit: float32 [heads, width]."""
    fmt = side.format
    assert fmt is not None
    scale, offset = run_fit(y, fmt, side.fit_used, weight if side.fit_used.method.weighs else None)
    if offset is not None and fmt.offset_kind != "min":
        offset = -scale * (offset.round() if fmt.offset_kind == "zero" else offset)
    elif offset is not None:
        offset = -scale * offset
    return _wide(scale, y, fmt), None if offset is None else _wide(offset, y, fmt)


def _per_channel(y: Tensor, weight: Tensor | None, side: CacheSide) -> tuple[Tensor, Tensor, Tensor]:
    """Levels, and the scale and offset of each block of channels.

    Channels are brought to mean 0 and deviation 1, levels are learned on all of them together, and then levels and scales
    (by weighted least squares, or by the side's fit where it names one) are improved in turn.
    """
    fmt = side.format
    assert fmt is not None
    v = torch.ones_like(y) if weight is None else weight
    cols = fmt.block.cols
    scale, offset = _moments(y, v, cols)
    levels = torch.zeros(fmt.grid.cardinality)
    for last in (False,) * (_ROUNDS - 1) + (True,):
        z = (y - offset) * inverse(scale)
        levels = lloyd(z.reshape(1, -1), (v * scale.square()).expand_as(z).reshape(1, -1), len(levels), _STEPS)[0]
        levels, unit = _whole(levels, float(levels.abs().max()))
        scale = scale * unit
        if last and side.fit is not None:
            fixed = replace(fmt, grid=LearnedGrid("learned", tuple(levels.tolist())), codebook=None)
            fitted, _ = run_fit(y - offset, fixed, side.fit, v if side.fit.method.weighs else None)
            scale = _wide(fitted, y, fmt)[:, None]
        else:
            scale, offset = _least_squares(y, v, levels, scale, offset, cols)
    return levels, scale[:, 0].contiguous(), offset[:, 0].contiguous()


def _per_token(y: Tensor, weight: Tensor | None, side: CacheSide) -> Tensor:
    """Levels for scales that each token finds for itself, on the axis that the fit gives to its largest magnitude."""
    fmt = side.format
    assert fmt is not None
    v = torch.ones_like(y) if weight is None else weight
    count = fmt.grid.cardinality
    levels = torch.linspace(-AXIS, AXIS, count).round()
    for _ in range(_ROUNDS):
        fixed = replace(fmt, grid=LearnedGrid("learned", tuple(levels.tolist())), codebook=None)
        per_block, _ = run_fit(y, fixed, side.fit_used)
        scale = per_block.repeat_interleave(fmt.block.cols, -1)[..., : y.shape[-1]] if fmt.block.cols > 0 else per_block
        z = y * inverse(scale)
        found = lloyd(z.reshape(1, -1), (v * scale.square()).expand_as(z).reshape(1, -1), count, _STEPS)[0]
        levels, _ = _whole(found.clamp(-AXIS, AXIS), AXIS)
    return levels


def _moments(y: Tensor, v: Tensor, cols: int) -> tuple[Tensor, Tensor]:
    """Weighted deviation and mean of each block of channels, [heads, 1, width]."""
    mass, first, second = (_blockwise(t, cols) for t in (v, v * y, v * y * y))
    mean = first / mass
    deviation = (second / mass - mean.square()).clamp_min(0).sqrt()
    return torch.where(deviation > 0, deviation, 1.0), mean


def _least_squares(
    y: Tensor, v: Tensor, levels: Tensor, scale: Tensor, offset: Tensor, cols: int
) -> tuple[Tensor, Tensor]:
    """The scale and offset that are best for the levels that numbers have under these."""
    q = LearnedGrid("learned", tuple(levels.tolist())).round((y - offset) * inverse(scale))
    mass, vq, vy, vqq, vqy = (_blockwise(t, cols) for t in (v, v * q, v * y, v * q * q, v * q * y))
    determinant = mass * vqq - vq * vq
    slope = (mass * vqy - vq * vy) / determinant
    good = (determinant > 1e-6 * mass * vqq) & (slope > 0)
    slope = torch.where(good, slope, scale)
    return slope, torch.where(good, (vy - slope * vq) / mass, offset)


def _blockwise(x: Tensor, cols: int) -> Tensor:
    """Sums over tokens and the channels of a block, [heads, 1, width] with the sum of its block for every channel."""
    total, width = x.double().sum(1, keepdim=True), x.shape[-1]
    cols = width if cols == -1 else cols
    if cols > 1:
        block = torch.arange(width, device=x.device) // cols
        sums = total.new_zeros((*total.shape[:-1], int(block[-1]) + 1)).index_add_(-1, block, total)
        total = sums.index_select(-1, block)
    return total.float()


def _wide(per_block: Tensor, y: Tensor, fmt: Format) -> Tensor:
    """[heads, 1, column blocks] as [heads, width]."""
    width = y.shape[-1]
    cols = width if fmt.block.cols == -1 else fmt.block.cols
    return per_block.view(y.shape[0], -1).repeat_interleave(cols, -1)[:, :width].contiguous()


def _whole(levels: Tensor, reach: float) -> tuple[Tensor, float]:
    """Levels as whole numbers, of which AXIS stands for `reach`, and what one of them stands for.

    One level at least lies on each side of zero.
    """
    unit = reach / AXIS if reach > 0 else 1.0
    whole = (levels / unit).round().clamp(-AXIS, AXIS)
    whole[0], whole[-1] = min(float(whole[0]), -1.0), max(float(whole[-1]), 1.0)
    return whole, unit
