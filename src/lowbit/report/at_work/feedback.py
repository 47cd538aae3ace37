"""GPTQ, GPTAQ and Qronos: columns in order, and how the later ones make up for the errors of the earlier ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.formats import QTensor, stores
from lowbit.formats.qtensor import nearest_codes
from lowbit.report.at_work.case import Case, step_of
from lowbit.report.at_work.trace import WIDEST, Cell, Listing, Outcome, Shown, Trace, matrix, shows
from lowbit.report.wording import number_text as num
from lowbit.solvers import Call, fit_blocks
from lowbit.solvers.coordinate_descent import feed_errors
from lowbit.solvers.feedback import Problem
from lowbit.solvers.found import Found
from lowbit.solvers.hessian import Factor, quadratic_of_rows
from lowbit.solvers.methods.qronos import corrected
from lowbit.solvers.rounding import Rounder, empty, with_values
from lowbit.solvers.zeros import zero_runs

EXAMPLE = "[0.66, -0.04, -0.12, 0.14, -0.29, -0.56]"
_ORDERS = (
    "as they stand",
    "the one with the largest mean x_k^2 first",
    "by groups, the group with the largest mean x_k^2 first, and so inside each",
)


class _Noting(Rounder):
    """A rounder that keeps what each column was when its turn came."""

    def value(self, k: int, w: Tensor) -> Tensor:
        self.seen.append(w.clone())
        return super().value(k, w)

    seen: list[Tensor]


@dataclass(frozen=True, eq=False)
class Steps:
    """The loop over columns, in its order: the target, the columns as they came, what they became, and the moves.

    target, now, value [N, K] in the array's order of columns; moves [N, K, K]: by how much rounding column i moves j.
    """

    factor: Factor
    start: QTensor
    target: Tensor
    now: Tensor
    value: Tensor
    moves: Tensor


def steps(case: Case, call: Call) -> Steps:
    """The solver's own loop on this weight, watched. In units of 2^exponent where the format has one."""
    fmt, options = case.format, {**call.method.options, **dict(call.options)}
    weight = stores.times_power(case.weight, -fmt.exponent) if fmt.exponent else case.weight
    fit = case.recipe.fit_for(fmt)
    problem = Problem(weight, fmt.plain, fit, case.stats, options["damp"], options["order"])
    factor, still = problem.factor, zero_runs(weight, fmt)
    target, shift = weight, torch.zeros_like(factor.upper)
    if call.name == "qronos":
        target = corrected(weight, case.stats, options["blend"], options["ridge"])
        target = target if still is None else target.masked_fill(still, 0)
    if call.name == "gptaq":
        assert case.stats.drift is not None
        change = case.stats.drift[factor.perm][:, factor.perm]
        shift = options["alpha"] * (change @ factor.upper.T).triu(1) @ factor.upper
    scale, offset = fit_blocks(target, fmt.plain, fit, case.stats.importance)
    start = empty(fmt.plain, tuple(weight.shape), scale, offset)
    rounder = _Noting(start, factor.perm, still)
    rounder.seen = []
    value = feed_errors(target[:, factor.perm], factor.upper, rounder, shift if call.name == "gptaq" else None)
    now = torch.stack(rounder.seen, 1)
    error = (now - value) / factor.upper.diagonal()
    moves = -error[:, :, None] * factor.upper.triu(1) + now[:, :, None] * shift.triu(1)
    back = torch.argsort(factor.perm)
    return Steps(factor, start, target, now[:, back], value[:, back], moves[:, back][:, :, back])


def fitted(case: Case, call: Call) -> tuple[Case, str]:
    """The case whose scales the solver uses, and what its weights are where they are not those of the array."""
    if call.name != "qronos":
        return case, ""
    options = {**call.method.options, **dict(call.options)}
    weight = corrected(case.weight, case.stats, options["blend"], options["ridge"])
    still = zero_runs(case.weight, case.format)
    said = (
        "The weights here are those that qronos corrects first, `w corrected` of its table below; it uses these scales."
    )
    return replace(case, weight=weight if still is None else weight.masked_fill(still, 0)), said


