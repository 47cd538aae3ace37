"""Transforms inside a block: the weights that share an input are scaled, and the division goes where it costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lowbit.formats import Format
from lowbit.interchange.source import Source
from lowbit.interchange.tensors import TensorPlan
from lowbit.recipes.recipe import Recipe
from lowbit.recipes.rewriting import arch_or_none, group_transforms
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
        self, names: Sequence[str], tensors: Mapping[str, Tensor], stats: Stats, first: TensorPlan, while_running: bool
    ) -> tuple[dict[str, Tensor], Tensor] | None:
        """New tensors and the scale of the input that `names` share; None where nothing can take the division.

        `tensors`: all of the block's, as the source stores them. `first`: the plan of the first of `names`, whose format and
        layout all have. `while_running`: the input can be divided while the model runs.
        """
        assert first.format is not None
        point = None if self.arch is None else self.arch.point_for(list(names))
        if point is None and not while_running:
            return None
        if point is not None and not all(name in tensors for name in (*point.producers, *point.consumers)):
            return None  # its producer lies in another block, and is written already
        shared = None if point is None else shared_channels(point)
        scaled, weights = dict(tensors), [first.as_rows(tensors[n]).float() for n in names]
        total: Tensor | None = None
        for call in group_transforms(self.recipe):
            found = call.method.function(weights, stats, self._rounded(first.format), shared, **dict(call.options))
            if self.arch is None or point is None:
                applied, new = found.scale, {}
                for name in names:
                    shape = [1] * scaled[name].dim()
                    shape[-2 if first.transposed else -1] = -1
                    new[name] = (scaled[name].double() * applied.double().view(shape)).to(scaled[name].dtype)
            else:
                involved = {n: scaled[n] for n in (*point.producers, *point.consumers)}
                new, applied = apply_scale(self.arch, point, involved, found.scale)
            scaled |= new
            stats = stats.scaled(applied)
            weights = [first.as_rows(scaled[n]).float() for n in names]
            total = applied if total is None else total * applied
        return (scaled, total) if total is not None else None

    @property
    def chooses(self) -> bool:
        """Whether a transform looks for the best of several scales, rather than taking the one that its options name."""
        options = [{**call.method.options, **dict(call.options)} for call in group_transforms(self.recipe)]
        return any(found.get("points") for found in options)

    def nearest(self, plan: TensorPlan, weight: Tensor) -> Tensor:
        """A weight rounded by the recipe's data-free solver, as the model has it; itself where it is kept."""
        if plan.format is None:
            return weight
        rows = plan.as_rows(weight)
        fmt = in_range(rows, plan.format)
        solver, fit = self.recipe.solver_for(fmt), self.recipe.fit_for(fmt)
        return plan.as_module(solver.solve(rows.float().contiguous(), fmt, fit, None).weight.dequantize())

    def _rounded(self, fmt: Format) -> Callable[[Tensor, Stats], Tensor]:
        solver, fit = self.recipe.solver_for(fmt), self.recipe.fit_for(fmt)
        return lambda weight, stats: solver(weight, in_range(weight, fmt), fit, stats).dequantize()
