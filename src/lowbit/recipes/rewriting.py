"""The transforms of a recipe: those that rewrite a source before the plan, and what those inside a block need to know."""

from __future__ import annotations

from collections.abc import Callable

from lowbit.errors import RecipeError, TransformError
from lowbit.interchange.source import Source
from lowbit.recipes.recipe import Recipe
from lowbit.solvers import Call
from lowbit.transforms import FACTS, Arch, arch_of


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
