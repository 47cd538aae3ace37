"""What range estimators have in common: how they are named, fed and asked.

An estimator sees the inputs of one layer batch by batch and then names the range (low, high) that the levels are
to cover; what lies outside is clipped. Writing `@estimator` above a subclass in a file of this package is all that
adding one takes; its options are the keyword-only arguments of its constructor.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lowbit.discovery import modules_of
from lowbit.errors import FormatError, RecipeError, nearest
from lowbit.formats import TENSOR, Format, Inputs
from lowbit.formats.inputs import range_to_scale
from lowbit.solvers.ranges.histogram import Histogram


class RangeEstimator(ABC):
    """The range of one tensor, whose levels will be those of `fmt`; symmetric where it has no offset."""

    def __init__(self, fmt: Format) -> None:
        self.format, self.symmetric = fmt, fmt.offset is None
        self.histogram = Histogram()

    def observe(self, x: Tensor) -> None:
        """See one batch, of any shape. WeightError when it is not finite."""
        self.histogram.add(x)

    def range(self) -> tuple[float, float]:
        """(low, high); low = -high where it is symmetric. FormatError when nothing was observed."""
        if not self.histogram.total:
            raise FormatError("no inputs were observed, so that they have no range; calibrate with some text first")
        low, high = self.estimate()
        if self.symmetric:
            high = max(abs(low), abs(high))
            low = -high
        return low, high

    @abstractmethod
    def estimate(self) -> tuple[float, float]:
        """(low, high) of what was observed; where it is symmetric the larger magnitude counts."""

    def clipped(self) -> float:
        """Share of the observed values that lie outside of the range."""
        return self.histogram.share_outside(*self.range())

    def input_parts(self, inputs: Inputs) -> dict[str, Tensor]:
        """`input_scale` (and `input_offset`) as stored for these static inputs, float32 [1, 1]."""
        if inputs.format is None or not inputs.static or inputs.format.block != TENSOR:
            raise FormatError(f"a range is of one tensor, and {inputs} inputs do not store one; use int8:tensor:static")
        low, high = (Tensor([[end]]) for end in self.range())
        scale, offset = range_to_scale(low, high, inputs.format)
        return {"input_scale": scale} | ({} if offset is None else {"input_offset": offset})


_ESTIMATORS: dict[str, type[RangeEstimator]] = {}


def estimator(kind: type[RangeEstimator]) -> type[RangeEstimator]:
    """Register a range estimator under the name of its class in lower case."""
    _ESTIMATORS[kind.__name__.lower()] = kind
    return kind


def estimators() -> dict[str, type[RangeEstimator]]:
    """Every range estimator by name, in alphabetical order."""
    modules_of("lowbit.solvers.ranges")
    return dict(sorted(_ESTIMATORS.items()))


def options_of(kind: type[RangeEstimator]) -> dict[str, Any]:
    """Options of an estimator with their defaults."""
    parameters = inspect.signature(kind).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


@dataclass(frozen=True)
class RangeMethod:
    """An estimator with its options, as a recipe writes it: `percentile(p=99.9)`. RecipeError for unknown ones."""

    name: str = "minmax"
    options: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        known = estimators()
        if self.name not in known:
            raise RecipeError(
                f"unknown range estimator {self.name!r}{nearest(self.name, known)} (known: {', '.join(known)})"
            )
        allowed = options_of(known[self.name])
        for key, value in self.options:
            if key not in allowed:
                has = f"it has {', '.join(allowed)}" if allowed else "it has none"
                raise RecipeError(f"{self.name!r} has no option {key!r}{nearest(key, allowed)} ({has})")
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise RecipeError(f"option {key!r} of {self.name!r} is a number, not {value!r}")
        if len({key for key, _ in self.options}) < len(self.options):
            raise RecipeError(f"an option of {self.name!r} is given twice")
        object.__setattr__(self, "options", tuple(sorted(self.options)))

    def start(self, fmt: Format) -> RangeEstimator:
        """A fresh estimator for inputs of a format. RecipeError when an option has a value that it cannot have."""
        return estimators()[self.name](fmt, **dict(self.options))

    def __str__(self) -> str:
        inside = ",".join(f"{k}={v}" for k, v in self.options)
        return f"{self.name}({inside})" if inside else self.name
