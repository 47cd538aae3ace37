"""SmoothQuant (Xiao et al. 2023): part of the range of the inputs moves into the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit.errors import RecipeError
from lowbit.solvers.stats import Stats
from lowbit.transforms.registry import transform
from lowbit.transforms.scale import Quantize, Scaling, equal_where_shared

_WHY = "puts norm weights into the linears and so undoes the smoothing"


@transform("group", undone_by={"fold": _WHY, "rotate": "folds and mixes the channels that were smoothed"})
def smooth(
    weights: Sequence[Tensor], stats: Stats, quantize: Quantize, shared: Tensor | None = None, *,
    alpha: float = 0.5, points: int = 0, bits: int = 8,
) -> Scaling:  # fmt: skip
    """Make large input channels smaller and their weights larger by as much, so that both can be rounded.

    Input channel k is divided by s_k = max|x_k|^alpha / max|w_k|^(1 - alpha) (SmoothQuant, equation 4). `weights` float32 [N_i, K] share one input; max|w_k| is over the rows of all. `shared` [K]: channels that must have
    the same scale. With `points` > 0 the exponent is searched in 0, 1/points, ..., 1 by the error of the
    product that `bits`-bit inputs (one scale for each token) and the quantized weights are expected to have, and nothing is
    scaled where no exponent lowers it.
    Channels whose input or weights are all zero keep the scale 1. RecipeError for options that exclude each other.
    """
    if points and alpha != 0.5:
        raise RecipeError(
            "smooth: points=... searches for alpha, so an alpha given beside it would be ignored; give one"
        )
    if bits < 2:
        raise RecipeError(f"smooth: inputs of {bits} bits cannot be smoothed for; bits is 2 or more")
    largest = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
    alphas = [i / points for i in range(points + 1)] if points else [alpha]
    tried = []
    for a in alphas:
        scale = equal_where_shared(_scale(stats.absmax.to(largest), largest, a), shared)
        tried.append(Scaling(scale, a, product_error(weights, stats, scale, quantize, bits), 0.0))
    best = min(tried, key=lambda t: t.error)
    ones = torch.ones_like(largest)
    plain = product_error(weights, stats, ones, quantize, bits)
    if points and not best.error < plain:
        return Scaling(ones, 0.0, plain, plain)
    return Scaling(best.scale, best.alpha, best.error, plain)


def _scale(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    alive = (inputs > 0) & (weights > 0)
    scale = torch.where(alive, inputs, 1.0) ** alpha / torch.where(alive, weights, 1.0) ** (1 - alpha)
    return torch.where(alive, scale, 1.0).clamp(min=1e-5, max=1e5)


def product_error(weights: Sequence[Tensor], stats: Stats, scale: Tensor, quantize: Quantize, bits: int = 8) -> float:
    """Expected squared error a token of (x / s)_q (W s)_q', without the inputs: from their statistics.

    Weights: sum over W of tr(E H E') with E = (W s)_q - W s and H that of x / s. Inputs: each token is rounded with the
    step D = 2 max_k |x_k / s_k| / (2^bits - 2), which adds D^2 / 12 a channel, times |W s|^2. The mean of the
    squared largest channel is taken as if channels were independent and normal.
    """
    scaled = stats.scaled(scale)
    step_squared = (
        4 * mean_square_of_largest(scaled.second_moment.diagonal(), float(scaled.absmax.max())) / (2**bits - 2) ** 2
    )
    total = 0.0
    for weight in weights:
        w = weight * scale
        total += quadratic(quantize(w, scaled) - w, scaled.second_moment)
        total += step_squared / 12 * float(w.double().square().sum())
    return total


def mean_square_of_largest(mean_square: Tensor, limit: float, points: int = 256) -> float:
    """E[max_k y_k^2] for independent normal y_k of mean squares [K], cut at `limit`: the integral of 2 t P(max > t) dt.

    P(max <= t) is the product of erf(t / sqrt(2 v_k)).
    """
    t = (torch.arange(points, dtype=torch.float64, device=mean_square.device) + 0.5) * (limit / points)
    inside = torch.special.erf(t[:, None] / (2 * mean_square.double().clamp(min=1e-30)).sqrt()).prod(1)
    return float((2 * t * (1 - inside)).sum() * (limit / points))


def quadratic(error: Tensor, second_moment: Tensor) -> float:
    """tr(E H E') = mean over tokens of |x E'|^2, for E [N, K] and H [K, K]."""
    return float(((error @ second_moment.to(error)) * error).double().sum())
