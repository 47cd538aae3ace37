"""The inputs of the layer in few bits: the range that their scale comes from, and the output that both roundings give."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.formats.inputs import InputQuantizer, Inputs, outlier_columns, quantize_inputs
from lowbit.report.at_work.case import Case
from lowbit.report.at_work.trace import Listing, Outcome, Trace
from lowbit.report.wording import number_text as num
from lowbit.solvers.ranges.estimator import RangeMethod, estimators


def quantizer(x: Tensor, inputs: Inputs, method: RangeMethod | None) -> InputQuantizer:
    """How inputs like `x` [T, K] are rounded; a static range is what the estimator says of all of them."""
    if not inputs.static:
        return InputQuantizer(inputs)
    parts = _seen(x, inputs, method or RangeMethod()).input_parts(inputs)
    return InputQuantizer(inputs, parts["input_scale"], parts.get("input_offset"))


def _seen(x: Tensor, inputs: Inputs, method: RangeMethod):  # type: ignore[no-untyped-def]
    assert inputs.format is not None
    estimator = method.start(inputs.format)
    for row in x:  # each as a batch of its own, so that there is something to average
        estimator.observe(row)
    return estimator


def show_inputs(case: Case) -> Trace | None:
    """`a=` of the recipe on these inputs; None where inputs stay float."""
    inputs, method = case.recipe.inputs, case.recipe.range
    if inputs is None or inputs.format is None:
        return None
    kept = quantizer(case.inputs, inputs, method)
    parts: list[str | Listing] = []
    if inputs.static:
        chosen = method or RangeMethod()
        own = type(_seen(case.inputs, inputs, chosen)).__name__.lower()
        rows = []
        for name in estimators():
            ranged = _seen(case.inputs, inputs, chosen if name == own else RangeMethod(name))
            low, high = ranged.range()
            rows.append(
                (
                    name,
                    low,
                    high,
                    100 * ranged.clipped(),
                    _rms(case.inputs, inputs, chosen if name == own else RangeMethod(name)),
                )
            )
        summary = (estimators()[own].__doc__ or "").split("\n")[0]
        parts += [
            f"The range of static inputs is found on calibration text and stored. {chosen}: {summary} Here every input is "
            "seen as a batch of its own, and this is what each estimator would say; the marked one is this recipe's:",
            Listing("ranges", ("estimator", "lowest", "highest", "% clipped", "rms error"), tuple(rows),
                    best=list(estimators()).index(own)),
        ]  # fmt: skip
    else:
        parts.append(f"While the model runs, inputs are rounded to {inputs}: a scale comes from the values at hand.")
    level, scale, offset = quantize_inputs(case.inputs, inputs, kept.scale, kept.offset)
    rounded = kept.round(case.inputs)
    shown = "  ".join(num(float(s)) for s in scale.reshape(-1)[:8].tolist())
    many = scale.numel() > 1
    parts.append(
        f"The scale{'s, input by input,' if many else ''} here: {shown}" + (" ..." if scale.numel() > 8 else "")
        + ("" if offset is None else f"; offset {num(float(offset.reshape(-1)[0]))}") + ". The first input:"
    )  # fmt: skip
    outlier = outlier_columns(case.inputs, inputs.outliers) if inputs.outliers is not None else None
    table = []
    for k in range(case.inputs.shape[1]):
        far = outlier is not None and bool(outlier[k])
        table.append((k, float(case.inputs[0, k]), "float" if far else int(level[0, k]), float(rounded[0, k])))
    parts.append(Listing("first_input", ("column", "x", "level", "value"), tuple(table)))
    if outlier is not None:
        count = int(outlier.sum())
        which = ", ".join(str(k) for k in outlier.nonzero()[:, 0].tolist())
        parts.append(
            f"Columns in which any |x| reaches {num(inputs.outliers or 0)} stay float: {which or 'none here'}"
            + (f" ({count} of {len(outlier)})." if count else ".")
        )
    q = case.solved()
    w = q.dequantize()
    errors = (
        ("weights rounded, inputs float", case.output_error(w)),
        ("weights and inputs rounded", case.output_error(w, rounded)),
    )
    return Trace(f"a={inputs}", tuple(parts), Outcome.of(q.unpacked(), w, errors))


def _rms(x: Tensor, inputs: Inputs, method: RangeMethod) -> float:
    error = quantizer(x, inputs, method).round(x) - x
    return float(torch.linalg.vector_norm(error.double())) / error.numel() ** 0.5
