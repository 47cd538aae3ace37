"""lowbit explain"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lowbit.cli import console
from lowbit.cli.help import Command
from lowbit.cli.options import Json

USAGE = """Show each step of the arithmetic of a recipe.
Name what to quantize, a recipe, or both; without a recipe w4 is shown.

A recipe or a method, on an array of its own:
  lowbit explain nf4
Your own numbers (brackets in brackets are rows):
  lowbit explain "[-0.3, 0, 0.1, 0.7]" zeropoint
Your own numbers, and inputs of the layer for methods that look at inputs:
  lowbit explain "[0.6, -0.3]" gptq --inputs "[[1, 2], [1, 0]]"
A tensor of a model, by its name or by the end of it:
  lowbit explain smollm2:model.layers.0.self_attn.q_proj w4
The tensors of a model whose names end so, or one of each kind:
  lowbit explain smollm2:q_proj
  lowbit explain smollm2:

`lowbit recipes` lists recipes and methods."""


class Explain(Command):
    """Numbers without brackets, which may begin with a minus, are no options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As of click. WeightError for such numbers."""
        for before, word in zip(["", *args], args, strict=False):
            if before not in ("--rows", "--inputs") and word.lstrip("-+.")[:1].isdigit() and not word.startswith("--"):
                from lowbit.report.explain_what import refuse_bare_numbers

                refuse_bare_numbers(word)
        return super().parse_args(ctx, args)


def register(app: typer.Typer) -> None:
    app.command(
        cls=Explain,
        rich_help_panel="Look",
        short_help="Show each step of the arithmetic on a few numbers.",
        epilog='Examples:\nlowbit explain "[-0.3, 0, 0.1, 0.7]" absmax\nlowbit explain gptq\n'
        "lowbit explain smollm2:model.layers.0.self_attn.q_proj int4:g32",
    )(explain)


def explain(
    what: Annotated[
        str | None,
        typer.Argument(
            help='An array such as "[-0.3, 0, 0.1, 0.7]", MODEL:TENSOR, or a recipe or method alone.',
            show_default=False,
            metavar="[WHAT]",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE]",
            help="A preset, a method, a format such as int4:g32, or METHOD@FORMAT; w4 unless given.",
            show_default=False,
        ),
    ] = None,
    inputs: Annotated[
        str | None,
        typer.Option(
            metavar="ARRAY",
            help='Inputs of the layer for methods that look at them: "[[...], [...]]", each with one number for every '
            "column. A few made-up ones unless given.",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Show the first block (the weights that share a scale) of N rows: one row of a model's tensor, and all blocks of "
            "an array, when it is left out.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show each step of the arithmetic: range, scale, zero-point, codes, values, error, and how a method does better."""
    if what is None:
        console.stdout().print(USAGE, markup=False, soft_wrap=True)
        return
    from lowbit.report.explain import explain as run
    from lowbit.report.explain_view import render_explanation, render_names
    from lowbit.report.explain_what import Names, find, is_array, recipe_alone

    array = is_array(what)
    if not array and (recipe is not None or recipe_alone(what) is None):
        console.quiet()
        found = find(what)
        if isinstance(found, Names):
            console.print_result(as_json, found.to_dict, lambda width: render_names(found))
            return
    shown = run(what, recipe, inputs=inputs, rows=rows)
    console.print_result(as_json, shown.to_dict, lambda width: render_explanation(shown, width))
