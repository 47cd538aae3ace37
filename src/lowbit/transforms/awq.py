"""AWQ (Lin et al. 2023): channels with large inputs are scaled up before the weights are rounded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit.errors import RecipeError, TransformError
from lowbit.solvers.stats import Stats
from lowbit.transforms.registry import transform
from lowbit.transforms.scale import Quantize, Scaling, equal_where_shared
from lowbit.transforms.smooth import quadratic


@transform(
    "group",
    undone_by={
        "fold": "puts norm weights into the linears and so undoes the scaling",
        "rotate": "folds and mixes the channels that were scaled",
    },
    replaces={"smooth": "both choose the scale of the same channels, and the later one decides alone"},
)
def awq(
    weights: Sequence[Tensor], stats: Stats, quantize: Quantize, shared: Tensor | None = None, *, points: int = 20
) -> Scaling:
    """Scale up the columns of a weight that are multiplied with large inputs, so that rounding changes them less.

    s_k = mean|x_k|^alpha, with the alpha that makes |x W' - (x / s) (W s)_q'| least. AWQ section 3.2, equations 4 and 5; alpha in 0, 1/points, ..., (points - 1)/points, and s divided by
    sqrt(max s * min s). The error comes from the second moment H of x: sum over W of tr(E H E') with
    E = (W s)_q / s - W, which is the mean over tokens of the squared error of the product, so no input is needed.
    `weights` float32 [N_i, K] share one input. alpha = 0 is among the candidates: the error is never above that of
    no scaling. `shared` [K]: channels that must have the same scale. RecipeError for points=0.
    """
    if points < 1:
        raise RecipeError("awq: points is how many exponents are tried, 1 or more; to scale nothing leave awq out")
    second = stats.second_moment
    tried = []
    for i in range(points):
        alpha = i / points
        scale = equal_where_shared(_normalised(stats.mean_abs.to(weights[0]), alpha), shared)
        scaled = stats.scaled(scale)
        error = sum(quadratic(quantize(w * scale, scaled) / scale - w, second) for w in weights)
        tried.append((error, alpha, scale))
    error, alpha, scale = min(tried, key=lambda t: t[0])
    return Scaling(scale, alpha, error, tried[0][0])


def _normalised(mean_abs: Tensor, alpha: float) -> Tensor:
    """mean_abs^alpha over the root of its largest times its smallest value; 1 where the input is always zero."""
    alive = mean_abs > 0
    if not bool(alive.any()):
        return torch.ones_like(mean_abs)
    scale = mean_abs[alive].clamp(min=1e-4) ** alpha
    out = torch.ones_like(mean_abs)
    out[alive] = scale / (scale.max() * scale.min()).sqrt()
    return out


def clip_search(
    weight: Tensor, stats: Stats, quantize: Quantize, group: int = -1, *, points: int = 20, least: float = 0.5
) -> Tensor:
    """The weight with each group of a row clipped to the share of its absmax that makes the group's error least.

    AWQ's second step (the authors' `auto_clip`): shares 1, 1 - 1/points, ... down to `least`. The error of a group g is
    e H_gg e', with e what clipping and rounding change and H_gg the block of the second moment, so it is the exact
    error of the product with the other groups left alone. weight float32 [N, K]; `group` -1: the whole row.
    `quantize` must treat these groups apart. Fits that search for their own range gain little from it.
    """
    n, k = weight.shape
    size = k if group == -1 else group
    if k % size:
        raise TransformError(f"groups of {size} do not divide {k} channels; clip whole rows with group -1")
    starts = range(0, k, size)
    blocks = torch.stack([stats.second_moment[i : i + size, i : i + size] for i in starts]).to(weight)
    largest = weight.reshape(n, -1, size).abs().amax(-1, keepdim=True)
    best, least_error = weight, torch.full((n, k // size), torch.inf, dtype=weight.dtype, device=weight.device)
    for i in range(int(points * (1 - least)) + 1):
        limit = largest * (1 - i / points)
        clipped = weight.reshape(n, -1, size).clamp(-limit, limit).reshape(n, k)
        e = (quantize(clipped, stats) - weight).reshape(n, -1, size)
        error = torch.einsum("ngi,gij,ngj->ng", e, blocks, e)
        better = error < least_error
        least_error = torch.where(better, error, least_error)
        best = torch.where(better.repeat_interleave(size, dim=1), clipped, best)
    return best
