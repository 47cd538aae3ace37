"""lowbit explain"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lowbit.cli import console
from lowbit.cli.options import Json, Recipe

if TYPE_CHECKING:
    from lowbit.report.explain import Explanation

_TENSOR_ELEMENTS = 16  # of a block of a model's tensor; the block may be a million wide


def register(app: typer.Typer) -> None:
    app.command(
        rich_help_panel="Look",
        short_help="Show each step of the arithmetic on a few numbers.",
        epilog='Examples:\nlowbit explain "[-0.3, 0, 0.1, 0.7]" absmax\n'
        "lowbit explain smollm2:model.layers.0.self_attn.q_proj int4:g32",
    )(explain)


def explain(
    what: Annotated[
        str,
        typer.Argument(
            help='An array such as "[-0.3, 0, 0.1, 0.7]", or MODEL:TENSOR.', show_default=False, metavar="WHAT"
        ),
    ],
    recipe: Recipe = "w4",
    rows: Annotated[
        int, typer.Option(min=1, metavar="N", help="Show the first block of each of N rows of a model's tensor.")
    ] = 1,
    as_json: Json = False,
) -> None:
    """Show each step of the arithmetic: range, scale, zero-point, codes, values, error."""
    found = _explained(what, recipe, rows)
    from lowbit.report.explain_view import render_explanation

    console.print_result(as_json, found.to_dict, lambda width: render_explanation(found))


def _explained(what: str, recipe: str, rows: int) -> Explanation:
    from lowbit.recipes.recipe import Recipe
    from lowbit.report.explain import explain as run
    from lowbit.report.explain import parse_array

    wanted = Recipe.of(recipe)
    if what.lstrip().startswith(("[", "(")):
        return run(parse_array(what), wanted)
    from lowbit.errors import SourceError, nearest
    from lowbit.interchange.opening import open_source

    model, colon, tensor = what.rpartition(":")
    if not colon or not model:
        raise SourceError(
            f'{what!r} is neither an array nor MODEL:TENSOR; write "[-0.3, 0, 0.1, 0.7]" or '
            "smollm2:model.layers.0.self_attn.q_proj"
        )
    console.quiet()
    source = open_source(model)
    name = next((n for n in (tensor, f"{tensor}.weight") if n in source.tensors), None)
    if name is None:
        hint = nearest(tensor, source.tensors) or f"; names look like {next(iter(source.tensors))!r}"
        raise SourceError(f"{model} has no tensor {tensor!r}{hint} (`lowbit inspect {model}` lists them)")
    param = source.inventory.params[name]
    weight = source.read(name)
    if not weight.is_floating_point():
        raise SourceError(f"{name} of {model} is {weight.dtype}, not a float tensor")
    fmt = wanted.format_for(name, param.kind) or wanted.format
    weight = weight.transpose(-1, -2) if param.transposed else weight
    return run(weight, wanted, fmt, label=name, rows=rows, elements=_TENSOR_ELEMENTS)
