"""Rotation: the range of rows before and after; and folding, which is nothing to see on an array."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowbit.report.at_work.case import Case
from lowbit.report.at_work.trace import Cell, Listing, Outcome, Shown, Trace, matrix, shows
from lowbit.solvers import Call
from lowbit.transforms.hadamard import rotation_for

EXAMPLE = "[-0.17, 0.1, -0.13, 0.35, 0.03, -0.23, -0.98, 0.11]"
_INPUTS = 4  # whose spread is shown
_NAMES = {
    "hadamard": "a Hadamard matrix with random signs: every entry has the same size, so that each value is spread over all",
    "random": "a random orthogonal matrix, as no Hadamard matrix of this size is known",
}


def spread(x: Tensor) -> tuple[float, float, float]:
    """Of a row: the largest magnitude, the root of the mean square, and their ratio."""
    peak, rms = float(x.abs().max()), float(x.double().square().mean().sqrt())
    return peak, rms, peak / rms if rms else 0.0


@shows("rotate", example=EXAMPLE)
def rotate(case: Case, call: Call) -> Shown:
    """Each row and input times Q: largest magnitude over the mean before and after, and both errors."""
    q = rotation_for(case.weight.shape[1], int({**call.method.options, **dict(call.options)}["seed"]))
    after = replace(
        case,
        weight=q.apply(case.weight),
        inputs=q.apply(case.inputs),
        inputs_float=q.apply(case.inputs_float),
    )
    pairs = [(f"w {i}", case.weight[i], after.weight[i]) for i in range(len(case.weight))]
    pairs += [(f"x {i}", case.inputs[i], after.inputs[i]) for i in range(min(_INPUTS, len(case.inputs)))]
    rows: list[tuple[Cell, ...]] = [
        (name, *(v for pair in zip(spread(before), spread(turned)) for v in pair)) for name, before, turned in pairs
    ]
    parts: list[str | Listing] = [
        "One large value makes the scale of all its neighbours large. Weights and inputs are both turned by an orthogonal "
        f"matrix Q, which leaves the product as it is, (x Q)(W Q)^T = x W^T. Q here is {_NAMES[q.kind]} (seed {q.seed}).",
    ]
    if q.size <= 8:
        parts.append(matrix("rotation", q.matrix(), "Q"))
    parts += [
        "The largest magnitude of each row over its root mean square, before and after; 1 would be all values alike"
        f"{'' if len(case.inputs) <= _INPUTS else f' ({_INPUTS} of the {len(case.inputs)} inputs are shown)'}:",
        Listing("spread", ("row", "max", "max, turned", "rms", "rms, turned", "max/rms", "turned"), tuple(rows)),
        "The first row, and what it becomes:",
        Listing(
            "rotated",
            ("column", "w", "w turned"),
            tuple((k, float(case.weight[0, k]), float(after.weight[0, k])) for k in range(q.size)),
        ),
    ]
    made = after.nearest()
    values = made.dequantize()
    errors = (
        ("round-to-nearest", case.output_error(case.nearest().dequantize())),
        ("rotated, then round-to-nearest", after.output_error(values)),
    )
    if errors[1][1] > errors[0][1]:
        parts.append(
            "On this array the rotation does not pay: without a value that stands out there is nothing to spread."
        )
    parts.append(
        "In a model one Q as wide as the residual stream serves all layers. The weights before and after it are turned once, "
        "when the model is quantized, so that nothing is added while it runs."
    )
    return Shown(Trace(str(call), tuple(parts), Outcome.of(made.unpacked(), values @ _back(q.matrix()), errors)), after)


def _back(q: Tensor) -> Tensor:
    return q.to(torch.float32).T.contiguous()


@shows("fold")
def fold(case: Case, call: Call) -> Shown:
    """A sentence: an array has no norm before it."""
    said = (
        "Folding puts the weight g of the norm before a layer into the layer's columns, W diag(g), and leaves a norm of ones. "
        "An array has no norm before it, so that nothing changes here."
    )
    return Shown(Trace(str(call), (said,)), case)
