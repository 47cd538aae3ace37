"""How recipes say what becomes of the inputs of linear layers: of all, of some, and where a static range explodes.

a=int8:token                               of all
a=percentile(p=99.9)@int8:tensor           static, with the estimator of its range
a:*.down_proj=int8:g64                     of the layers that a glob names; the last match wins
a:*.layers.0.*=float                       not in few bits there
fallback=int8:g64:over=32                  what static inputs become in layers whose range explodes; fallback=never
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lowbit.errors import RecipeError
from lowbit.formats.inputs import FLOAT, Inputs, parse_inputs
from lowbit.solvers.calls import call_parts
from lowbit.solvers.ranges.estimator import RangeMethod

NEVER = "never"
_OVER = "over="


@dataclass(frozen=True)
class InputRule:
    """Inputs, or None for float ones, and for static ones the estimator of their range (minmax unless it is named)."""

    inputs: Inputs | None
    range: RangeMethod | None = None

    def __post_init__(self) -> None:
        static = self.inputs is not None and self.inputs.static
        if static and self.range is None:
            object.__setattr__(self, "range", RangeMethod())
        if not static and self.range is not None:
            raise RecipeError(f"{self.inputs or FLOAT} inputs have no range to estimate; leave {self.range} out")

    def __str__(self) -> str:
        if self.inputs is None:
            return FLOAT
        return str(self.inputs) if self.range in (None, RangeMethod()) else f"{self.range}@{self.inputs}"


def parse_rule(value: str) -> InputRule:
    """`int8:token`, `float`, or with the estimator of a static range in front: `percentile(p=99.9)@int8:tensor`."""
    head, at, text = value.rpartition("@")
    if text == FLOAT:
        return InputRule(None, RangeMethod(head) if at else None)
    inputs = parse_inputs(text)
    if not at:
        return InputRule(inputs)
    name, options = call_parts(head)
    numbers = tuple((k, v) for k, v in options if not isinstance(v, str))
    if len(numbers) < len(options):
        raise RecipeError(f"the options of {name!r} are numbers: {head!r}")
    return InputRule(replace(inputs, static=True), RangeMethod(name, numbers))


@dataclass(frozen=True)
class Fallback:
    """What static inputs become in layers whose range explodes: dynamic `inputs`, or None for float ones.

    A range explodes where the largest |x| of the calibration text is more than `over` times the root mean square of
    the median token. One step of a range of R times that rounds a typical token with a relative error of
    R / (127 sqrt 12) in int8: 7 % at 32.
    """

    inputs: Inputs | None
    over: float = 32.0

    def __post_init__(self) -> None:
        if self.inputs is not None and self.inputs.static:
            raise RecipeError(
                f"fallback={self.inputs} has a stored scale itself; give inputs whose scales are found while running, such as int8:g64"
            )
        if not 1 <= self.over < float("inf"):
            raise RecipeError(f"fallback: over={self.over:g} is no ratio of the largest value to a typical one; try 32")

    def __str__(self) -> str:
        shown = FLOAT if self.inputs is None else str(self.inputs)
        return shown if self.over == Fallback.over else f"{shown}:{_OVER}{_plain(self.over)}"


def parse_fallback(value: str) -> Fallback | None:
    """`never`, or inputs with `over=RATIO` after them where it is not 32."""
    if value == NEVER:
        return None
    words = value.split(":")
    given = [word for word in words if word.startswith(_OVER)]
    text = ":".join(word for word in words if word not in given)
    try:
        ratios = [float(word[len(_OVER) :]) for word in given]
    except ValueError:
        raise RecipeError(f"fallback={value}: {given[0]} is no number; try over=32") from None
    if len(ratios) > 1:
        raise RecipeError(f"fallback={value} says 'over' twice")
    return Fallback(parse_rule(text).inputs, *ratios)


@dataclass(frozen=True)
class Survey:
    """What calibration text said of static ranges before the plan: `ratios` by weight, of the largest |x| to the root mean
    square of the median token; those `over` a limit have exploded. `key`: what it depends on."""

    key: str
    over: float
    ratios: dict[str, float]

    @property
    def exploded(self) -> dict[str, float]:
        return {name: ratio for name, ratio in self.ratios.items() if ratio > self.over}

    def to_json(self) -> dict[str, Any]:
        """How many layers were looked at, how many stay static, and the others with their ratios."""
        exploded = self.exploded
        return {"over": self.over, "static": len(self.ratios) - len(exploded), "exploded": exploded}


def inputs_text(counts: Mapping[str, int], ranges: Mapping[str, Any] | None) -> str:
    """How the inputs of layers are stored, for people: `counts` by the text of inputs, `ranges` as `Survey.to_json`."""
    text = ", ".join(f"{count} layer{'s' * (count != 1)} {inputs}" for inputs, count in counts.items())
    exploded = (ranges or {}).get("exploded")
    if not ranges or not exploded:
        return text
    worst = max(exploded, key=lambda name: exploded[name])
    return (
        f"{text}; {len(exploded)} of {len(exploded) + ranges['static']} find their scales while running, because their largest input is over "
        f"{_plain(ranges['over'])} times a typical one (the most, {exploded[worst]:g} times, in {worst.removesuffix('.weight')})"
    )


def _plain(value: float) -> str:
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


# Groups of 64 channels cost no stored byte and lose less than one scale a token: benchmarks/results/activations.md.
FALLBACK = Fallback(parse_inputs("int8:g64"))
