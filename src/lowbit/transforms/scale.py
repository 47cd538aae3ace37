"""Scaling channels: x_k / s_k into the weight's column k times s_k, and where the division goes.

    y = x W'  =  (x / s) (W diag(s))'

The division goes into what makes x: the weight (and bias) of a norm, or the rows (and bias) of a linear. Where nothing
can take it, x itself is divided while the model runs (an input divisor). Statistics of x follow by `Stats.scaled`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import TransformError
from lowbit.solvers.stats import Stats
from lowbit.transforms.arch import Arch, Norm, Point, channels, shared_channels
from lowbit.transforms.fold import gain, stored_gain

# (weight [N, K] float32, statistics of its input) -> the weight that its stored form stands for, [N, K] float32.
Quantize = Callable[[Tensor, Stats], Tensor]


@dataclass(frozen=True)
class Scaling:
    """What a group transform chose: `scale` [K] > 0 to multiply columns by, the exponent behind it, and the error of
    the product that it expects, beside that without scaling (`plain`)."""

    scale: Tensor
    alpha: float
    error: float
    plain: float


def equal_where_shared(scale: Tensor, shared: Tensor | None) -> Tensor:
    """The geometric mean of the scales of channels with the same number in `shared` [K]; the scale as it is for None."""
    if shared is None:
        return scale
    _, group = torch.unique(shared, return_inverse=True)
    count = torch.bincount(group).to(scale)
    sums = torch.zeros_like(count).index_add_(0, group, scale.log())
    return (sums / count).exp()[group]


def apply_scale(
    arch: Arch, point: Point | None, tensors: Mapping[str, Tensor], scale: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Multiply columns of the consumers by `scale` [K] and divide the producer by it.

    `tensors` holds `point.producers` and `point.consumers` as the source stores them; those are returned new, in their
    own types, and the rest as it is, together with the scale that was applied. This one differs from `scale` by the
    rounding of a norm's weight to its type, which the consumers then take over, so that the product stays exact; a
    channel that the norm sets to zero keeps the scale 1. With `point` None the consumers are all of `tensors`, and
    the caller divides the input by the returned scale. TransformError for a scale that no producer can hold.
    """
    _check(scale)
    done = dict(tensors)
    if point is None:
        consumers: Sequence[str] = tuple(tensors)
    else:
        consumers = point.consumers
        made, scale = (
            _divided_norm(point, tensors, scale)
            if isinstance(point, Norm)
            else _divided_rows(point, arch, tensors, scale)
        )
        done |= made
    for name in consumers:
        weight = channels(tensors[name], arch, name)
        scaled = (weight.double() * scale.double()).to(weight.dtype)
        done[name] = channels(scaled, arch, name).contiguous()
    return done, scale


def _check(scale: Tensor) -> None:
    if not bool(torch.isfinite(scale).all()) or not bool((scale > 0).all()):
        raise TransformError(
            "a scale has to be positive and finite in every channel; check the statistics of the input"
        )


def _divided_norm(norm: Norm, tensors: Mapping[str, Tensor], scale: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    stored = tensors[norm.weight]
    before = gain(norm, stored.double())
    after = stored_gain(norm, before / scale.double()).to(stored.dtype)
    rounded = gain(norm, after.double())
    usable = (before != 0) & (rounded != 0) & torch.isfinite(rounded)
    exact = torch.where(usable, before / torch.where(usable, rounded, 1.0), 1.0)
    made = {norm.weight: torch.where(usable, after, stored)}
    if norm.bias is not None:
        bias = tensors[norm.bias]
        made[norm.bias] = (bias.double() / exact).to(bias.dtype)
    return made, exact.to(scale)


def _divided_rows(
    point: Point, arch: Arch, tensors: Mapping[str, Tensor], scale: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    assert not isinstance(point, Norm)
    rows = point.rows()
    shared = shared_channels(point)
    if shared is not None and not torch.allclose(equal_where_shared(scale, shared), scale, rtol=1e-5):
        raise TransformError(
            f"{point.consumer}: channels that {point.producer} makes with one row have different scales; "
            "give shared_channels(point) to the transform that finds the scale"
        )
    stored = tensors[point.producer]
    weight = channels(stored, arch, point.producer).clone()
    divisor = torch.ones(weight.shape[0], dtype=torch.float64)
    divisor[rows] = scale.double().cpu()
    divisor = divisor.to(weight.device)
    made = {
        point.producer: channels(
            (weight.double() / divisor[:, None]).to(weight.dtype), arch, point.producer
        ).contiguous()
    }
    if point.bias is not None:
        bias = tensors[point.bias]
        made[point.bias] = (bias.double() / divisor).to(bias.dtype)
    return made, scale
