"""AWQ: the exponents that are tried, and the scales of the best."""

from __future__ import annotations

from torch import Tensor

from lowbit.report.at_work.case import Case
from lowbit.report.at_work.feedback import EXAMPLE, scales_of
from lowbit.report.at_work.trace import Listing, Outcome, Shown, Trace, shown_of, shows
from lowbit.report.wording import number_text as num
from lowbit.solvers import Call
from lowbit.transforms.scale import Scaling
from lowbit.transforms.smooth import quadratic


def chosen(case: Case, call: Call) -> Scaling:
    """What the transform itself chooses for this weight."""

    def quantize(weight: Tensor, stats: object) -> Tensor:
        return case.rounded(weight, stats).dequantize()  # type: ignore[arg-type]

    found: Scaling = call.method.function([case.weight], case.stats, quantize, None, **dict(call.options))
    return found


def scale_of(mean_abs: Tensor, alpha: float) -> Tensor:
    """mean|x|^alpha (of 1e-4 at least; 1 where it is 0), divided by the root of the product of its largest and smallest value."""
    alive = mean_abs > 0
    power = mean_abs[alive].clamp(min=1e-4) ** alpha
    scale = mean_abs.new_ones(mean_abs.shape)
    if len(power):
        scale[alive] = power / (power.max() * power.min()).sqrt()
    return scale


@shows("awq", example=EXAMPLE)
def awq(case: Case, call: Call) -> Shown:
    """mean|x| by column, errors by exponent, and the columns under the chosen scale."""
    points = int({**call.method.options, **dict(call.options)}["points"])
    found, mean = chosen(case, call), case.stats.mean_abs
    tried = []
    for i in range(points):
        scale = scale_of(mean, i / points)
        off = case.rounded(case.weight * scale, case.stats.scaled(scale)).dequantize() / scale - case.weight
        tried.append((i / points, quadratic(off, case.stats.second_moment), float(scale.max() / scale.min())))
    best = min(range(points), key=lambda i: tried[i][1])
    shown = tuple(i for i in range(points) if i % max(1, points // 10) == 0 or i == best)
    after = case.scaled(found.scale)
    q = after.rounded(after.weight, after.stats)
    values, codes = q.dequantize(), q.unpacked()
    columns = tuple(
        (
            k, float(mean[k]), float(found.scale[k]), float(case.weight[0, k]), float(after.weight[0, k]),
            int(codes[0, k]), float(values[0, k] / found.scale[k]),
        )
        for k in range(len(mean))
    )  # fmt: skip
    errors = [
        *case.nearest_errors(found.plain, "round-to-nearest, alpha = 0"),
        (f"{call.name}, then round-to-nearest", found.error),
    ]
    parts: tuple[str | Listing, ...] = (
        "Columns whose inputs are large matter most, so they are multiplied by s_k before rounding, and the input is divided "
        "by s_k: x W^T = (x / s) (W s)^T. A larger weight in the same group is rounded relatively less. "
        "s_k = mean|x_k|^alpha / sqrt(a b), where a and b are the largest and the smallest mean|x_k|^alpha of all columns, so that "
        f"the largest and the smallest s are as far from 1. {points} values of alpha are tried on the inputs{shown_of(len(shown), points)}:",
        Listing("alphas", ("alpha", "output error", "largest s / smallest s"), tuple(tried), shown, best),
        f"alpha = {num(found.alpha)} has the least error. alpha = 0 scales nothing and is round-to-nearest.",
        *scales_of(case.recipe.fit_for(case.format), errors[:-1]),
        "What is stored is W s, rounded; the last column is what it stands for, divided by s again"
        + (f" (row 0 of {len(case.weight)})." if len(case.weight) > 1 else "."),
        Listing("columns", ("column", "mean|x|", "s", "w", "w s", "code", "value / s"), columns),
        "In a model the division of x by s goes into the norm or the linear before, where it costs nothing, and a block of "
        "the model keeps its scales only where its output is better for them.",
    )
    outcome = Outcome.of(codes, values / found.scale, errors)
    return Shown(Trace(str(call), parts, outcome), after)
