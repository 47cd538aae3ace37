"""HQQ: the zero-point as it moves."""

from __future__ import annotations

from torch import Tensor

from lowbit.formats import Format, stores
from lowbit.report.at_work.blocks import EXAMPLE, first_block, kept_errors
from lowbit.report.at_work.case import Case
from lowbit.report.at_work.trace import Listing, Shown, Trace, shows
from lowbit.report.wording import number_text as num
from lowbit.solvers import Call
from lowbit.solvers.fits.minmax import minmax
from lowbit.solvers.fitting import as_stored


def iterations(x: Tensor, fmt: Format, options: dict[str, float]) -> list[tuple[int, float, float]]:
    """(iteration, zero-point, mean |x - x'|) for a block [1, size], until the error falls no more. The last is the one that
    did not help, where there is one."""
    scale, offset = minmax(x, fmt)
    y = x / scale[:, None]
    beta, found, best = options["beta"], [], float("inf")
    for i in range(int(options["iterations"]) + 1):
        zero = as_stored(scale, offset, fmt)[1]
        level = fmt.grid.round(y + zero[:, None])
        value = level - zero[:, None]
        error = float((y - value).abs().mean() * scale[0].abs())
        found.append((i, float(offset[0]), error))
        if i and not error < best:
            break
        best = min(best, error)
        residual = y - value
        size = residual.abs()
        shrunk = residual.sign() * (size - size.clamp_min(1e-12).pow(options["p"] - 1) / beta).clamp_min(0)
        offset = (level - (y - shrunk)).mean(1)
        beta *= options["kappa"]
    return found


@shows("hqq", example=EXAMPLE)
def hqq(case: Case, call: Call) -> Shown:
    """Zero-points and errors by iteration for the first block."""
    options = {**call.method.options, **dict(call.options)}
    block, _ = first_block(case)
    fmt = case.format
    x = stores.times_power(block, -fmt.exponent) if fmt.exponent else block
    if float(x.min()) == float(x.max()):
        return Shown(
            Trace(str(call), ("All values of the block are equal and come back exactly; nothing moves.",)), case
        )
    found = iterations(x, fmt.plain, options)
    best = min(range(len(found)), key=lambda i: found[i][2])
    end = "stops when the mean error no longer falls" if best < len(found) - 1 else "ends at the number of iterations"
    parts = (
        "Starts from min-max: lowest value to the lowest level, highest to the highest. The scale stays. Then, again and "
        "again: the errors x - x' are shrunk, so that small ones count as none and only large ones (outliers) remain as e; "
        "the zero-point becomes the mean of level - (x - e) / s, the one that serves all other values best. "
        f"Measured is |error|^{num(options['p'])}, which a few outliers do not rule. The loop {end}:",
        Listing("iterations", ("iteration", "zero-point", "mean |x - x'|"), tuple(found), best=best),
    )
    return Shown(
        Trace(
            str(call),
            parts,
            kept_errors(case, "minmax", call, "Mean |w - q| of all weights", lambda off: off.abs() / off.numel()),
        ),
        case,
    )
