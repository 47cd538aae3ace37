"""Whether everything that a recipe says, and text given with it, is looked at for some tensor of a model."""

from __future__ import annotations

from collections.abc import Sequence

from lowbit.errors import RecipeError
from lowbit.interchange.tensors import TensorPlan
from lowbit.recipes.recipe import Recipe
from lowbit.solvers import Call


def uses_text(recipe: Recipe, tensors: Sequence[TensorPlan]) -> bool:
    """Whether calibration text changes what becomes of any of these tensors."""
    return recipe.needs_calibration is not None or _weighs(recipe, tensors)


def check_used(recipe: Recipe, tensors: Sequence[TensorPlan], with_text: bool) -> None:
    """RecipeError for a weighting whose statistics nobody looks at, and for an option that makes no difference to any tensor.

    `with_text`: whether weights that are multiplied have statistics of their inputs.
    """
    if recipe.weighting is not None and not _weighs(recipe, tensors):
        raise RecipeError(
            f"{recipe.weighting} says how much tokens count in statistics of inputs, and nothing in {recipe} looks at these; "
            "leave it out, or add a method that does, such as gptq"
        )
    quantized = [(t, with_text and t.is_multiplied) for t in tensors if t.format is not None]
    for call in filter(None, (recipe.fit, recipe.solver, recipe.tuner)):
        served = [(t, stats) for t, stats in quantized if _serves(recipe, call, t, stats)]
        for option, _ in call.options if served else ():
            if all(option in call.method.ignores(t.format, stats) for t, stats in served if t.format is not None):
                where = " when there is calibration text" if with_text and call.method.kind == "fit" else ""
                raise RecipeError(
                    f"{option!r} of {call.name!r} makes no difference to any tensor of this recipe{where}; leave it out"
                )


def _weighs(recipe: Recipe, tensors: Sequence[TensorPlan]) -> bool:
    return any(t.is_multiplied and t.format is not None and recipe.weighs(t.format) for t in tensors)


def _serves(recipe: Recipe, call: Call, t: TensorPlan, with_stats: bool) -> bool:
    """Whether this part of the recipe works on this tensor."""
    assert t.format is not None
    if call.method.kind == "fit":
        return t.format.scale is not None and recipe.fit_for(t.format) == call
    if call.method.kind == "solver":
        return recipe.solver_for(t.format, with_stats) == call
    return t.is_multiplied
