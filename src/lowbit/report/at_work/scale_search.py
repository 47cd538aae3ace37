"""search: scales that are tried, and what least squares make of each."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.formats import Format, stores
from lowbit.formats.nearest import inverse
from lowbit.report.at_work.blocks import EXAMPLE, first_block, kept_errors
from lowbit.report.at_work.case import Case
from lowbit.report.at_work.clip_search import plain_fit
from lowbit.report.at_work.trace import Cell, Listing, Shown, Trace, shown_of, shows
from lowbit.report.wording import number_text as num
from lowbit.solvers import Call
from lowbit.solvers.fits.minmax import affine
from lowbit.solvers.fitting import as_stored, rounded_scale, total

_SHOWN = 6  # rows that are drawn beside the first and the best


def candidates(
    x: Tensor, fmt: Format, v: Tensor | None, options: dict[str, float]
) -> tuple[list[tuple[Cell, ...]], int]:
    """Rows of (what is tried, its scale, the scale that is best for its levels, error) for a block [1, size] without an offset,
    and the row that the fit keeps.

    The fit compares errors in float32 from three sums, whose difference may be all rounding where levels are many; the errors
    of the rows are the sums of the squares themselves, in float64.
    """
    grid = fmt.grid
    peak = x.gather(1, x.abs().argmax(1, keepdim=True))[:, 0]
    levels = grid.levels[grid.levels.isfinite()].sort().values
    two_signs = fmt.scale_signed and grid.signed and not torch.equal(levels, -levels.flip(0))
    start = peak / grid.extreme if two_signs else peak.abs() / grid.reach
    factors = torch.linspace(1 - options["span"], 1 + options["span"] / 3, int(options["steps"])).tolist()
    refit = fmt.scale != "e8m0"
    tried = [
        ("whole range, refitted" if refit else "whole range", peak.abs() / grid.reach),
        *((f"{num(f, 4)} x s0", start * f) for f in (1.0, *factors)),
    ]
    tried += [(f"{num(-f, 4)} x s0", start * -f) for f in factors[::2] if two_signs]
    vxx = total(x * x if v is None else v * x * x)

    def fitted(s: Tensor) -> tuple[Tensor, Tensor, float]:
        q = grid.round(x * inverse(s)[:, None])
        vq = q if v is None else v * q
        xq, qq = total(vq * x), total(vq * q)
        best = rounded_scale(torch.where(qq > 0, xq / qq, s), fmt) if refit else s
        best = best if fmt.scale_signed else best.clamp_min(0)
        return vxx - 2 * best * xq + best.square() * qq, best, weighed(best.double()[:, None] * q.double() - x, v)

    rows: list[tuple[Cell, ...]] = []
    kept = 0
    least, scale = torch.full_like(peak, torch.inf), start
    for name, value in (*tried, *[("best so far, again", None)] * (2 if refit else 0)):
        s = scale if value is None else rounded_scale(value, fmt)
        compared, made, error = fitted(s)
        if bool(compared < least):
            least, scale, kept = compared, made, len(rows)
        rows.append((name, float(s), float(made), error))
    return rows, kept


def weighed(off: Tensor, v: Tensor | None) -> float:
    """The sum of v off^2 in float64."""
    return float((off.double().square() if v is None else off.double().square() * v.double()).sum())


def affine_candidates(
    x: Tensor, fmt: Format, v: Tensor, options: dict[str, float]
) -> tuple[list[tuple[Cell, ...]], int]:
    """Rows of (what is tried, scale, zero-point in levels, error) after the refit of both, for a block [1, size] with an offset,
    and the row that the fit keeps. Errors are in float64."""
    low, high, grid = x.amin(1), x.amax(1), fmt.grid
    factors = torch.linspace(1 - options["span"], 1 + options["span"] / 3, int(options["steps"])).tolist()

    def measured(s: Tensor, z: Tensor) -> tuple[Tensor, float]:
        level = grid.round(x * inverse(s)[:, None] + z[:, None])
        exact = (level.double() - z.double()[:, None]) * s.double()[:, None] - x
        return total((level - z[:, None]).mul_(s[:, None]).sub_(x).square_() * v), weighed(exact, v)

    kept = 0
    scale, offset = as_stored(*affine(low, high, fmt), fmt)
    least, exact = measured(scale, offset)
    rows: list[tuple[Cell, ...]] = [("whole range, not refitted", float(scale), float(offset), exact)]
    for factor in (1.0, *factors, 0.0, 0.0):
        s, z = as_stored(*affine(low * factor, high * factor, fmt), fmt) if factor else (scale, offset)
        q = grid.round(x * inverse(s)[:, None] + z[:, None])
        if fmt.offset_kind == "zero":
            d = q - z[:, None]
            dd = total(v * d * d)
            s = torch.where(dd > 0, (total(v * x * d) / dd).clamp_min(0), s)
        else:
            s_v, s_q, s_x, s_qq, s_xq = total(v), total(v * q), total(v * x), total(v * q * q), total(v * x * q)
            det = s_v * s_qq - s_q * s_q
            slope = (s_v * s_xq - s_q * s_x) / det
            good = (det > 1e-12 * s_v * s_qq) & (slope > 0)
            s, z = torch.where(good, slope, s), torch.where(good, -(s_x - slope * s_q) / s_v / slope, z)
        s, z = as_stored(s, z, fmt)
        error, exact = measured(s, z)
        name = f"{num(factor, 4)} x range, refitted" if factor else "best so far, again"
        if bool(error < least):
            least, scale, offset, kept = error, s, z, len(rows)
        rows.append((name, float(s), float(z), exact))
    return rows, kept


@shows("search", example=EXAMPLE)
def search(case: Case, call: Call) -> Shown:
    """The candidates of the first block with their errors, and the one that won."""
    options = {**call.method.options, **dict(call.options)}
    block, v = first_block(case)
    fmt = case.format.plain
    x = stores.times_power(block, -case.format.exponent) if case.format.exponent else block
    if float(x.min()) == float(x.max()):
        said = "All values of the block are equal: the scale is chosen so that they come back exactly, and nothing is searched."
        return Shown(Trace(str(call), (said,)), case)
    known, emphasis = v is not None, options["emphasis"]
    by = "|w|" if emphasis == 1 else f"|w|^{num(emphasis)}"
    weighed_by = "by the mean square of its input" if known else f"by {by}, as large weights matter more"
    if v is None and emphasis:
        v = x.abs() if emphasis == 1 else x.abs().pow(emphasis)
    if fmt.offset is None:
        (rows, kept), heads = candidates(x, fmt, v, options), ("tried", "s", "s refitted", "error")
        peak, extreme = float(x[0, x.abs().argmax()]), fmt.grid.extreme if fmt.scale_signed else fmt.grid.reach
        start = f"s0 = {num(peak)} / {num(extreme)} takes the value of largest magnitude to the level of largest magnitude. "
    else:
        rows, kept = affine_candidates(x, fmt, torch.ones_like(x) if v is None else v, options)
        heads, start = ("tried", "s", "z", "error"), ""
        if fmt.offset_kind == "min":
            heads = ("tried", "s", "m", "error")
            rows = [(n, s, -float(s or 0.0) * float(z or 0.0) + 0.0, e) for n, s, z, e in rows]
    least = min(range(len(rows)), key=lambda i: float(rows[i][3] or 0.0))
    near = _distinct(rows)[:_SHOWN]
    drawn = tuple(sorted({0, kept, *near}))
    anew = (
        ""
        if known is False
        else "The scale above was found without inputs; here it is found anew, with the inputs known. "
    )
    refits = fmt.offset is not None or fmt.scale != "e8m0"
    how = (
        "For each, values are rounded, and then the scale is set anew to what is best for these levels (least squares)"
        if refits
        else "For each, values are rounded; between powers of two there is nothing to refit"
    )
    parts: list[str | Listing] = [
        f"{anew}{start}{len(rows)} scales are tried for each block. {how}. An error on a value is squared and multiplied "
        f"{weighed_by}, and the least sum wins. The whole range and the best for the first block{shown_of(len(drawn), len(rows))}:",
        Listing("candidates", heads, tuple(rows), drawn, kept, "best" if kept == least else "kept"),
    ]
    if kept != least:
        parts.append(
            "Errors are shown in double precision. The search compares them in single precision, where differences as small as "
            "these are lost in rounding; so it kept a row that is not quite the least."
        )
    best = float(rows[kept][heads.index("s refitted" if "s refitted" in heads else "s")] or 0.0)
    if isinstance(fmt.scale, str) and (now := float(stores.rounded(torch.tensor([best]), fmt.scale))) != best:
        parts.append(f"Its scale is kept in {fmt.scale} as {num(now, 7)}, which the errors below are with.")
    cost = None if known else lambda off: off.square() * case.weight.abs().pow(emphasis)
    return Shown(
        Trace(
            str(call),
            tuple(parts),
            kept_errors(case, plain_fit(case), call, cost=cost, note=", not refitted" if refits else ""),
        ),
        case,
    )


def _distinct(rows: list[tuple[Cell, ...]]) -> list[int]:
    """Places of the rows by their error, those that end like one before left out."""
    seen: dict[str, int] = {}
    for i in sorted(range(len(rows)), key=lambda i: (float(rows[i][3] or 0.0), i)):
        seen.setdefault(num(float(rows[i][3] or 0.0), 4), i)
    return list(seen.values())
