"""What is to be explained: an array, a tensor of a model by its name or the end of it, or a recipe on an array of its own."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import LowbitError, RecipeError, SourceError, WeightError, nearest
from lowbit.formats import Format, parse_format
from lowbit.interchange.inventory import Param, kept_words
from lowbit.recipes.presets import PRESETS
from lowbit.recipes.recipe import Recipe
from lowbit.report.at_work.trace import registered
from lowbit.report.wording import grouped
from lowbit.solvers import Call, Method
from lowbit.solvers.ranges.estimator import estimators
from lowbit.solvers.registry import methods

ARRAY = "[-0.3, 0, 0.1, 0.7]"
_NOT_FINITE = re.compile(r"(?<![a-z])(nan|inf|infinity)(?![a-z])", re.IGNORECASE)
_BARE = re.compile(r"[-+]?\.?\d[-+.,\d\seE]*")  # '-0.3,0.1', '0.3'
_TENSOR_ELEMENTS = 16  # of a block of a model's tensor; the block may be a million wide
_FORMATS = ("int4:g32", "uint4:g32:zero=fp16", "kmeans2:channel")  # the first that a method fills shows it
_LISTED = 12


@dataclass(frozen=True, eq=False)
class What:
    """A weight, the recipe and format for it, and which of its blocks are shown."""

    weight: Tensor
    recipe: Recipe
    format: Format
    label: str
    rows: int | None
    elements: int
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Names:
    """Tensors of a model of which one has to be chosen: those whose name ends so, or one of each kind."""

    model: str
    ending: str
    names: tuple[str, ...]

    @property
    def first(self) -> str:
        """What shows the first."""
        return f'lowbit explain "{self.model}:{self.names[0]}"'

    @property
    def said(self) -> str:
        """One sentence."""
        if not self.ending:
            return f"{self.model} has these kinds of tensors that can be quantized, of each of which this is the first"
        return f"{len(self.names)} tensors of {self.model} end in {self.ending}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"model": self.model, "ending": self.ending, "names": list(self.names), "first": self.first}

    def __str__(self) -> str:
        some = ", ".join(self.names[:3]) + (", ..." if len(self.names) > 3 else "")
        return f"{self.said}: {some}; name one of them, such as in {self.first}"


def parse_array(text: str) -> Tensor:
    """'[-0.3, 0, 0.1]' or '[[1, 2], [3, 4]]' as float32. WeightError when it is no array of numbers."""
    example = "write numbers in brackets, such as '[-0.3, 0, 0.1, 0.7]' or '[[1, 2], [3, 4]]'"
    try:
        value = ast.literal_eval(text.strip())
        array = torch.tensor(value, dtype=torch.float32)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError, RuntimeError, OverflowError):
        if _NOT_FINITE.search(text):
            raise WeightError(
                f"{text[:80]!r} has NaN or infinite values, which cannot be quantized: give finite numbers"
            ) from None
        raise WeightError(f"{text[:80]!r} is not an array of numbers of one shape: {example}") from None
    if array.dim() == 0 or array.dim() > 3 or array.numel() == 0:
        raise WeightError(f"{text[:80]!r} is not an array of one to three dimensions: {example}")
    return array


def chosen(
    what: Tensor | Sequence[Any] | str, recipe: str | Path | Format | Recipe | None, fmt: Format | None, *,
    label: str, rows: int | None, elements: int,
) -> What:  # fmt: skip
    """What the arguments of `explain` mean. SourceError where a name means several tensors or none."""
    if isinstance(what, str) and not is_array(what):
        refuse_bare_numbers(what)
        alone = recipe_alone(what) if recipe is None else None
        if alone is None:
            return _of_model(what, _wanted(recipe), fmt, rows)
        array = example_for(alone)
        said = (
            f"No array was given: {array} is shown."
            if len(array) < 60
            else "No array was given: one of its own is shown."
        )
        return What(parse_array(array), alone, fmt or alone.format, label, rows, elements, (said,))
    wanted = _wanted(recipe)
    weight = parse_array(what) if isinstance(what, str) else what
    if not isinstance(weight, Tensor):
        weight = parse_array(repr(list(weight)))
    return What(weight, wanted, fmt or wanted.format, label, rows, elements)


def is_array(text: str) -> bool:
    """Whether a text is meant as numbers in brackets."""
    return text.lstrip().startswith(("[", "("))


def refuse_bare_numbers(text: str) -> None:
    """WeightError for numbers that have no brackets."""
    if _BARE.fullmatch(text.strip()):
        written = ", ".join(re.split(r"[,\s]+", text.strip(", ")))
        raise WeightError(
            f'{text[:80]!r} are numbers without brackets; put them in brackets and quotes, such as "[{written[:80]}]"'
        )


def _wanted(recipe: str | Path | Format | Recipe | None) -> Recipe:
    """A recipe, or the name of a method in the recipe that shows it; w4 for None."""
    if isinstance(recipe, str) and recipe not in PRESETS and (shown := recipe_of_method(recipe)) is not None:
        return shown
    return Recipe.of("w4" if recipe is None else recipe)


def recipe_alone(text: str) -> Recipe | None:
    """The recipe or method of this name. None for what can only be MODEL:TENSOR; RecipeError for what is neither."""
    try:
        return _wanted(text)
    except LowbitError as error:
        head, colon, _ = text.partition(":")
        is_model = colon and os.path.exists(text.rpartition(":")[0])  # False for what no path can be
        if is_model or (colon and not ("@" in text or "," in text or _is_grid(head))):
            return None
        if colon or "@" in text or "+" in text or "," in text:
            raise
        known = [*PRESETS, *methods(), *estimators()]
        hint = nearest(text, known)
        raise RecipeError(
            f'{text!r} is no recipe, no method, no array such as "{ARRAY}" and no MODEL:TENSOR such as smollm2:q_proj{hint} '
            "(`lowbit recipes` lists recipes and methods)"
        ) from error


def _is_grid(text: str) -> bool:
    try:
        parse_format(text)
    except LowbitError:
        return False
    return True


def recipe_of_method(name: str) -> Recipe | None:
    """A recipe that shows a method or a range estimator which is no recipe by itself; None for any other name."""
    known = methods()
    if name in known:
        return Recipe.parse(_around(known[name]))
    if name in estimators():
        return Recipe.parse(f"absmax@int8:channel,a={name}@int8:tensor")
    return None


def _around(method: Method) -> str:
    """The simplest recipe that has a method in it."""
    if method.kind in ("fit", "solver"):
        fits = (f for f in _FORMATS if method.declines(parse_format(f)) is None)
        return f"{method.name}@{next(fits, _FORMATS[0])}"
    if method.kind == "tuner":
        return f"gptq+{method.name}@int4:g32"
    if method.kind == "weighting":
        return f"{method.name}+gptq@int4:g32"
    if method.name == "smooth":
        return PRESETS["smoothquant"].text
    return f"{method.name}+search@int4:g32"


def example_for(recipe: Recipe) -> str:
    """An array on which there is something to see of the recipe's methods."""
    fit = recipe.fit_for(recipe.format) if recipe.format.scale is not None else None
    with_stats = recipe.needs_calibration is not None
    calls: list[Call | None] = [*recipe.transforms, recipe.solver_for(recipe.format, with_stats), recipe.tuner, fit]
    found = [shown.example for call in calls if call is not None and (shown := registered(call)) is not None]
    if recipe.stores_inputs and not any(found):
        found = [shown.example for shown in [registered(Call("gptq"))] if shown is not None]
    return next((example for example in found if example), ARRAY)


