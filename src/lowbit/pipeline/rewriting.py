"""Transforms at work: those of a source before the plan, those of weights that share an input inside a block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lowbit.errors import RecipeError, TransformError
from lowbit.formats import Format
from lowbit.interchange.source import Source
from lowbit.pipeline.recipe import Recipe

if TYPE_CHECKING:
    from lowbit.pipeline.plan import TensorPlan
from lowbit.solvers import Call
from lowbit.solvers.ranging import in_range
from lowbit.solvers.stats import Stats
from lowbit.transforms import FACTS, Arch, apply_scale, arch_of, shared_channels


def rewritten(source: Source, recipe: Recipe) -> Source:
    """The source behind the recipe's transforms that need no data, in order."""
    for call in recipe.transforms:
        if FACTS[call.name].kind == "source":
            source = call.method.function(source, **dict(call.options))
    if getattr(source, "online", None):
        raise RecipeError("rotations of inputs while the model runs (r4=1) cannot be stored yet; leave r4 out")
    return source


def group_transforms(recipe: Recipe) -> list[Call]:
    """The transforms that look at the input of weights."""
    return [call for call in recipe.transforms if FACTS[call.name].kind == "group"]


def arch_or_none(source: Source, recipe: Recipe) -> Arch | None:
    """The facts that scaling needs. Without any, inputs that are quantized anyway are divided while running; else
    TransformError, as there is no place for the division."""
    try:
        return arch_of(source)
    except TransformError:
        if recipe.stores_inputs:
            return None
        raise


def divided_inputs(source: Source, recipe: Recipe) -> Callable[[str], bool]:
    """Whether the input of a weight is divided while running: it is scaled, and nothing before can take the division."""
    if not group_transforms(recipe) or not recipe.stores_inputs:
        return lambda name: False
    arch = arch_or_none(source, recipe)
    taken = set() if arch is None else {name for point in arch.points for name in point.consumers}
    return lambda name: name not in taken


@dataclass(frozen=True)
class Rewriter:
    """Applies the recipe's group transforms to the weights of one block."""

    source: Source
    recipe: Recipe
    arch: Arch | None

    @staticmethod
    def of(source: Source, recipe: Recipe) -> Rewriter | None:
        """None when the recipe has no such transform."""
        calls = group_transforms(recipe)
        return Rewriter(source, recipe, arch_or_none(source, recipe)) if calls else None

    def scale(
        self,
        names: list[str],
        tensors: Mapping[str, Tensor],
        stats: Stats,
        fmt: Format,
        transposed: bool,
        divides: bool,
    ) -> tuple[dict[str, Tensor], Tensor] | None:
        """New tensors and the scale of the input that `names` share; None where nothing can take the division.

        `tensors`: all of the block's, as the source stores them. `divides`: the input can be divided while running.
        """
        point = None if self.arch is None else self.arch.point_for(names)
        if point is None and not divides:
            return None
        if point is not None and not all(name in tensors for name in (*point.producers, *point.consumers)):
            return None  # its producer lies in another block, and is written already
        shared = None if point is None else shared_channels(point)
        weights = [tensors[n].transpose(-1, -2).float() if transposed else tensors[n].float() for n in names]
        total: Tensor | None = None
        done = dict(tensors)
        for call in group_transforms(self.recipe):
            found = call.method.function(weights, stats, self._rounded(fmt), shared, **dict(call.options))
            touched = names if point is None else [*point.producers, *point.consumers]
            if self.arch is None or point is None:
                axis = -2 if transposed else -1
                applied, new = found.scale, {}
                for name in names:
                    shape = [1] * done[name].dim()
                    shape[axis] = -1
                    new[name] = (done[name].double() * applied.double().view(shape)).to(done[name].dtype)
            else:
                new, applied = apply_scale(self.arch, point, {n: done[n] for n in touched}, found.scale)
            done |= new
            stats = stats.scaled(applied)
            weights = [done[n].transpose(-1, -2).float() if transposed else done[n].float() for n in names]
            total = applied if total is None else total * applied
        return (done, total) if total is not None else None

    @property
    def chooses(self) -> bool:
        """Whether a transform looks for the best of several scales, rather than taking the one it is told to."""
        options = [{**call.method.options, **dict(call.options)} for call in group_transforms(self.recipe)]
        return any(found.get("points") for found in options)

    def nearest(self, plan: TensorPlan, weight: Tensor) -> Tensor:
        """A weight rounded by the recipe's data-free solver, as the model has it; itself where it is kept."""
        if plan.format is None:
            return weight
        turned = weight.transpose(-1, -2) if plan.transposed else weight
        fmt = in_range(turned, plan.format)
        solver, fit = self.recipe.solver_for(fmt), self.recipe.fit_for(fmt)
        dense: Tensor = solver(turned.float().contiguous(), fmt, fit, None).dequantize()
        return dense.transpose(-1, -2).contiguous() if plan.transposed else dense

    def _rounded(self, fmt: Format) -> Callable[[Tensor, Stats], Tensor]:
        solver, fit = self.recipe.solver_for(fmt), self.recipe.fit_for(fmt)
        return lambda weight, stats: solver(weight, in_range(weight, fmt), fit, stats).dequantize()