@shows("gptq", "gptaq", "qronos", example=EXAMPLE, fitted=fitted)
def feedback(case: Case, call: Call) -> Shown:
    """The columns in order, the polish after them, and the errors beside those of round-to-nearest."""
    found = steps(case, call)
    options = {**call.method.options, **dict(call.options)}
    fmt, row = case.format, 0
    codes = nearest_codes(found.value, found.start)
    levels = fmt.grid.decode(codes)
    order = found.factor.perm.tolist()
    parts: list[str | Listing] = [*_preparation(case, call, found, options)]
    rows: list[tuple[Cell, ...]] = []
    for k in order:
        now, value = float(found.now[row, k]), float(found.value[row, k])
        rows.append(
            (k, float(found.target[row, k]), now, float(levels[row, k]), int(codes[row, k]), value, now - value)
        )
    several = len(case.weight) > 1
    many = f" (row 0 of {len(case.weight)}; rows do not affect one another)" if several else ""
    parts += [
        f"Each line rounds one column{many}. `now` is the weight as the earlier columns have moved it; e is what rounding "
        "it takes away, now - value.",
        Listing("steps", ("column", "w", "now", "level", "code", "value", "e"), tuple(rows)),
        "How much each of these steps moves every column that is still to come:",
        Listing(
            "moves",
            ("rounded", *(f"w{j}" for j in order)),
            tuple(
                (f"w{k}", *(float(found.moves[row, k, j]) if order.index(j) > i else "" for j in order))
                for i, k in enumerate(order[:-1])
            ),
            () if len(order) > 2 * WIDEST else None,
        ),
    ]
    final, errors, told = _results(case, call, found, options)
    made, plain = final.weight.dequantize(), _real(case, with_values(found.start, found.target)).dequantize()
    parts += [*told, "What is stored, beside each value rounded on its own with the same scales"
        f"{f' (row 0 of {len(case.weight)})' if several else ''}:", _beside(case, plain, final.weight, row)]  # fmt: skip
    outcome = Outcome.of(final.weight.unpacked(), made, errors)
    return Shown(Trace(str(call), tuple(parts), outcome), case)


def _preparation(case: Case, call: Call, found: Steps, options: dict[str, float]) -> list[str | Listing]:
    """What is worked out before the first column is rounded."""
    drifts = call.method.needs == "drift"
    parts: list[str | Listing] = []
    if drifts:
        parts.append(
            "x_f is the input in the float model, and x the same input behind layers that are quantized already; here x is "
            f"x_f rounded to multiples of {num(step_of(case.inputs_float))}. What counts is the output, x_f W^T against x Q^T."
        )
    parts.append(
        f"H = X^T X / {len(case.inputs)} says what errors cost: with e = w - q the mean squared error of the output is e H e^T. "
        f"{num(100 * found.factor.damp)} % of its mean diagonal is added to the diagonal, so that it can be inverted, and the method "
        "works with the H that this gives:"
    )
    parts.append(matrix("hessian", found.factor.hessian, "H"))
    if call.name == "qronos":
        parts += [
            f"First each weight goes {num(100 * options['blend'])} % of the way to the W that makes x W^T most like the float "
            "model's output (least squares). From here on w is this corrected weight:",
            Listing(
                "corrected",
                ("column", "w given", "w corrected"),
                tuple((k, float(case.weight[0, k]), float(found.target[0, k])) for k in range(case.weight.shape[1])),
            ),
        ]
    scales = found.start.scales()
    assert scales is not None
    shown = "  ".join(num(float(s)) for s in scales[0, 0, :8].tolist())
    parts.append(
        f"The scales are found before any rounding by the fit {case.recipe.fit_for(case.format)}"
        + (" for the corrected weights" if call.name == "qronos" else "")
        + f", for which an error in column k counts H_kk times: s = {shown}{_store(case)}. Columns are then rounded one by one, {_ORDERS[int(options['order'])]}."
    )
    rule = "w_j changes by -e U_ij / U_ii"
    if call.name == "gptaq":
        rule += " + w_i P_ij; P makes up for what the earlier layers changed in input i"
    parts.append(
        f"After column i is rounded, each later column j makes up for the error as well as it can: {rule}. U is upper "
        "triangular with U^T U = inv(H)."
    )
    return parts


