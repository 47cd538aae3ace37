"""The small weight and the few inputs that a method is shown on."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lowbit.errors import WeightError
from lowbit.formats import Format, QTensor
from lowbit.recipes.recipe import Recipe
from lowbit.solvers.ranging import in_range
from lowbit.solvers.stats import Stats, StatsBuilder

ROWS, COLUMNS, TOKENS, SEED = 4, 32, 8, 0
NEAREST = "round-to-nearest, without inputs"
WITH_INPUTS = "round-to-nearest with these scales"
CORNER = 8  # columns of a weight that has more than COLUMNS


@dataclass(frozen=True, eq=False)
class Case:
    """A weight float32 [N, K] and inputs float32 [T, K] of its layer, y = x W^T, as the methods of a recipe find them.

    inputs        what the layer sees behind quantized layers
    inputs_float  the same in the float model
    calibrated    whether the recipe's statistics come from these inputs, as from calibration text
    """

    weight: Tensor
    inputs: Tensor
    inputs_float: Tensor
    recipe: Recipe
    wanted: Format
    calibrated: bool

    @staticmethod
    def of(weight: Tensor, inputs: Tensor, recipe: Recipe, fmt: Format, calibrated: bool) -> Case:
        """The inputs of the quantized model are those of the float model but for methods that tell these apart."""
        drifts = recipe.solver is not None and recipe.solver.method.needs == "drift"
        return Case(weight, coarser(inputs) if drifts else inputs, inputs, recipe, fmt, calibrated)

    @property
    def format(self) -> Format:
        """With an exponent where the weight needs one."""
        return in_range(self.weight, self.wanted)

    @cached_property
    def stats(self) -> Stats:
        """What calibration would know of the inputs."""
        builder = StatsBuilder(self.inputs.shape[1], drift=True)
        builder.add(self.inputs, self.inputs_float)
        return builder.stats()

    @property
    def known(self) -> Stats | None:
        """The statistics where the recipe has them."""
        return self.stats if self.calibrated else None

    def nearest(self) -> QTensor:
        """The weight by the recipe's data-free solver: round-to-nearest, k-means for learned levels."""
        return self.rounded(self.weight, self.known)

    def rounded(self, weight: Tensor, stats: Stats | None) -> QTensor:
        """Any weight [N, K] by the recipe's data-free solver, as a transform tries it."""
        fmt = in_range(weight, self.wanted)
        return self.recipe.solver_for(fmt)(weight, fmt, self.recipe.fit_for(fmt), stats)  # type: ignore[no-any-return]

    def nearest_errors(self, known: float, name: str = WITH_INPUTS) -> list[tuple[str, float]]:
        """Output errors of round-to-nearest by name: with the scales that are found without inputs, and `known`, that with the
        scales that are found with them, under `name` and where it is another."""
        free = self.output_error(self.rounded(self.weight, None).dequantize())
        if abs(known - free) <= 1e-5 * free:
            return [(NEAREST, free)]
        return [(NEAREST, free), (name, known)]

    def solved(self) -> QTensor:
        """The weight by the recipe's own solver."""
        fmt = self.format
        solver = self.recipe.solver_for(fmt, with_stats=self.calibrated)
        return solver(self.weight, fmt, self.recipe.fit_for(fmt), self.known)  # type: ignore[no-any-return]

    def output_error(self, values: Tensor, inputs: Tensor | None = None) -> float:
        """The mean over the inputs of |x_f W^T - x Q^T|^2 for Q = `values` [N, K], float64. `inputs`: x, where another."""
        x = self.inputs if inputs is None else inputs
        off = self.inputs_float.double() @ self.weight.double().T - x.double() @ values.double().T
        return float(off.square().sum(1).mean())

    def scaled(self, scale: Tensor) -> Case:
        """Columns of the weight times `scale` [K], and the inputs divided by it."""
        return replace(
            self, weight=self.weight * scale, inputs=self.inputs / scale, inputs_float=self.inputs_float / scale
        )


def made_up(width: int) -> Tensor:
    """float32 [TOKENS, width]: inputs that go together, as those of a layer do, one channel ten times as large as the others.

    The same on every machine, and short to write: one decimal.
    """
    rng = random.Random(SEED)
    loads = [rng.choice((-1, 1)) * (0.5 + rng.random()) for _ in range(width)]
    large = 1 % width
    rows = []
    for _ in range(TOKENS):
        common = rng.gauss(0, 1)
        row = [common * load + 0.4 * rng.gauss(0, 1) for load in loads]
        row[large] *= 8
        rows.append([round(v, 1) + 0.0 for v in row])
    return torch.tensor(rows)


def step_of(x: Tensor) -> float:
    """A sixth of the largest magnitude, to one digit: how roughly the layers before are said to have worked."""
    return float(f"{float(x.abs().max()) / 24:.0e}")


def coarser(x: Tensor) -> Tensor:
    """x rounded to multiples of `step_of(x)`: what quantized layers before might make of it."""
    step = step_of(x)
    return (x / step).round() * step if step else x


def checked(inputs: Tensor, width: int) -> Tensor:
    """Inputs as float32 [T, width]. WeightError for another width, for NaN and for infinity."""
    x = inputs.detach().to(torch.float32)
    x = x[None] if x.dim() == 1 else x
    if x.dim() != 2 or x.shape[1] != width or not len(x):
        raise WeightError(
            f"the inputs are {' x '.join(map(str, inputs.shape))}; each row of them needs {width} numbers, one for every "
            "column of the array"
        )
    if not bool(x.isfinite().all()):
        raise WeightError("the inputs have NaN or infinite values; a layer's inputs are finite numbers")
    return x
