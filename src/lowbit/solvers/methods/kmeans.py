"""kmeans: levels learned from the weights, one set per tensor, channel or group."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import RecipeError
from lowbit.formats import Format, TableGrid, encode
from lowbit.formats.blocks import map_blocks, reduce_blocks
from lowbit.formats.nearest import inverse
from lowbit.solvers.fitting import run_fit
from lowbit.solvers.found import Found
from lowbit.solvers.registry import Call, solver
from lowbit.solvers.stats import Stats
from lowbit.solvers.zeros import many_zeros

# A block with more elements is summarised by this many equal bins before its levels are sought.
_BINS = 1 << 14
_LARGE = 1 << 20
# Lloyd steps after a level was moved, before the move is judged.
_SETTLE = 8


@solver(learns_levels=True, weighs=True, ignores=lambda fmt, stats: () if fmt.scale else ("rounds",))
def kmeans(
    weight: Tensor, fmt: Format, fit: Call, stats: Stats | None = None, *, iterations: int = 30, rounds: int = 2
) -> Found:
    """Learn the levels themselves, by gathering the weights of a block into as many clusters as there are levels.

    One-dimensional k-means, weighted by E[x_k^2] if the input is known:
    Lloyd's iteration from a deterministic start, with moves out of local minima (see `lloyd`). For formats with
    a scale per block and a codebook per larger block (`cb=`), the weights are first divided by their block's
    scale, and scale and codebook are improved in turn, `rounds` times: the levels learn from x / s with weight
    v s^2, then the fit searches new scales on the levels found. Error: a local minimum of sum v (w - w_q)^2, most
    often within 5 % of the least there is. Source: Lloyd 1982; Han et al. 2016, "Deep Compression", section 3.
    """
    if fmt.codebook is None:
        raise RecipeError(f"{fmt} has fixed levels; kmeans needs a learned grid such as kmeans4:channel")
    count = fmt.grid.cardinality
    importance = None if stats is None else stats.importance.expand(weight.shape).contiguous()

    def learn(x: Tensor, v: Tensor | None) -> Tensor:
        return with_zero(lloyd(x, v, count, iterations), x)

    if fmt.scale is None:
        (levels,) = reduce_blocks(learn, fmt.codebook, weight, importance)
        return Found(encode(weight, fmt, levels=_or_empty(levels, fmt, weight)))

    if fmt.codebook.rows != -1 or fmt.codebook.cols != -1:
        raise RecipeError(f"{fmt}: a codebook together with a scale is shared by the whole tensor; write cb=tensor")
    plain = Format(TableGrid("start", tuple(torch.linspace(-1, 1, count).tolist())), fmt.block, fmt.scale)
    scale = run_fit(weight, plain, Call("absmax"), importance)[0]
    levels = None
    for step in range(rounds + 1):
        normal = map_blocks(lambda x, s: x * inverse(s)[:, None], fmt.block, weight, scale, dtype=torch.float32)
        v = map_blocks(
            lambda x, s: x * s.square()[:, None], fmt.block, _ones(weight, importance), scale, dtype=torch.float32
        )
        levels = _or_empty(reduce_blocks(learn, fmt.codebook, normal, v)[0], fmt, weight)
        if step == rounds or weight.numel() == 0:
            break
        shared = [levels[b, 0, 0].to(torch.float16).double().tolist() for b in range(levels.shape[0])]
        matrices = weight.reshape(levels.shape[0], -1, weight.shape[-1] if weight.dim() else 1)
        weights = None if importance is None else importance.reshape(matrices.shape)
        found = torch.cat(
            [
                run_fit(
                    matrices[b],
                    Format(TableGrid("learned", tuple(table)), fmt.block, fmt.scale),
                    fit,
                    None if weights is None else weights[b],
                )[0]
                for b, table in enumerate(shared)
            ]
        )
        scale = torch.where(found.isfinite(), found, scale)  # none fits a table that ends at 0
    return Found(encode(weight, fmt, scale, levels=levels))


def with_zero(levels: Tensor, x: Tensor) -> Tensor:
    """`levels` [n, count] of the rows of `x`, the one nearest to zero made zero where a row has many exact zeros."""
    nearest = torch.zeros_like(levels).scatter(1, levels.abs().argmin(1, keepdim=True), 1) > 0
    return levels.masked_fill(nearest & many_zeros(x)[:, None], 0)


def lloyd(x: Tensor, v: Tensor | None, count: int, iterations: int) -> Tensor:
    """`count` ascending levels for each row of `x` [n, size] with weights `v`: float32 [n, count].

    Each row is sorted once; with prefix sums a Lloyd step then costs a search for the midpoints between levels,
    not a pass over the data. The local minimum reached is then left by moving a level from where it is missed
    least to where it is needed most (`_moved`) for as long as that lowers the error of some row.
    A level that owns nothing stays where it is. A row of at most `count` distinct values is exact.
    """
    if x.shape[1] > _LARGE:
        x, v = _binned(x, v)
    x, order = x.sort(dim=1)
    v = torch.ones_like(x) if v is None else v.gather(1, order)
    x, v = x.double().contiguous(), v.double()
    zero = x.new_zeros((x.shape[0], 1))
    sums = [torch.cat([zero, (v * x**k).cumsum(1)], 1) for k in (0, 1, 2)]

    best = _descend(x, sums, _start(x, v, count), iterations)
    rows = torch.arange(x.shape[0], device=x.device)  # a row that a move did not help is done
    for _ in range(count):
        old = [part[rows] for part in best]
        new = _descend(x[rows], [total[rows] for total in sums], _moved(*old), _SETTLE)
        better = new[2].sum(1) < old[2].sum(1) * (1 - 1e-6)
        rows = rows[better]
        if not len(rows):
            break
        best = [part.index_copy(0, rows, change[better]) for part, change in zip(best, new, strict=True)]
    levels = _descend(x, sums, best[0], iterations)[0].sort(dim=1).values
    few = (x.diff(dim=1) != 0).sum(1) < count
    for row in few.nonzero()[:, 0].tolist():
        values = x[row].unique()
        levels[row] = torch.cat([values, values[-1:].expand(count - len(values))])
    return levels.to(torch.float32)


def _owned(x: Tensor, sums: list[Tensor], levels: Tensor) -> list[Tensor]:
    """Sums of v, v x and v x^2 over what is nearest to each level, [n, count] each."""
    middle = (levels[:, 1:] + levels[:, :-1]) / 2
    cut = torch.searchsorted(x, middle.contiguous(), right=True)
    cut = torch.cat([torch.zeros_like(cut[:, :1]), cut, torch.full_like(cut[:, :1], x.shape[1])], 1)
    return [total.gather(1, cut).diff(dim=1) for total in sums]


def _descend(x: Tensor, sums: list[Tensor], levels: Tensor, steps: int) -> list[Tensor]:
    """Lloyd's steps; then the levels, the weight that each owns, and its error, [n, count] each."""
    for _ in range(steps):
        mass, first, _ = _owned(x, sums, levels)
        means = torch.where(mass > 0, first / mass, levels)
        if torch.equal(means, levels):
            break
        levels = means
    mass, first, second = _owned(x, sums, levels)
    return [levels, mass, (second - 2 * levels * first + levels.square() * mass).clamp_min_(0)]