def _rows_kept(found: Steps) -> list[int]:
    """Rows that feedback serves no better than round-to-nearest."""
    nearest = with_values(found.start, found.target).dequantize()
    of_nearest, of_columns = (
        quadratic_of_rows(value - found.target, found.factor.hessian) for value in (nearest, found.value)
    )
    return (of_nearest <= of_columns).nonzero()[:, 0].tolist()  # type: ignore[no-any-return]


def _results(
    case: Case, call: Call, found: Steps, options: dict[str, float]
) -> tuple[Found, list[tuple[str, float]], list[str | Listing]]:
    """The solver's own result, errors by name, and what is said of the polish."""
    fmt, fit = case.format, case.recipe.fit_for(case.format)
    final = call.solve(case.weight, fmt, fit, case.stats)
    of_start = case.output_error(_real(case, with_values(found.start, found.target)).dequantize())
    errors = case.nearest_errors(of_start)
    if call.name == "qronos":
        errors = [errors[0], ("w corrected, then round-to-nearest", of_start)]
    told: list[str | Listing] = [] if call.name == "qronos" else [*scales_of(fit, errors)]
    errors.append(
        (
            f"{call.name}, column by column",
            case.output_error(_real(case, with_values(found.start, found.value)).dequantize()),
        )
    )
    bare = replace(
        call, options=tuple(sorted({**dict(call.options), **dict.fromkeys(options.keys() & {"polish"}, 0)}.items()))
    )
    before = bare.solve(case.weight, fmt, fit, case.stats).trace
    assert before is not None
    kept = [] if call.name == "gptaq" else _rows_kept(found)
    if kept:
        where = (
            "Here" if len(kept) == len(case.weight) else f"In row{'s' * (len(kept) > 1)} {', '.join(map(str, kept))}"
        )
        told.append(
            f"{where} each value rounded on its own has no larger e H e^T than the method's columns, and is kept instead of them."
        )
    if options.get("polish") and final.trace is not None:
        changed = final.trace.end < before.end
        told.append(
            f"Polish, {int(options['polish'])} rounds at most: all scales are set anew by least squares for the codes that were "
            "found, then every weight is tried once more while the others stay. A row keeps a round only where its e H e^T falls; "
            + (
                f"here it falls from {num(before.end, 4)} to {num(final.trace.end, 4)}{_summed(case, call)}. These two count what was "
                "added to the diagonal of H, and the errors at the end do not."
                if changed
                else "here none helps."
            )
        )
        if changed:
            errors.append((f"{call.name}, polished", case.output_error(final.weight.dequantize())))
    return final, errors, told


def _store(case: Case) -> str:
    return f" (kept in {case.format.scale})" if isinstance(case.format.scale, str) else ""


def _summed(case: Case, call: Call) -> str:
    """Of what e H e^T is: all rows, and the corrected weights where there are some."""
    of = (["summed over the rows"] if len(case.weight) > 1 else []) + (
        ["with e from w corrected"] if call.name == "qronos" else []
    )
    return f" ({', '.join(of)})" if of else ""


def scales_of(fit: Call, errors: list[tuple[str, float]]) -> tuple[str, ...]:
    """Why scales that were found with inputs may be worse than those found without, where the first two errors say so."""
    if len(errors) < 2 or errors[1][1] <= errors[0][1]:
        return ()
    return (
        f"With inputs, {fit.name} counts each column's error by itself, by the mean square of its input (the diagonal of H). How "
        "errors of different columns add up in the output it does not see, so that its scales can be worse than those found "
        f"without inputs where values are rounded one by one: here {num(errors[1][1], 4)} against {num(errors[0][1], 4)}.",
    )


def _real(case: Case, q: QTensor) -> QTensor:
    """With the exponent of the case's format."""
    return replace(q, format=case.format)


def _beside(case: Case, plain: Tensor, final: QTensor, row: int) -> Listing:
    """Round-to-nearest and the result, value by value."""
    codes, values = final.unpacked(), final.dequantize()
    rows = tuple(
        (k, float(case.weight[row, k]), float(plain[row, k]), float(values[row, k]), int(codes[row, k]))
        for k in range(case.weight.shape[1])
    )
    return Listing("result", ("column", "w given", "nearest", "stored value", "code"), rows)
