"""A recommendation as JSON values."""

from __future__ import annotations

from typing import Any

from lowbit.measure.expected_loss import CALIBRATION
from lowbit.report.choices import Choice
from lowbit.report.recommend import Recommendation
from lowbit.report.recommend_table import word_of

RESULTS = "benchmarks/results"


def plain(found: Recommendation) -> dict[str, Any]:
    """All fields of a recommendation and of its choices; sizes are bytes, losses nats per token."""

    def name(choice: Choice | None) -> str | None:
        return None if choice is None else choice.name

    keys = (
        "label", "target", "memory", "context", "longest", "speed", "float_bytes", "storage", "samples", "measured_on", "extra",
    )  # fmt: skip
    out: dict[str, Any] = {key: getattr(found, key) for key in keys}
    out |= {"best": name(found.best), "second": name(found.second), "larger": name(found.larger)}
    if found.best is None:
        out |= {"smallest": found.smallest.name, "context_that_fits": found.context_that_fits}
    out["choices"] = [_plain(found, choice) for choice in found.choices]
    return out


def _plain(found: Recommendation, choice: Choice) -> dict[str, Any]:
    loss, measured, memory = choice.loss, choice.measured, choice.memory
    return {
        "name": choice.name, "recipe": choice.recipe or None, "command": choice.command, "fits": found.fits(choice),
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
