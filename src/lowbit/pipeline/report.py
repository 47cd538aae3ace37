"""What quantizing did: the report of a finished run, and the facts of each tensor that the journal keeps for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lowbit.calibration.data import Calibration
from lowbit.display import Displayed
from lowbit.planning.plan import Plan
from lowbit.weights.solve import LayerLoss, Solved, with_exponent


@dataclass(frozen=True)
class LayerReport:
    """What became of one tensor. `error`: |w - w_q| / |w|, 0 for a kept one.

    `output`: with calibration text, |x (w - w_q)'| / |x w'| of round-to-nearest and of the result, on how many tokens.
    `warning`: what a person has to know of it, such as values that are not finite, or too small for the format.
    """

    name: str
    format: str | None
    keep: str | None
    bits_per_weight: float
    error: float
    output: LayerLoss | None = None
    note: str = ""
    warning: str = ""


@dataclass(frozen=True, repr=False)
class Report(Displayed):
    """What quantizing did: layers, coverage (share of parameters quantized), bytes, bits per weight.

    `tuning`: what a tuner of the whole model said of its work, such as the loss before and after. `ranges`: of static
    inputs, which layers are not static because their range explodes.
    """

    recipe: str
    layers: tuple[LayerReport, ...]
    coverage: float
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    linear_bits_per_weight: float
    kept: dict[str, tuple[int, int]]
    calibration: dict[str, Any] | None = None
    tuning: dict[str, Any] | None = None
    ranges: dict[str, Any] | None = None

    def _brief(self) -> str:
        return f"{self.bits_per_weight:.3f} bits per weight, {self.coverage:.2%} quantized, {self.recipe}"

    @property
    def warnings(self) -> dict[str, str]:
        """Name of a tensor -> what a person has to know of it."""
        return {layer.name: layer.warning for layer in self.layers if layer.warning}

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def make_report(plan: Plan, facts: Mapping[str, Mapping[str, Any]], calibration: Calibration | None = None) -> Report:
    """The report of a finished plan; `facts` by tensor name, as the journal keeps them."""
    layers = tuple(
        LayerReport(
            t.name,
            None if (fmt := with_exponent(t.format, facts[t.name].get("exponent", 0))) is None else str(fmt),
            t.keep,
            8 * t.bytes_after / max(1, t.count),
            float(facts[t.name]["error"]),
            LayerLoss(**found) if (found := facts[t.name].get("output")) else None,
            "; ".join(filter(None, (str(facts[t.name].get("note", "")), plan.note_of(t.name)))),
            str(facts[t.name].get("warning", "")),
        )
        for t in plan.tensors
    )
    return Report(
        str(plan.recipe), layers, plan.coverage, plan.bytes_before, plan.bytes_after, plan.bits_per_weight,
        plan.linear_bits_per_weight, plan.kept(), None if calibration is None else calibration.to_json(),
        next((entry["tuned"] for entry in facts.values() if "tuned" in entry), None),
        None if plan.survey is None else plan.survey.to_json(),
    )  # fmt: skip


def solved_facts(solved: Solved) -> dict[str, Any]:
    """What the journal and the manifest keep of a solved tensor, with its hashes."""
    facts: dict[str, Any] = {"error": solved.error}
    if solved.exponent:
        facts["exponent"] = solved.exponent
    if solved.warning:
        facts["warning"] = solved.warning
    if solved.output is not None:
        facts["output"] = asdict(solved.output)
    if solved.tuned is not None:
        facts["tuned"] = solved.tuned
    return facts | ({"note": solved.note} if solved.note else {})
