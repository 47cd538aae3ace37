"""What is recommended for a model, as a value."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from lowbit.budget.memory import longest_context
from lowbit.display import Displayed, as_text
from lowbit.measure.card import json_ready
from lowbit.measure.verdict import THRESHOLDS
from lowbit.planning.kv_cache import KVCache
from lowbit.report.choices import Choice
from lowbit.report.recommend_json import plain
from lowbit.report.wording import bytes_text

OWN_TEXT = "my-text.txt"  # in commands: a text of the user's own
ACCEPTABLE = THRESHOLDS[1]  # the loss, nats per token, up to which speed decides


@dataclass(frozen=True, repr=False)
class Recommendation(Displayed):
    """What is recommended for a model, and everything that it was chosen from. Printed, it is the answer in words.

    label         the model as it was named
    target        the program that the result is for, `lowbit` or an exporter
    memory        bytes that may be used; `given` as they were asked for, None for what this machine has free
    context       tokens that the KV cache is sized for; `longest` those that the model can take, None where it does not say
    choices       what there is to choose from, the best quality first
    best          the answer, None where nothing fits
    second        another that fits, None where there is none
    larger        the next better one, which does not fit; None where the best of all fits
    speed         whether speed decided; `acceptable`: whether a loss fit for that was to be had
    kv            the KV cache by tokens
    float_bytes   of the weights that are quantized; `storage`: how the source stores them
    generates     whether the model writes text; `experts`: the share of a layer's experts that a token is given to
    here          bytes of memory that are free on this machine
    samples       windows of calibration text
    measured_on   words for the text that losses were measured on, None where they are expected ones
    """

    label: str
    target: str
    memory: int
    given: str | None
    context: int
    longest: int | None
    choices: tuple[Choice, ...]
    best: Choice | None
    second: Choice | None
    larger: Choice | None
    speed: bool
    acceptable: bool
    kv: KVCache
    float_bytes: int
    storage: str
    generates: bool
    experts: float
    here: int
    samples: int | None = None
    measured_on: str | None = None

    @property
    def smallest(self) -> Choice:
        """The choice of the fewest bytes."""
        return min(self.choices, key=lambda c: c.memory.total)

    @property
    def context_that_fits(self) -> int:
        """The most tokens, up to those that were asked for, that the smallest choice leaves room for."""
        return self.longest_with(self.smallest)

    def longest_with(self, choice: Choice) -> int:
        """The same for any choice."""
        return longest_context(self.memory, choice.memory.weights, self.kv, self.context, choice.memory.working)

    @property
    def extra(self) -> int:
        """By how many bytes the next better choice is too large; 0 where there is none."""
        return 0 if self.larger is None else self.larger.memory.total - self.memory

    def fits(self, choice: Choice) -> bool:
        return choice.memory.total <= self.memory

    def text(self, width: int = 80) -> str:
        """The answer in words, lines at most `width` wide but for commands, which are not broken."""
        return as_text(self, width)

    def _brief(self) -> str:
        return (
            f"{'nothing fits' if self.best is None else self.best.name} for {self.label} in {bytes_text(self.memory)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything above, as JSON values."""
        keys = (
            "label", "target", "memory", "context", "longest", "speed", "float_bytes", "storage", "samples", "measured_on", "extra",
        )  # fmt: skip
        out: dict[str, Any] = {key: getattr(self, key) for key in keys}
        out |= {
            name: None if choice is None else choice.name
            for name, choice in (("best", self.best), ("second", self.second), ("larger", self.larger))
        }
        if self.best is None:
            out |= {"smallest": self.smallest.name, "context_that_fits": self.context_that_fits}
        out["choices"] = [plain(choice, self.fits(choice)) for choice in self.choices]
        return out

    def to_json(self) -> str:
        """The same as JSON text."""
        return json.dumps(json_ready(self.to_dict()), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def about(seconds: float) -> str:
    """'about 40 seconds', 'about 3 minutes', 'about 2.5 hours', 'about 4 days': as exact as such a figure is."""
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= 1.5 * size:
            count = f"{seconds / size:.2g}" if seconds < 9.5 * size else f"{seconds / size:.0f}"
            return f"about {count} {unit}s"
    return f"about {max(1, round(seconds))} second{'s' * (round(seconds) > 1)}"
