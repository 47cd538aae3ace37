"""A choice of a recommendation as JSON values."""

from __future__ import annotations

from typing import Any

from lowbit.measure.expected_loss import CALIBRATION
from lowbit.report.choice_words import word_of
from lowbit.report.choices import Choice

RESULTS = "benchmarks/results"


def plain(choice: Choice, fits: bool) -> dict[str, Any]:
    """All fields of a choice; sizes are bytes, losses nats per token."""
    loss, measured, memory = choice.loss, choice.measured, choice.memory
    return {
        "name": choice.name, "recipe": choice.recipe or None, "command": choice.command, "fits": fits,
        "weight_bytes": memory.weights, "cache_bytes": memory.cache, "working_bytes": memory.working,
        "total_bytes": memory.total, "read_bytes_per_token": choice.read, "linear_bits_per_weight": choice.bits,
        "seconds": choice.seconds, "peak_bytes": choice.peak, "verdict": word_of(choice),
        "calibrated": choice.text is not None, "calibration": choice.text, "loss_is": _loss_is(choice),
        "replaced": list(choice.replaced),
        "expected_kl": None if loss is None else {
            "kl": loss.kl, "stderr": loss.by.stderr, "at_most": loss.at_most, "measured_as": loss.by.recipe,
            "calibrated_on": CALIBRATION if loss.by.text else None, "source": loss.by.source,
            "file": f"{RESULTS}/{loss.by.source}",
        },
        "kl": None if measured is None else {"value": measured.value, "stderr": measured.stderr},
    }  # fmt: skip


def _loss_is(choice: Choice) -> str:
    """'measured here' on this model, 'measured elsewhere', 'bound', or 'none' for what is left as it is."""
    if choice.measured is not None:
        return "measured here"
    if choice.loss is None:
        return "none"
    return "bound" if choice.bound else "measured elsewhere"
