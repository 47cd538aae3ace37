"""What a tuner of the whole model is given, and what it gives back. No files, no architectures: tensors and functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowbit.formats import QTensor
from lowbit.tuning.weight import TunableVector, TunableWeight

# Token ids [1, length] -> logits [length, vocabulary], of the float model or with these tensors in their places.
Teacher = Callable[[Tensor], Tensor]
Student = Callable[[Mapping[str, Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class ModelProblem:
    """A quantized model, its float model, and text.

    `weights` by parameter name, `transposed` those that their modules keep as [in, out]; `vectors`: what stays float.
    `dtypes`: by name, what a dense weight is expanded to; float32 where it is not named. `say`: called with how far it is,
    (done, of).
    """

    weights: Mapping[str, QTensor]
    transposed: frozenset[str]
    vectors: Mapping[str, Tensor]
    teacher: Teacher
    student: Student
    windows: tuple[Tensor, ...]
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    say: Callable[[int, int], None] = lambda done, of: None


@dataclass(frozen=True)
class Tuned:
    """New values of what was tuned, and what it did: JSON values such as the loss before and after."""

    weights: dict[str, QTensor]
    vectors: dict[str, Tensor]
    facts: dict[str, Any]


class Tunables:
    """All weights and vectors of a problem as functions of parameters."""

    def __init__(self, problem: ModelProblem) -> None:
        self.problem = problem
        self.weights = {name: TunableWeight(q) for name, q in problem.weights.items()}
        self.vectors = {name: TunableVector(v) for name, v in problem.vectors.items()}

    def parameters(self) -> list[Tensor]:
        """Leaves that ask for gradients, in a fixed order."""
        parts: list[TunableWeight | TunableVector] = [*self.weights.values(), *self.vectors.values()]
        return [p for part in parts for p in part.parameters()]

    def dense(self) -> dict[str, Tensor]:
        """Every tensor as its module holds it, with gradients."""
        out = {name: vector.dense() for name, vector in self.vectors.items()}
        for name, weight in self.weights.items():
            out[name] = self._oriented(name, weight.dense(self._dtype(name)))
        return out

    def stored(self) -> tuple[dict[str, QTensor], dict[str, Tensor]]:
        """What would be stored now: weights and vectors."""
        return {n: w.tuned() for n, w in self.weights.items()}, {n: v.tuned() for n, v in self.vectors.items()}

    def dense_as_stored(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor as a reader of what is stored sees it, in the type that is computed with."""
        for name, vector in self.vectors.items():
            yield name, vector.tuned().to(torch.float32)
        for name, weight in self.weights.items():
            yield name, self._oriented(name, weight.tuned().dequantize(self._dtype(name)))

    def _dtype(self, name: str) -> torch.dtype:
        return self.problem.dtypes.get(name, torch.float32)

    def _oriented(self, name: str, weight: Tensor) -> Tensor:
        return weight.transpose(-1, -2) if name in self.problem.transposed else weight
