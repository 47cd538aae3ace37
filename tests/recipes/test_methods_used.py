"""Every registered method uses what it says that it uses, and a recipe that gives it anything else is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import lowbit
from lowbit.errors import RecipeError
from lowbit.formats import Format, parse_format
from lowbit.interchange.tensors import TensorPlan
from lowbit.planning.used import check_used, uses_text
from lowbit.recipes.recipe import Recipe  # which also announces transforms and tuners
from lowbit.solvers import Call, Method
from lowbit.solvers.registry import methods
from lowbit.solvers.stats import Stats, StatsBuilder
from lowbit.weights.solve import solve, solve_group
from tiny import tiny_model

FORMATS = ("int4:g16", "uint3:g16:zero=fp16", "uint4:g16:asym", "mxfp4", "kmeans4:channel", "kmeans4:g16:cb=tensor")
# A second value for each option, which must make a difference wherever the option makes any.
OTHER = {
    "p": 60.0, "steps": 5, "shrink": 0.8, "span": 0.9, "emphasis": 3.0, "iterations": 1, "beta": 2.0, "kappa": 1.5,
    "rounds": 0, "damp": 0.5, "order": 0, "polish": 0, "blend": 0.0, "ridge": 3.0, "alpha": 2.0,
}  # fmt: skip


def weight() -> Tensor:
    x = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    return x * x.abs()  # heavier tails than a normal distribution, so that clipping matters


def stats() -> Stats:
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(64, 64, generator=generator) * torch.logspace(-1, 1, 64)
    x, change = (torch.randn(400, 64, generator=generator) @ mix for _ in range(2))
    builder = StatsBuilder(64, drift=True)
    builder.add(x, x + 0.3 * change)
    return builder.stats()


def planned(fmt: Format, kind: str = "linear") -> TensorPlan:
    return TensorPlan("w", (24, 64), kind, torch.float32, False, fmt, None)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[part].view(torch.uint8), b[part].view(torch.uint8)) for part in a)


def result(recipe: Recipe, fmt: Format, with_stats: bool) -> dict[str, Tensor]:
    if with_stats:
        return solve_group([planned(fmt)], [weight()], recipe, stats())[0].stored
    return solve(planned(fmt), weight(), recipe).stored


def recipes_of(method: Method) -> list[Recipe]:
    """The method alone, with every format that it serves; a solver with a fit that looks at no statistics."""
    served = [fmt for text in FORMATS if method.declines(fmt := parse_format(text)) is None]
    call = Call(method.name)
    if method.kind == "fit":
        return [Recipe(fmt, fit=call) for fmt in served]
    fits = [next(f for f in ("absmax", "minmax") if Call(f).method.declines(fmt) is None) if fmt.scale else None
            for fmt in served]  # fmt: skip
    return [Recipe(fmt, fit=None if f is None else Call(f), solver=call) for fmt, f in zip(served, fits)]


def weight_methods() -> list[str]:
    return [name for name, m in methods().items() if m.kind in ("fit", "solver")]


@pytest.mark.parametrize("name", weight_methods())
def test_text_changes_the_result_or_is_refused(name: str) -> None:
    """The statement at the registration is compared with what the method does to a weight."""
    recipes = recipes_of(methods()[name])
    assert recipes
    for recipe in recipes:
        changes = not same(result(recipe, recipe.format, True), result(recipe, recipe.format, False))
        assert recipe.uses_calibration == changes == uses_text(recipe, [planned(recipe.format)]), str(recipe)


@pytest.mark.parametrize("name", weight_methods())
def test_every_option_makes_a_difference_or_is_refused(name: str) -> None:
    method, different = methods()[name], set()
    for recipe in recipes_of(method):
        for option in method.options:
            assert option in OTHER, f"{name} has an option {option!r}: give OTHER a second value for it"
            call = Call(name, ((option, OTHER[option]),))
            other = replace(recipe, fit=call) if method.kind == "fit" else replace(recipe, solver=call)
            for with_stats in {method.needs != "nothing", True}:
                plain, changed = (result(r, recipe.format, with_stats) for r in (recipe, other))
                if option in method.ignores(recipe.format, with_stats):
                    assert same(plain, changed), f"{other} said that it ignores {option}"
                    with pytest.raises(RecipeError, match=f"'{option}' of '{name}' makes no difference"):
                        check_used(other, [planned(recipe.format)], with_stats)
                elif not same(plain, changed):
                    check_used(other, [planned(recipe.format)], with_stats)
                    different.add(option)
    assert different == set(method.options)


def test_what_is_neither_fit_nor_solver_needs_text_or_leaves_it_to_them() -> None:
    for name, method in methods().items():
        if method.kind not in ("fit", "solver"):
            recipe = (
                Recipe.parse(f"{name}+absmax@int4:g32")
                if method.kind != "tuner"
                else Recipe.parse(f"absmax+{name}@int4:g32")
            )
            source_transform = method.kind == "transform" and recipe.needs_calibration is None
            assert recipe.uses_calibration != source_transform, name


def quantized(recipe: str, **options: Any) -> Any:
    return lowbit.quantize(tiny_model("llama"), recipe, **options)


@pytest.mark.parametrize(
    "recipe",
    ["hqq@uint4:g64:zero=fp16", "absmax@int4:g32", "minmax@uint4:g32:asym", "percentile@int4:g32", "symmetric@int8:channel",
     "mx@mxfp4", "absmax+rtn@int4:g32", "rotate+absmax@int4:g32", "absmax@int8:channel,a=int8:token", "w8", "nf4"],
)  # fmt: skip
def test_text_that_nobody_looks_at_is_refused(recipe: str) -> None:
    with pytest.raises(RecipeError, match="does not look at calibration text; leave calibration out"):
        quantized(recipe, calibration=[torch.arange(3, 40)])


def test_text_that_only_an_embedding_could_use_is_refused() -> None:
    """Embeddings are looked up and heads are not among the weights whose inputs are seen."""
    with pytest.raises(RecipeError, match="does not look at calibration text"):
        quantized("absmax@int8:channel,lm_head=uint4:g32:zero=fp16", calibration=[torch.arange(3, 40)])


@pytest.mark.parametrize("given", [{"samples": 4}, {"length": 64}, {"chat": True}, {"samples": 32, "length": 1024}])
def test_how_much_text_without_text_is_refused(given: dict[str, Any]) -> None:
    for recipe in ("absmax@int8:channel", "search@int4:g32"):
        with pytest.raises(RecipeError, match=f"{next(iter(given))}.* would be ignored"):
            quantized(recipe, **given)


def test_weighed_tokens_that_nobody_looks_at_are_refused() -> None:
    with pytest.raises(RecipeError, match="guided says how much tokens count in statistics of inputs, and nothing in"):
        lowbit.plan(tiny_model("llama"), "guided+absmax@int4:g32")
    assert lowbit.plan(tiny_model("llama"), "guided+search@int4:g32").coverage > 0.9


@pytest.mark.parametrize(
    "recipe",
    ["kmeans(rounds=3)@kmeans4:channel", "search(emphasis=2)+gptq@int4:g32,embed=keep",
     "gptq+reconstruct(scales=0.5)@mxfp4"],
)  # fmt: skip
def test_an_option_without_use_is_refused_before_the_work(recipe: str) -> None:
    with pytest.raises(RecipeError, match="makes no difference to any tensor"):
        lowbit.plan(tiny_model("llama"), recipe)


def test_an_option_that_some_tensor_uses_is_taken() -> None:
    for recipe in (
        "kmeans(rounds=3)@kmeans4:g32:cb=tensor", "search(emphasis=2)+gptq@int4:g32", "gptq+reconstruct(scales=0.5)@int4:g32"
    ):  # fmt: skip
        assert lowbit.plan(tiny_model("llama"), recipe).coverage > 0.9
    with pytest.raises(
        RecipeError, match="'emphasis' of 'search' makes no difference .* when there is calibration text"
    ):
        quantized("search(emphasis=2)@int4:g32,embed=keep", calibration=[torch.arange(3, 40)])
