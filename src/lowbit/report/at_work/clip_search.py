"""mse and percentile: how much of the range to give up."""

from __future__ import annotations

import torch

from lowbit.formats import stores
from lowbit.report.at_work.blocks import EXAMPLE, first_block, kept_errors
from lowbit.report.at_work.case import Case
from lowbit.report.at_work.trace import Listing, Shown, Trace, shown_of, shows
from lowbit.report.wording import number_text as num
from lowbit.solvers import Call
from lowbit.solvers.fits.minmax import affine
from lowbit.solvers.fitting import as_stored, rounded_scale


def plain_fit(case: Case) -> str:
    """The fit that takes the whole range."""
    return "absmax" if case.format.offset is None else "minmax"


@shows("mse", example=EXAMPLE)
def mse(case: Case, call: Call) -> Shown:
    """Shares of the range with their errors for the first block."""
    options = {**call.method.options, **dict(call.options)}
    block, v = first_block(case)
    fmt = case.format.plain
    x = stores.times_power(block, -case.format.exponent) if case.format.exponent else block
    rows: list[tuple[float, float, int, float]] = []
    for factor in torch.linspace(1.0, float(options["shrink"]), int(options["steps"])).tolist():
        if fmt.offset is None:
            s, z = rounded_scale(x.abs().amax(1) * factor / fmt.grid.reach, fmt), torch.zeros(1)
        else:
            s, z = as_stored(*affine(x.amin(1) * factor, x.amax(1) * factor, fmt), fmt)
        scaled = x * torch.where(s > 0, 1 / s, 0.0) + z
        off = ((fmt.grid.round(scaled) - z) * s - x).square()
        beyond = int(((scaled > fmt.grid.hi + 1e-4) | (scaled < fmt.grid.lo - 1e-4)).sum())
        rows.append((factor, float(s), beyond, float((off if v is None else off * v).sum())))
    best = min(range(len(rows)), key=lambda i: rows[i][3])
    shown = tuple(i for i in range(len(rows)) if i % max(1, len(rows) // 10) == 0 or i == best)
    weighed = "" if v is None else ", each times the mean square of its input"
    parts = (
        "The scale may be smaller than the largest value needs. That value is then clipped to the highest level, "
        f"and all others are rounded more finely. {len(rows)} shares of the range are tried, and the least sum of squared errors{weighed} wins{shown_of(len(shown), len(rows))}:",
        Listing("clip_ratios", ("share of the range", "s", "values beyond", "error"), tuple(rows), shown, best),
        "Nothing is gained by clipping this block." if best == 0 else f"{num(100 * rows[best][0], 4)} % of the range has the least error.",
    )  # fmt: skip
    return Shown(Trace(str(call), parts, kept_errors(case, plain_fit(case), call)), case)


@shows("percentile", example=EXAMPLE)
def percentile(case: Case, call: Call) -> Shown:
    """The value that becomes the end of the range."""
    p = float({**call.method.options, **dict(call.options)}["p"])
    block, _ = first_block(case)
    n = block.shape[1]
    values = block.abs()[0].sort().values
    if case.format.offset is None:
        k = min(n, max(1, int(-(-p / 100 * n // 1))))
        said = (
            f"Of the {n} magnitudes of the first block, sorted, number {k} is the end of the range: {num(float(values[k - 1]))}. "
            + (
                f"That is the largest, as {num(p)} % of so few values are all of them: nothing is clipped."
                if k == n
                else f"The {n - k} larger ones are clipped; the largest is {num(float(values[-1]))}."
            )
        )
    else:
        k = min(n, max(1, int(-(-(1 - (100 - p) / 200) * n // 1))))
        low, high = float(-(-block[0]).sort().values[k - 1]), float(block[0].sort().values[k - 1])
        said = (
            f"{num((100 - p) / 2)} % of the values are left out at either end: of the {n} values of the first block the range "
            f"is {num(low)} to {num(high)}, and {n - k} at each end are clipped."
        )
    return Shown(Trace(str(call), (said,), kept_errors(case, plain_fit(case), call)), case)