def _of_model(text: str, recipe: Recipe, fmt: Format | None, rows: int | None) -> What:
    found = find(text)
    if isinstance(found, Names):
        raise SourceError(str(found))
    source, name = found
    param = source.inventory.params[name]
    weight = source.read(name)
    if not weight.is_floating_point():
        raise SourceError(f"{name} of {source.label} is {weight.dtype}, not a float tensor")
    kept = fmt or recipe.format_for(name, param.kind) or recipe.format
    weight = weight.transpose(-1, -2) if param.transposed else weight
    remarks = () if fmt is not None else _of_tensor(recipe, name, param)
    return What(weight, recipe, kept, name, 1 if rows is None else rows, _TENSOR_ELEMENTS, remarks)


def _of_tensor(recipe: Recipe, name: str, param: Param) -> tuple[str, ...]:
    """What a recipe does with this tensor, where it is not what its title says."""
    own = recipe.format_for(name, param.kind)
    if param.keep is not None or own is None:
        why = "" if param.keep is None else f" ({kept_words(name, param.keep)})"
        return (f"A recipe keeps this tensor in float{why}; it is shown because you asked.",)
    if own != recipe.format:
        others = "linear layers" if param.kind in ("embedding", "head") else "other layers"
        return (f"The recipe stores this tensor in {own}, and {others} in {recipe.format}.",)
    return ()


def find(text: str) -> Any:
    """(source, name) of MODEL:TENSOR, whose name may be given by its end; `Names` where several end so. SourceError for none."""
    from lowbit.interchange.opening import open_source

    model, colon, tensor = text.rpartition(":")
    if not colon or not model:
        raise SourceError(
            f'{text!r} is neither an array nor MODEL:TENSOR; write "[-0.3, 0, 0.1, 0.7]" or '
            "smollm2:model.layers.0.self_attn.q_proj"
        )
    source = open_source(model)
    name = next((n for n in (tensor, f"{tensor}.weight") if n in source.tensors), None)
    if name is not None:
        return source, name
    params = source.inventory.params
    if not tensor:
        free = [n for n in source.tensors if params[n].keep is None]
        free.sort(
            key=lambda n: params[n].kind in ("embedding", "head")
        )  # after the layers that a recipe's format is for
        kinds = grouped(free, lambda n: _last(n))
        return Names(model, "", tuple(same[0] for same in kinds) or tuple(source.tensors)[:_LISTED])
    ends = tuple(f".{end}" for end in (tensor, f"{tensor}.weight"))
    names = tuple(n for n in source.tensors if n.endswith(ends))
    if len(names) == 1:
        return source, names[0]
    if names:
        return Names(model, tensor, names)
    hint = nearest(tensor, source.tensors) or f"; names look like {next(iter(source.tensors))!r}"
    raise SourceError(f"{model} has no tensor {tensor!r}{hint} (`lowbit inspect {model}` lists them)")


def _last(name: str) -> str:
    """'q_proj' of 'model.layers.0.self_attn.q_proj.weight'."""
    return name.removesuffix(".weight").rpartition(".")[2]
