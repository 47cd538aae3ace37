"""What trains on a whole model cannot be shown on an array: what it would change is said instead."""

from __future__ import annotations

from lowbit.report.at_work.case import Case
from lowbit.report.at_work.trace import Shown, Trace, shows
from lowbit.solvers import Call

_CHANGES = {
    "distill": "scales, minima, learned levels, norms and biases, so that the next-token distribution becomes that of the "
    "float model; the codes stay",
    "lkd": "the float weights of one block of the model after another, rounded in every step, so that the block's output "
    "becomes that of the float block; the codes follow",
    "reconstruct": "whether each weight is rounded up or down, and the scales, so that the output of one block of the model "
    "after another becomes that of the float block",
}


@shows(kind="tuner")
def tuner(case: Case, call: Call) -> Shown:
    """One sentence."""
    changes = _CHANGES.get(call.name, f"what is stored: {call.method.summary}")
    said = (
        f"{call.name} trains on calibration text, which one array cannot show: the numbers here are those before training. "
        f"It would change {changes}."
    )
    return Shown(Trace(str(call), (said,)), case)


@shows(kind="weighting")
def weighting(case: Case, call: Call) -> Shown:
    """One sentence."""
    said = (
        f"{call.name} weighs tokens by the gradients of a whole model, which one array cannot show: here every input counts "
        "the same. In a model H = sum of g_t x_t^T x_t, where g_t is how much the loss depends on the layer's output at "
        "token t."
    )
    return Shown(Trace(str(call), (said,)), case)
