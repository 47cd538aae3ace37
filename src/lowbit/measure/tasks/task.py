"""What a measure of one use of models is: for which models it is meant, what it keeps of each run, and which figures it makes of that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from lowbit.discovery import modules_of
from lowbit.interchange.pooling import Pooling
from lowbit.measure.quality import Estimate
from lowbit.measure.windows import Windows

Example = Mapping[str, Tensor]
"""What a model is called with, by the names of its arguments; one input, so tensors begin with a dimension of 1."""
Answer = Mapping[str, Tensor]
"""The float tensors of what a model returned, by name."""


@dataclass(frozen=True)
class Kind:
    """A figure that a task has.

    title   what the card calls it; `unit` stands behind its value, which is multiplied by `scale` for people
    limits  up to where (from where, for `rising` figures) the words "indistinguishable", "very close" and "noticeable" hold; None for a
            figure that decides no verdict
    rising  whether larger is better
    """

    name: str
    title: str
    unit: str = ""
    scale: float = 1.0
    limits: tuple[float, float, float] | None = None
    rising: bool = True

    def place(self, value: float) -> int:
        """0 for the best word that the value keeps, 3 where it keeps none, as NaN does."""
        kept = [value >= limit if self.rising else value <= limit for limit in self.limits or ()]
        return kept.index(True) if True in kept else len(kept)


@dataclass(frozen=True)
class Figure:
    """A figure by the name of its kind."""

    name: str
    estimate: Estimate


@dataclass(frozen=True, eq=False)
class Facts:
    """What is known of a model before it is measured.

    model      the float model
    example    the first of its inputs, and `answer`, what it gave for that
    pooling    how its folder makes an embedding of hidden states; None where the folder does not say
    tokenizer  None where there is none
    windows    of text; None where there is none, or the user gave other inputs
    """

    model: nn.Module
    example: Example
    answer: Answer
    pooling: Pooling | None = None
    tokenizer: Any = None
    windows: Windows | None = None

    @property
    def logits(self) -> Tensor | None:
        return self.answer.get("logits")

    @property
    def hidden(self) -> Tensor | None:
        return self.answer.get("last_hidden_state")

    @property
    def reads_text(self) -> bool:
        return "input_ids" in self.example


class Task(ABC):
    """One use of models. name: of the task, as in JSON. answers: what it gives, in the plural, for sentences."""

    name: ClassVar[str]
    answers: ClassVar[str]
    kinds: ClassVar[tuple[Kind, ...]]

    @abstractmethod
    def fits(self, facts: Facts) -> bool:
        """Whether the model is for this. Of all tasks one fits, or none."""

    def examples(self, facts: Facts) -> list[Example] | None:
        """Inputs that show more than those at hand; None where those do."""
        return None

    @abstractmethod
    def read(self, facts: Facts, model: nn.Module, example: Example, answer: Answer) -> Any:
        """What is kept of one input, small enough to be kept of all. model: the one that gave `answer`; it may be asked more."""

    @abstractmethod
    def compare(self, facts: Facts, found: Sequence[Any], right: Sequence[Any]) -> tuple[Figure, ...]:
        """The figures, of what was kept of the model and of the float model, input by input."""

    def words(self, facts: Facts) -> str:
        """How the answers came about, where that is to be said; "" where not."""
        return ""


T = TypeVar("T", bound=type[Task])
_TASKS: list[Task] = []


def task(kind: T) -> T:
    """Register a task. A decorator of its class."""
    _TASKS.append(kind())
    return kind


@cache
def tasks() -> tuple[Task, ...]:
    """Every task, in alphabetical order of their files."""
    modules_of("lowbit.measure.tasks")
    return tuple(_TASKS)


def task_of(facts: Facts) -> Task | None:
    """The task of a model; None where it is for nothing that is known."""
    return next((each for each in tasks() if each.fits(facts)), None)


def task_named(name: str | None) -> Task | None:
    return next((each for each in tasks() if each.name == name), None)


def kind_named(name: str) -> Kind | None:
    """The figure of that name in any task; those of one name are the same in all."""
    return next((kind for each in tasks() for kind in each.kinds if kind.name == name), None)
