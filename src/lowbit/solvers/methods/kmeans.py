"""kmeans: levels learned from the weights, one set per tensor, channel or group."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import RecipeError
from lowbit.formats import Format, QTensor, TableGrid, encode
from lowbit.formats.blocks import map_blocks, reduce_blocks
from lowbit.solvers.fitting import fit_blocks
from lowbit.solvers.registry import Call, solver

# A block with more elements is summarised by this many equal bins before its levels are sought.
_BINS = 1 << 14
_LARGE = 1 << 20


@solver
def kmeans(
    weight: Tensor, fmt: Format, fit: Call, importance: Tensor | None = None, *, iterations: int = 30, rounds: int = 2
) -> QTensor:
    """One-dimensional k-means of the weights of each codebook block, weighted by the importance if given.

    Lloyd's iteration from a deterministic start (see `lloyd`). For formats with a scale per block and a codebook
    per larger block (`cb=`), the weights are first divided by their block's scale, and scale and codebook
    are improved in turn, `rounds` times: the levels learn from x / s with weight v s^2, then the fit searches
    new scales on the levels found. Error: a local minimum of sum v (w - w_q)^2, below that of evenly spaced
    levels, from which no start is far. Source: Lloyd 1982; Han et al. 2016, "Deep Compression", section 3.
    """
    if fmt.codebook is None:
        raise RecipeError(f"{fmt} has fixed levels; kmeans needs a learned grid such as kmeans4:channel")
    count = fmt.grid.cardinality
    importance = None if importance is None else importance.expand(weight.shape).contiguous()

    def learn(x: Tensor, v: Tensor | None) -> Tensor:
        return lloyd(x, v, count, iterations)

    if fmt.scale is None:
        (levels,) = reduce_blocks(learn, fmt.codebook, weight, importance)
        return encode(weight, fmt, levels=_or_empty(levels, fmt, weight))

    if fmt.codebook.rows != -1 or fmt.codebook.cols != -1:
        raise RecipeError(f"{fmt}: a codebook beside a scale is shared by the whole tensor; write cb=tensor")
    plain = Format(TableGrid("start", tuple(torch.linspace(-1, 1, count).tolist())), fmt.block, fmt.scale)
    scale = fit_blocks(weight, plain, Call("absmax"), importance)[0]
    levels = None
    for step in range(rounds + 1):
        normal = map_blocks(lambda x, s: x * _inverse(s)[:, None], fmt.block, weight, scale, dtype=torch.float32)
        v = map_blocks(lambda x, s: x * s.square()[:, None], fmt.block, _ones(weight, importance), scale, dtype=torch.float32)
        levels = _or_empty(reduce_blocks(learn, fmt.codebook, normal, v)[0], fmt, weight)
        if step == rounds or weight.numel() == 0:
            break
        shared = [levels[b, 0, 0].to(torch.float16).double().tolist() for b in range(levels.shape[0])]
        matrices = weight.reshape(levels.shape[0], -1, weight.shape[-1] if weight.dim() else 1)
        weights = None if importance is None else importance.reshape(matrices.shape)
        scale = torch.cat(
            [
                fit_blocks(
                    matrices[b],
                    Format(TableGrid("learned", tuple(table)), fmt.block, fmt.scale),
                    fit,
                    None if weights is None else weights[b],
                )[0]
                for b, table in enumerate(shared)
            ]
        )
    return encode(weight, fmt, scale, levels=levels)


def lloyd(x: Tensor, v: Tensor | None, count: int, iterations: int) -> Tensor:
    """`count` ascending levels for each row of `x` [n, size] with weights `v`: float32 [n, count].

    Each row is sorted once; with prefix sums a Lloyd step then costs a search for the midpoints between levels,
    not a pass over the data. Start: halfway between equal-mass and equally spaced levels. A level
    that owns nothing stays where it is. A row of fewer than `count` distinct values represents each exactly.
    """
    if x.shape[1] > _LARGE:
        x, v = _binned(x, v)
    x, order = x.sort(dim=1)
    v = torch.ones_like(x) if v is None else v.gather(1, order)
    x, v = x.double(), v.double()
    zero = x.new_zeros((x.shape[0], 1))
    mass = torch.cat([zero, v.cumsum(1)], 1)
    moment = torch.cat([zero, (v * x).cumsum(1)], 1)
    steps = (torch.arange(count, dtype=torch.float64, device=x.device) + 0.5) / count
    at = torch.searchsorted(mass[:, 1:].contiguous(), mass[:, -1:] * steps).clamp_(0, x.shape[1] - 1)
    low, high = x[:, :1], x[:, -1:]
    levels = (x.gather(1, at) + low + (high - low) * steps) / 2
    for _ in range(iterations):
        middle = (levels[:, 1:] + levels[:, :-1]) / 2
        cut = torch.searchsorted(x, middle.contiguous(), right=True)
        cut = torch.cat([torch.zeros_like(cut[:, :1]), cut, torch.full_like(cut[:, :1], x.shape[1])], 1)
        m, s = mass.gather(1, cut).diff(dim=1), moment.gather(1, cut).diff(dim=1)
        moved = torch.where(m > 0, s / m, levels)
        if torch.equal(moved, levels):
            break
        levels = moved
    levels = levels.sort(dim=1).values
    few = (x.diff(dim=1) != 0).sum(1) < count
    for row in few.nonzero()[:, 0].tolist():
        values = x[row].unique()
        levels[row] = torch.cat([values, values[-1:].expand(count - len(values))])
    return levels.to(torch.float32)


def _binned(x: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
    """A histogram instead of the data: centres of mass and weights of equal bins, [n, bins] each."""
    rows = []
    for i in range(x.shape[0]):
        low, high = x[i].amin(), x[i].amax()
        width = (high - low).clamp_min(1e-30) / _BINS
        at = ((x[i] - low) / width).to(torch.int64).clamp_(0, _BINS - 1)
        weight = torch.ones_like(x[i]) if v is None else v[i]
        mass = torch.bincount(at, weight.double(), _BINS)
        moment = torch.bincount(at, (weight * x[i]).double(), _BINS)
        centre = low + (torch.arange(_BINS, device=x.device) + 0.5) * width
        rows.append((torch.where(mass > 0, moment / mass, centre.double()).float(), mass.float()))
    return torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale != 0, 1 / scale, 0.0)


def _ones(weight: Tensor, importance: Tensor | None) -> Tensor:
    return torch.ones_like(weight, dtype=torch.float32) if importance is None else importance


def _or_empty(levels: Tensor | None, fmt: Format, weight: Tensor) -> Tensor:
    if levels is not None:
        return levels
    counts = (0, 0, 0) if fmt.codebook is None else fmt.codebook.counts(tuple(weight.shape))
    return torch.zeros((*counts, fmt.grid.cardinality))
