"""Results that are a few lines: what was allocated, exported or written as float, a recipe and a format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowbit.budget.allocation import Allocation, formats_of
from lowbit.convert.dequantizing import Dequantized
from lowbit.convert.exporting import Exported
from lowbit.formats import Format
from lowbit.recipes.cache_rules import cache_settings
from lowbit.recipes.recipe import Recipe, format_text
from lowbit.report.catalogue_view import render_catalogue, render_entries
from lowbit.report.layout import Lines, named_lines, wrapped
from lowbit.report.plan_view import render_plan
from lowbit.report.wording import bytes_text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lowbit.report.look import Catalogue

_NAMED = 2  # weights that are named
_LAYERS = 20  # of a recipe with a format for each layer, those that are shown
_SIDE = 4096  # of the matrix whose bits per weight are given


def exported_text(made: Exported) -> str:
    """One line on what was written and how it compared, then what else people should know."""
    weights = "every weight equal"
    if made.unequal:
        named = " and ".join(made.unequal) if len(made.unequal) <= _NAMED else f"{len(made.unequal)} weights"
        weights += f" but {named}, within {made.weights:.1e}"
    logits = "" if made.logits is None else f", logits within {made.logits:.1e}"
    return "\n".join([f"{made.path}: {bytes_text(made.nbytes)}, read back: {weights}{logits}", *made.notes])


def dequantized_text(made: Dequantized) -> str:
    """One line on what was written and what rounding it cost, then what is not in it."""
    name = str(made.dtype).removeprefix("torch.")
    loss = "no value was rounded" if made.error == 0.0 else f"rounding cost a relative error of {made.error:.2g}"
    first = f"{made.folder}: {made.tensors} tensors, {bytes_text(made.bytes)} of {name}; {loss}"
    return "\n".join([first, *made.notes])


def render_exported(made: Exported, *, width: int = 1000) -> RenderableType:
    return Lines(wrapped(exported_text(made), width))


def render_dequantized(made: Dequantized, *, width: int = 1000) -> RenderableType:
    return Lines(wrapped(dequantized_text(made), width))


def render_allocation(found: Allocation, *, width: int = 1000) -> RenderableType:
    """What is expected of it, which formats weights have, what was found sensitive, and the plan."""
    from rich.console import Group

    formats = formats_of(found.rows)
    total = max(1, sum(formats.values()))
    lines = [("predicted KL", f"{found.predicted_kl:.4f} nats per token, summed over the measured tensors")]
    lines.append(("bits per weight", f"{found.bits:.3f} over the tensors that were allocated"))
    lines += [("formats" if i == 0 else "", f"{n / total:.1%} {fmt}") for i, (fmt, n) in enumerate(formats.items())]
    lines += [("sensitivity" if i == 0 else "", text) for i, text in enumerate(found.found_sensitive())]
    return Group(render_plan(found.plan, width=width), named_lines(lines))


def render_recipe(recipe: Recipe, *, width: int = 1000) -> RenderableType:
    """The parts of a recipe by what they are for."""
    from rich.console import Group

    calls = {
        "transforms": " + ".join(map(str, recipe.transforms)), "token weights": recipe.weighting, "scale": recipe.fit,
        "rounding": recipe.solver, "tuning": recipe.tuner,
    }  # fmt: skip
    lines = [("weights", str(recipe.format)), ("embeddings, head", format_text(recipe.embed))]
    lines += [(what, str(call)) for what, call in calls.items() if call]
    lines += [("inputs", str(rule)) for rule in recipe.rules[:1] if rule.inputs is not None]
    lines += [(f"layers {pattern}", format_text(fmt)) for pattern, fmt in recipe.layers[:_LAYERS]]
    if len(recipe.layers) > _LAYERS:
        lines.append(("", f"and {len(recipe.layers) - _LAYERS} more; str() of the recipe has all"))
    lines += [(f"inputs of {pattern}", str(rule)) for pattern, rule in recipe.layer_inputs[:_LAYERS]]
    lines += [("KV cache", setting) for setting in cache_settings(recipe.cache)]
    head = recipe.title if len(recipe.title) <= 4 * width else f"{recipe.called or recipe.format} with single layers"
    return Group(Lines(wrapped(head, width)), named_lines(lines))


def render_format(fmt: Format, *, width: int = 1000) -> RenderableType:
    """The parts of a format."""
    from rich.console import Group

    lines = [("levels", f"{fmt.grid.cardinality} of {fmt.grid}"), ("block", str(fmt.block))]
    lines.append(("scale", "none, the levels are real values" if fmt.scale is None else str(fmt.scale)))
    if fmt.offset is not None:
        lines.append((fmt.offset.kind, str(fmt.offset.store)))
    bits = fmt.bits_per_weight((_SIDE, _SIDE))
    lines.append(("bits per weight", f"{bits:.3f} of a matrix of {_SIDE} x {_SIDE}, scales and all"))
    return Group(Lines(wrapped(str(fmt), width)), named_lines(lines))


def render_names(found: Catalogue, *, width: int = 1000) -> RenderableType:
    """All names, or everything about those that were looked up."""
    if found.asked is None:
        return render_catalogue(found, width)
    return render_entries(found, found.others, width)
