"""Scales that are themselves stored in few bits: the integers, and the scale of each run of them, that lose least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.formats import Format, IntGrid, stores
from lowbit.formats.nearest import inverse

_ROUNDS = 2
_FACTORS = (1.0, 0.95, 0.9)  # of the range-based scale: what is clipped then, the others make up for


def can_round(how: object, count: int) -> bool:
    """Whether `round_nested` knows this store of `count` values a row: integers, a plain scale, no run across rows."""
    if not isinstance(how, Format) or not isinstance(how.grid, IntGrid) or how.offset is not None:
        return False
    return how.scale in stores.FLOAT_STORES and how.block.cols > 0 and count % how.block.cols == 0


@dataclass(frozen=True, eq=False)
class Layout:
    """C values a row in M runs: the `kinds` in order, `count` values each. `member`: [C], the run of each value.

    `signs`: of what an unsigned grid stores, 1 for scales and -1 for minima, which count down from zero.
    """

    kinds: Sequence[Format]
    signs: Sequence[int]
    count: int
    member: Tensor

    @staticmethod
    def of(kinds: Sequence[Format], signs: Sequence[int], count: int) -> Layout:
        """`count` values a row for each of `kinds`."""
        runs, before = [], 0
        for kind in kinds:
            runs.append(before + torch.arange(count) // kind.block.cols)
            before += count // kind.block.cols
        return Layout(kinds, signs, count, torch.cat(runs))

    def per_kind(self, values: Tensor) -> Sequence[Tensor]:
        """[n, C] or [n, M] cut into what belongs to each kind."""
        whole = values.shape[1] == len(self.member)
        return values.split([self.count if whole else self.count // kind.block.cols for kind in self.kinds], 1)

    def integers(self, values: Tensor, step: Tensor) -> Tensor:
        """float32 [n, C]: the nearest integers under the scales [n, M]."""
        at = values * inverse(step)[:, self.member]
        return torch.cat([k.grid.round(x) for k, x in zip(self.kinds, self.per_kind(at))], 1)

    def starts(self, values: Tensor) -> list[Tensor]:
        """float32 [n, M] each: scales to begin with."""
        out = []
        for factor in _FACTORS:
            parts = []
            for kind, sign, x in zip(self.kinds, self.signs, self.per_kind(values)):
                runs = x.reshape(len(x), -1, kind.block.cols)
                grid = kind.grid
                if grid.signed:
                    peak = runs.gather(2, runs.abs().argmax(2, keepdim=True))[..., 0]
                    step = peak / grid.extreme
                else:
                    step = (runs * sign).amax(2).clamp_min(0) * (sign / grid.hi)
                parts.append(step * factor)
            out.append(torch.cat(parts, 1))
        return out

    def stored(self, step: Tensor) -> Tensor:
        """Scales as they would be read back."""
        out = []
        for kind, d in zip(self.kinds, self.per_kind(step)):
            most = torch.finfo(stores.stored_dtype(str(kind.scale))).max
            out.append(stores.rounded(d.nan_to_num().clamp(-most, most), str(kind.scale)))
        return torch.cat(out, 1)


def round_nested(
    answer: Tensor, normal: Tensor, layout: Layout, present: Tensor, step: Tensor
) -> tuple[Tensor, Tensor]:
    """Storable values s near the minimum of (s - a)' A (s - a), row by row: s = t d, t integers, d one scale a run.

    `answer` a and `present` [n, C], `normal` A [n, C, C], `step` d of what is present [n, M]. For each of a few first d:
    t to nearest, then in turn a sweep of exact coordinate descent over t and least squares for d. Returns s and d of
    the best; a row keeps what it has unless its error falls.
    """
    weights = normal.float()
    best, best_step = present.clone(), step.clone()
    error = _error(best, answer, normal)
    for start in [step, *layout.starts(answer)]:
        d = layout.stored(start)
        t = layout.integers(answer, d)
        for round_ in range(_ROUNDS + 1):
            if round_:
                d = layout.stored(_scales(t, answer, normal, layout, d))
            t = _sweep(t, d, answer, weights, layout)
            s = t * d[:, layout.member]
            e = _error(s, answer, normal)
            better = e < error
            error = torch.where(better, e, error)
            best = torch.where(better[:, None], s, best)
            best_step = torch.where(better[:, None], d, best_step)
    return best, best_step


def _error(s: Tensor, answer: Tensor, normal: Tensor) -> Tensor:
    left = (s - answer).to(normal.dtype)
    return (left * (normal @ left[..., None])[..., 0]).sum(1)


def _sweep(t: Tensor, step: Tensor, answer: Tensor, normal: Tensor, layout: Layout) -> Tensor:
    """Each integer in turn becomes the best given all others: t_i <- round(t_i - R_i / (A_ii d)), R = A (t d - a)."""
    d = step[:, layout.member]
    by_step, t = inverse(d), t.clone()
    residual = (normal @ (t * d - answer)[..., None])[..., 0]
    for i in range(t.shape[1]):
        grid = layout.kinds[i // layout.count].grid
        new = grid.round(t[:, i] - residual[:, i] / normal[:, i, i] * by_step[:, i])
        residual += ((new - t[:, i]) * d[:, i])[:, None] * normal[:, i]
        t[:, i] = new
    return t


def _scales(t: Tensor, answer: Tensor, normal: Tensor, layout: Layout, step: Tensor) -> Tensor:
    """float32 [n, M]: least squares for the scales of all runs of a row, the integers given. No sign changes."""
    runs = torch.nn.functional.one_hot(layout.member, step.shape[1]).to(normal.dtype)
    basis = t.to(normal.dtype)[..., None] * runs  # [n, C, M]
    pulled = normal @ basis
    inner = basis.transpose(1, 2) @ pulled
    right = (pulled.transpose(1, 2) @ answer.to(normal.dtype)[..., None])[..., 0]
    ridge = 1e-9 * inner.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + 1e-30
    inner.diagonal(dim1=1, dim2=2).add_(ridge)
    factor, _ = torch.linalg.cholesky_ex(inner)
    found = torch.cholesky_solve((right + ridge * step)[..., None], factor)[..., 0].float()
    return torch.where(found.isfinite() & (found * step > 0), found, step)
