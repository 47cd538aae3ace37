"""SmoothQuant: range moves from the inputs into the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.formats.inputs import InputQuantizer, Inputs, parse_inputs
from lowbit.report.at_work.awq import chosen
from lowbit.report.at_work.case import Case
from lowbit.report.at_work.feedback import EXAMPLE
from lowbit.report.at_work.inputs import quantizer
from lowbit.report.at_work.trace import Listing, Outcome, Shown, Trace, shows
from lowbit.report.wording import number_text as num
from lowbit.solvers import Call


@shows("smooth", example=EXAMPLE)
def smooth(case: Case, call: Call) -> Shown:
    """Largest magnitudes of both sides by column, the scales, and the errors of both sides before and after."""
    found = chosen(case, call)
    after, given = case.scaled(found.scale), case.recipe.inputs
    kept = parse_inputs("int8:token") if given is None or given.format is None else given
    sides = [(largest(c.inputs), largest(c.weight)) for c in (case, after)]
    columns = tuple(
        (k, *(float(v[k]) for v in (*sides[0], found.scale, *sides[1]))) for k in range(case.weight.shape[1])
    )
    rows, outputs, q = [], [], after.nearest()
    for name, c in (("before", case), ("after", after)):
        x, w = _quantized(c, kept), c.nearest().dequantize()
        outputs.append(c.output_error(w, x))
        rows.append((name, 100 * off(x, c.inputs), 100 * off(w, c.weight), outputs[-1]))
    options = {**call.method.options, **dict(call.options)}
    searched = f"{options['points'] + 1} values of alpha are tried, and the best is alpha = {num(found.alpha)}"
    how = searched if options["points"] else f"alpha = {num(found.alpha)}"
    parts = (
        "Inputs in few bits suffer from channels that are much larger than the others. Each input channel is divided by s_k "
        "and the weight's column multiplied by it, which leaves x W^T as it is: "
        f"s_k = max|x_k|^alpha / max|w_k|^(1 - alpha), with {how}.",
        Listing("columns", ("column", "max|x|", "max|w|", "s", "max|x/s|", "max|w s|"), columns),
        f"Inputs in {kept} and weights in {case.format}: the relative error of each, and the error of the layer's output:",
        Listing("errors", ("", "inputs off by %", "weights off by %", "output error"), tuple(rows)),
        "In a model the division of x by s goes into the norm or the linear before, where it costs nothing.",
    )
    errors = [("both rounded as they are", outputs[0]), (f"{call.name}, then both rounded", outputs[1])]
    outcome = Outcome.of(q.unpacked(), q.dequantize() / found.scale, errors)
    return Shown(Trace(str(call), parts, outcome), after)


def largest(x: Tensor) -> Tensor:
    """[K]: the largest magnitude of each column."""
    return x.abs().amax(0)


def off(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    size = float(torch.linalg.vector_norm(b.double()))
    return float(torch.linalg.vector_norm((a - b).double())) / size if size else 0.0


def _quantized(case: Case, inputs: Inputs) -> Tensor:
    kept: InputQuantizer = quantizer(case.inputs, inputs, case.recipe.range)
    return kept.round(case.inputs)
