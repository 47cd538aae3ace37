"""What rounding a weight to each of several formats costs it, from a sample of its rows.

The cost of a format is a sum over the rows of a weight, and a layer has thousands of weights in each row, so a sample of rows
tells it: systematic sampling with probabilities proportional to size (Madow 1949), where the size of a row is about what
its error will cost, and each row that is drawn counts for one over its probability (Horvitz and Thompson 1952). Rows that
carry more than their share are always in it. All formats see the same rows, so that what a row has in common for all of
them moves the costs of a layer together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.formats import Format, QTensor, encode, stores
from lowbit.interchange.tensors import TensorPlan
from lowbit.planning.tensor import SLAB, by_rows
from lowbit.recipes.recipe import Recipe
from lowbit.solvers import Call, fit_blocks
from lowbit.solvers.ranging import in_range
from lowbit.weights.finite import check_finite

SAMPLED = 1 << 15  # weights of a tensor that are rounded, unless it has fewer
_FEWEST_ROWS = 64
_EVEN = 0.2  # of the probability goes by the norm of a row alone: what costs nothing still tells the relative error


@dataclass(frozen=True)
class Rows:
    """Rows of a weight [..., in] seen as a matrix, int64 [n], and how many rows each stands for, float64 [n]."""

    index: Tensor
    times: Tensor


@dataclass(frozen=True)
class _Part:
    """Rows [..., rows, in] in float32 of a weight, of its Fisher information and of its importance."""

    weight: Tensor
    fisher: Tensor | None
    importance: Tensor | None
    times: Tensor | None


@torch.no_grad()
def rounding_costs(
    t: TensorPlan, weight: Tensor, fisher: Tensor | None, formats: Sequence[Format]
) -> dict[Format, tuple[float, float]]:
    """For each format sum_ij fisher_ij (w_q - w)_ij^2 and |w_q - w| / |w|, of a weight [..., out, in] rounded to nearest.

    Scales are searched under the mean of `fisher` [..., out, in] over the outputs: E[g^2 x_j^2] for each input j. Both are
    exact where a weight has at most `SAMPLED` elements or `_FEWEST_ROWS` rows, and where a format ties rows together.
    WeightError when what is read of the weight is not finite.
    """
    importance = None
    if fisher is not None:
        mean = fisher.mean(-2, keepdim=True)
        importance = torch.where(mean.amax(-1, keepdim=True) > 0, mean, 1.0).clamp_min(float(mean.max()) * 1e-6)
    drawn = _draw(t.name, weight, fisher)
    sample = None if drawn is None else _sampled(weight, fisher, importance, drawn)
    return {
        fmt: _cost(t.name, [sample] if sample and _rows_alone(fmt) else _slabs(weight, fisher, importance, fmt), fmt)
        for fmt in formats
    }


def sampled_rows(size: Tensor, count: int) -> Rows:
    """About `count` rows, each with a probability proportional to its size, 1 at most.

    `size` float64 [n], at least 0 and somewhere above it. Systematic, from half a step: no random numbers, and rows that are
    neighbours (of one head, one expert) are spread evenly.
    """
    certain = torch.zeros_like(size, dtype=torch.bool)
    while True:
        left = torch.where(certain, 0.0, size)
        probability = left * ((count - int(certain.sum())) / left.sum().clamp_min(1e-300))
        if not bool((more := probability >= 1).any()):
            break
        certain |= more
    steps = (probability.cumsum(0) + 0.5).floor()
    picked = certain | (steps > torch.cat([steps.new_zeros(1), steps[:-1]]))
    index = picked.nonzero()[:, 0]
    return Rows(index, torch.where(certain, 1.0, 1 / probability)[index])


def _draw(name: str, weight: Tensor, fisher: Tensor | None) -> Rows | None:
    """Rows to round; None for all of them."""
    count = max(_FEWEST_ROWS, SAMPLED // max(1, weight.shape[-1]))
    if weight.numel() // max(1, weight.shape[-1]) <= count:
        return None
    norms = torch.linalg.vector_norm(weight, dim=-1, dtype=torch.float64).square().reshape(-1)
    if not bool(norms.isfinite().all()):
        check_finite(weight, name)
    if not float(norms.sum()) > 0:
        return None
    size = norms / norms.sum()
    if fisher is not None:
        cost = fisher.sum(-1).double().reshape(-1) * size
        size = (1 - _EVEN) * cost / cost.sum() + _EVEN * size if float(cost.sum()) > 0 else size
    return sampled_rows(size, count)


def _sampled(weight: Tensor, fisher: Tensor | None, importance: Tensor | None, rows: Rows) -> _Part:
    """The rows of a sample."""

    def of(x: Tensor) -> Tensor:
        at = rows.index if x.dim() == 2 else (rows.index // x.shape[-2], rows.index % x.shape[-2])
        return x[at].to(torch.float32).contiguous()

    if importance is not None:
        importance = importance[..., 0, :].reshape(-1, importance.shape[-1])
        importance = importance[rows.index // weight.shape[-2]] if len(importance) > 1 else importance
    return _Part(of(weight), None if fisher is None else of(fisher), importance, rows.times)


def _rows_alone(fmt: Format) -> bool:
    """Whether the rows of a matrix can be rounded one without the others."""
    nested = any(isinstance(store, Format) for store in (fmt.scale, fmt.offset.store if fmt.offset else None))
    return not nested and fmt.block.rows == 1 and (fmt.codebook is None or fmt.codebook.rows == 1)


def _slabs(weight: Tensor, fisher: Tensor | None, importance: Tensor | None, fmt: Format) -> Iterator[_Part]:
    """A weight in slabs of rows or matrices, one in float32 at a time."""
    whole = weight.numel() <= SLAB or not by_rows(fmt, tuple(weight.shape))
    rows = weight.shape[0] if whole else max(1, SLAB // weight[0].numel())
    for start in range(0, weight.shape[0], rows):
        at = slice(start, start + rows)
        v = importance[at] if importance is not None and importance.dim() > 2 else importance
        yield _Part(weight[at].to(torch.float32).contiguous(), None if fisher is None else fisher[at], v, None)


def _cost(name: str, parts: Sequence[_Part] | Iterator[_Part], fmt: Format) -> tuple[float, float]:
    """sum fisher (w_q - w)^2 and |w_q - w| / |w| over parts of a weight."""
    cost = changed = norm = 0.0
    for part in parts:
        x = part.weight
        check_finite(x, name)
        d = _rounded(x, fmt, part.importance).sub_(x).square_()
        changed += _total(d, part.times)
        norm += float(torch.linalg.vector_norm(x)) ** 2 if part.times is None else _total(x.square(), part.times)
        if part.fisher is not None:
            cost += _total(d.mul_(part.fisher), part.times)
    return cost, math.sqrt(changed / norm) if norm else 0.0


def _total(x: Tensor, times: Tensor | None) -> float:
    """The sum of x, or of its rows [n, in], each `times` [n] over."""
    return float(x.sum(dtype=torch.float64) if times is None else (x.sum(-1, dtype=torch.float64) * times).sum())


def _rounded(weight: Tensor, fmt: Format, importance: Tensor | None) -> Tensor:
    """The weight as it is read back when rounded to nearest, float32; a new tensor.

    `importance`: of the weight's shape or broadcastable to it; not used by learned codebooks.
    """
    fmt = in_range(weight, fmt)
    if fmt.codebook is not None:
        quantized: QTensor = Recipe(fmt).solver_for(fmt)(weight, fmt, Call("search"), None)
        return quantized.dequantize()
    usual = stores.times_power(weight, -fmt.exponent)
    made = encode(usual, fmt.plain, *fit_blocks(usual, fmt.plain, Call("search"), importance))
    return replace(made, format=fmt).dequantize()
