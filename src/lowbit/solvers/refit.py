"""All scales of a row at once: the codes stay, the scales become the least-squares answer for the layer's output."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowbit.formats import Format, QTensor, encode, stores
from lowbit.formats.nearest import inverse
from lowbit.solvers.nested import Layout, can_round, round_nested
from lowbit.solvers.rounding import per_element
from lowbit.solvers.zeros import exact_zeros

_CHUNK = 1 << 24  # elements of the rows' normal matrices that are in memory at a time


def refits(q: QTensor) -> bool:
    """Whether the scales of `q` can be refitted: one row a block, more than a power of two to choose, and stores that are
    plain, or all nested in integers."""
    fmt = q.format
    if fmt.codebook is not None or fmt.block.rows != 1:
        return False
    if isinstance(fmt.scale, Format):
        return all(can_round(how, fmt.block.counts(q.shape)[-1]) for how in _nested(fmt))
    plain_offset = fmt.offset is None or isinstance(fmt.offset.store, str)
    return fmt.scale in stores.FLOAT_STORES and plain_offset


def _nested(fmt: Format) -> list[Format]:
    """How the unknowns of a row are stored, scales first, where they are nested."""
    return [fmt.scale, *([fmt.offset.store] if fmt.offset else [])]  # type: ignore[list-item]


def refit_scales(q: QTensor, target: Tensor, hessian: Tensor, still: Tensor | None = None) -> QTensor:
    """Scales (and float minima) that minimise tr((Q - W) H (Q - W)') for the codes that `q` [N, K] has.

    For each row, with d_g the levels (less the zero-point) of group g and 0 elsewhere, Q = sum_g s_g d_g:

        A s = b,   A_gh = d_g' H d_h,   b_g = d_g' H w

    For a float minimum the constant 1 of each group is a second basis vector. Returns the codes as they are under the
    stored (rounded) scales; nested scales and minima are rounded with regard to each other (`nested.py`).
    Source: Kim et al. 2025 (GuidedQuant), section 4, LNQ's closed-form codebook, for one scale a group instead of one
    level a code. `still` [N, K]: zeros that stay exact; a group of nothing else keeps its scale and minimum of zero.
    """
    fmt, (rows, cols) = q.format, q.shape
    size = cols if fmt.block.cols == -1 else fmt.block.cols
    groups = -(-cols // size)
    level = fmt.grid.decode(q.unpacked())
    offset, before = q.offsets(), q.scales()[0]  # type: ignore[index]
    minimum = fmt.offset_kind == "min"
    if offset is not None and not minimum:
        level = level - per_element(offset, q.shape, fmt.block)
    bases = [level, torch.ones_like(level)] if minimum else [level]
    present = torch.cat([before, offset[0]], 1) if minimum else before  # type: ignore[index]
    dead = before == 0 if offset is None or not minimum else (before == 0) & (offset[0] == 0)
    # It is the change that is solved for, with the error of the present answer pulled: float32 sums of the whole hide it.
    pulled = (target - q.dequantize()) @ hessian
    if isinstance(fmt.scale, Format):
        return _refit_nested(q, bases, pulled, hessian, size, present, dead)
    found = torch.empty(rows, groups * len(bases))
    step = max(1, _CHUNK // (groups * len(bases)) ** 2)
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        change, _ = _solve([b[part] for b in bases], pulled[part], hessian, size)
        found[part] = present[part] + change
    scale = found[:, :groups]
    # A group whose levels are all 0 says nothing of its scale; a scale that turned 0 would lose the group for good.
    scale = torch.where((scale == 0) | ~scale.isfinite() | dead, before, scale)
    if not fmt.scale_signed:
        scale = torch.where(scale < 0, before, scale)
    new_offset = None if offset is None else offset[0]
    if minimum:
        new_offset = -found[:, groups:] * inverse(scale)  # `encode` takes zero-points: m = -s z
        if still is not None:
            scale, new_offset = exact_zeros(scale, new_offset, fmt, _by_group(still.float(), size, groups) > 0)
    values = bases[0] * per_element(scale[None], q.shape, fmt.block)
    if minimum and new_offset is not None:
        lowest = found[:, groups:] if still is None else -(scale * new_offset)
        values = values + per_element(lowest[None], q.shape, fmt.block)
    return encode(values, fmt, scale[None], None if new_offset is None else new_offset[None])


def _refit_nested(
    q: QTensor, bases: list[Tensor], pulled: Tensor, hessian: Tensor, size: int, present: Tensor, dead: Tensor
) -> QTensor:
    """The same for scales in few bits, which are rounded with regard to each other."""
    kinds = _nested(q.format)
    layout = Layout.of(kinds, (1, -1)[: len(bases)], present.shape[1] // len(bases))
    parts = [s.scales() for s in (q.scale, q.offset) if isinstance(s, QTensor)]
    steps = torch.cat([s.view(len(present), -1) for s in parts if s is not None], 1)
    found = torch.empty_like(present)
    step = max(1, _CHUNK // 4 // present.shape[1] ** 2)
    for begin in range(0, len(present), step):
        part = slice(begin, begin + step)
        now = present[part]
        change, normal = _solve([b[part] for b in bases], pulled[part], hessian, size)
        whole = normal.tril() + normal.tril(-1).transpose(1, 2)
        found[part], steps[part] = round_nested(now + change, whole, layout, now, steps[part])
    found = found.masked_fill(dead.repeat(1, len(bases)), 0)
    each = zip(kinds, layout.per_kind(found), layout.per_kind(steps))
    kept = [encode(values.reshape(-1), how, step.reshape(-1)) for how, values, step in each]
    return replace(q, scale=kept[0], offset=kept[1] if len(kept) == 2 else None)


def _solve(bases: list[Tensor], pulled: Tensor, hessian: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """float32 [n, C], float64 [n, C, C], C = G * len(bases): how the answer changes, and the lower triangles of the normal equations
    of every row, with a ridge that holds back what they do not tell."""
    cols = hessian.shape[0]
    spans = [(g, min(g + size, cols)) for g in range(0, cols, size)]
    rows, count = len(pulled), len(spans) * len(bases)
    normal, right = torch.zeros(rows, count, count), torch.empty(rows, count)
    for i, (b, (begin, end)) in enumerate((b, span) for b in range(len(bases)) for span in spans):
        vector = bases[b][:, begin:end]
        right[:, i] = (vector * pulled[:, begin:end]).sum(1)
        for j in range(b + 1):  # the lower triangle is all that is read
            stop = end if j == b else cols
            reach = vector @ hessian[begin:end, :stop]  # d_g' H
            row = normal[:, i, j * len(spans) : j * len(spans) + -(-stop // size)]
            row.copy_(_by_group(reach * bases[j][:, :stop], size, row.shape[1]))
    diagonal = normal.diagonal(dim1=1, dim2=2)
    ridge = 1e-6 * diagonal.mean(1, keepdim=True) + 1e-30
    normal = normal.double() + torch.diag_embed(ridge.expand(-1, count)).double()
    factor, _ = torch.linalg.cholesky_ex(normal)
    return torch.cholesky_solve(right.double()[..., None], factor)[..., 0].float(), normal


def _by_group(x: Tensor, size: int, groups: int) -> Tensor:
    """Sums of the groups of each row, the last of which may be short."""
    short = groups * size - x.shape[1]
    if short:
        x = torch.nn.functional.pad(x, (0, short))
    return x.view(len(x), groups, size).sum(2)
