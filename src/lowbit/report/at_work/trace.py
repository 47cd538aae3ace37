"""What a method did on a small weight, as a value: sentences, tables, and how far the layer's output is off.

A function with `@shows("name", ...)` in a file of this folder shows the methods of these names; `@shows(kind="tuner")` shows
all of a kind that have no function of their own. It returns None where there is nothing to show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lowbit.discovery import modules_of
from lowbit.report.at_work.case import Case
from lowbit.solvers import Call

Cell = float | int | str | None
WIDEST = 8  # columns of a matrix that is drawn; JSON has larger ones
OUTPUT = "Error of the layer's output, the mean over the inputs of |x W^T - x Q^T|^2"
OF_WEIGHTS = "Error of all weights as the method counts it"


@dataclass(frozen=True)
class Listing:
    """A table. `name`: its key in JSON; `shown`: the rows that are drawn, None for all; `best`: the row that won,
    or that `mark` says it is."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    shown: tuple[int, ...] | None = None
    best: int | None = None
    mark: str = "best"

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"columns": self.columns, "rows": self.rows}
        return found if self.best is None else found | {"best": self.best}


@dataclass(frozen=True)
class Outcome:
    """What the method gives: codes and values by rows, and errors by name, of which the first is what it is compared with.

    `measure`: what the errors are of, the layer's output unless said otherwise.
    """

    codes: tuple[tuple[int, ...], ...]
    values: tuple[tuple[float, ...], ...]
    errors: tuple[tuple[str, float], ...]
    measure: str = OUTPUT

    @staticmethod
    def of(codes: Tensor, values: Tensor, errors: Sequence[tuple[str, float]], measure: str = OUTPUT) -> Outcome:
        """From codes [N, K] and values [N, K]."""
        return Outcome(
            tuple(tuple(map(int, row)) for row in codes.tolist()),
            tuple(map(tuple, values.tolist())),
            tuple(errors),
            measure,
        )


@dataclass(frozen=True)
class Trace:
    """One method at work: sentences and tables in reading order, and what came of it."""

    method: str
    parts: tuple[str | Listing, ...]
    outcome: Outcome | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON values but for infinities."""
        said = [part for part in self.parts if isinstance(part, str)]
        found: dict[str, Any] = {"method": self.method, "said": said}
        found |= {part.name: part.to_dict() for part in self.parts if isinstance(part, Listing)}
        if self.outcome is not None:
            made = self.outcome
            found["outcome"] = {
                "codes": made.codes,
                "values": made.values,
                "errors": dict(made.errors),
                "measure": made.measure,
            }
        return found


@dataclass(frozen=True)
class Shown:
    """A trace, and the case as the next method of the recipe finds it."""

    trace: Trace
    after: Case


Show = Callable[[Case, Call], Shown | None]
Fitted = Callable[[Case, Call], tuple[Case, str]]


@dataclass(frozen=True)
class Registered:
    """`fitted`: of a solver, the case that its fit sees, and a sentence where this is another than the array's."""

    show: Show
    example: str | None
    fitted: Fitted | None = None


_BY_NAME: dict[str, Registered] = {}
_BY_KIND: dict[str, Registered] = {}


def shows(
    *names: str, kind: str | None = None, example: str | None = None, fitted: Fitted | None = None
) -> Callable[[Show], Show]:
    """Register what shows these methods, or all of a kind. `example`: an array on which there is something to see; `fitted`: of
    solvers that find scales for other weights than they are given."""

    def register(function: Show) -> Show:
        for name in names:
            _BY_NAME[name] = Registered(function, example, fitted)
        if kind is not None:
            _BY_KIND[kind] = Registered(function, example, fitted)
        return function

    return register


def registered(call: Call) -> Registered | None:
    """What shows a method, or None where its formula says everything."""
    modules_of("lowbit.report.at_work")
    return _BY_NAME.get(call.name) or _BY_KIND.get(call.method.kind)


def shown_of(shown: int, count: int) -> str:
    """'; 10 of the 20 lines are shown', empty where all are."""
    return "" if shown == count else f"; {shown} of the {count} lines are shown"


def matrix(name: str, values: Tensor, rows: str = "row", columns: str = "") -> Listing:
    """A matrix [n, k] with its row and column numbers."""
    heads = tuple(f"{columns}{k}" for k in range(values.shape[1]))
    shown = () if values.shape[1] > WIDEST else None
    return Listing(name, (rows, *heads), tuple((i, *row) for i, row in enumerate(values.tolist())), shown)
