"""Transforms inside a block: the weights that share an input are scaled, and the division goes where it costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lowbit.formats import Format
from lowbit.interchange.source import Source
from lowbit.recipes.recipe import Recipe
from lowbit.recipes.rewriting import arch_or_none, group_transforms

if TYPE_CHECKING:
    from lowbit.interchange.tensors import TensorPlan
from lowbit.solvers.ranging import in_range
from lowbit.solvers.stats import Stats
from lowbit.transforms import Arch, apply_scale, shared_channels


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
