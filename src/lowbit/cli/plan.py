"""lowbit plan"""

from __future__ import annotations

from typing import Annotated

import typer

from lowbit.cli import console
from lowbit.cli.options import Bits, GroupSize, Json, Model, RecipeOrBits, recipe_of


def register(app: typer.Typer) -> None:
    app.command(
        rich_help_panel="Make",
        short_help="Say what a recipe would make of a model, before any work.",
        epilog="Examples:\nlowbit plan smollm2\nlowbit plan Qwen/Qwen3-0.6B w4 --context 32768",
    )(plan)


def plan(
    model: Model,
    recipe: RecipeOrBits = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    context: Annotated[int, typer.Option(min=1, metavar="N", help="Say how large the KV cache is at N tokens.")] = 4096,
    every: Annotated[
        bool, typer.Option("--all", help="List each tensor by itself instead of groups that are alike.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what every tensor would become, the exact size and the memory needed, before a weight is read."""
    import lowbit
    from lowbit.report.plan_view import render_plan

    typed = recipe_of(recipe, bits, group_size)
    console.quiet()
    made = lowbit.plan(model, typed, context=context)
    console.print_result(as_json, made.to_json, lambda width: render_plan(made, every=every, width=width))