def _start(x: Tensor, v: Tensor, count: int) -> Tensor:
    """Levels as dense as the cube root of the density of `x`, which is best in the limit of many levels.

    Source: Panter and Dite 1951, "Quantization distortion in pulse-count modulation with nonuniform spacing".
    The density between neighbours is weight / gap, so that its cube root integrates to weight^(1/3) gap^(2/3).
    """
    steps = (torch.arange(count, dtype=torch.float64, device=x.device) + 0.5) / count
    if x.shape[1] < 2:
        return x.expand(-1, count).clone()
    share = ((v[:, 1:] + v[:, :-1]) / 2).pow(1 / 3) * x.diff(dim=1).pow(2 / 3)
    share = torch.cat([torch.zeros_like(x[:, :1]), share.cumsum(1)], 1)
    wanted = share[:, -1:] * steps
    at = torch.searchsorted(share, wanted).clamp_(1, x.shape[1] - 1)
    before, after = share.gather(1, at - 1), share.gather(1, at)
    part = torch.where(after > before, (wanted - before) / (after - before), 0.5)
    return torch.lerp(x.gather(1, at - 1), x.gather(1, at), part)


def _moved(levels: Tensor, mass: Tensor, error: Tensor) -> Tensor:
    """Merge the two neighbours that cost least to merge; split the other level with the largest error in two."""
    if levels.shape[1] < 3:
        return levels
    both = mass[:, 1:] + mass[:, :-1]
    cost = (mass[:, 1:] * mass[:, :-1] / both).nan_to_num_(0) * levels.diff(dim=1).square()
    left = cost.argmin(1, keepdim=True)
    right = left + 1
    centre = (mass * levels).gather(1, left) + (mass * levels).gather(1, right)
    centre = torch.where(both.gather(1, left) > 0, centre / both.gather(1, left), levels.gather(1, left))
    worst = error.scatter(1, left, -1.0).scatter(1, right, -1.0).argmax(1, keepdim=True)
    middle = levels.gather(1, worst)
    spread = (error.gather(1, worst) / mass.gather(1, worst)).clamp_min(0).nan_to_num_(0).sqrt()
    moved = levels.scatter(1, left, centre).scatter(1, right, middle - spread).scatter(1, worst, middle + spread)
    return moved.sort(dim=1).values


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


def _ones(weight: Tensor, importance: Tensor | None) -> Tensor:
    return torch.ones_like(weight, dtype=torch.float32) if importance is None else importance


def _or_empty(levels: Tensor | None, fmt: Format, weight: Tensor) -> Tensor:
    if levels is not None:
        return levels
    counts = (0, 0, 0) if fmt.codebook is None else fmt.codebook.counts(tuple(weight.shape))
    return torch.zeros((*counts, fmt.grid.cardinality))
