"""lowbit plan"""

from __future__ import annotations

from typing import Annotated

import typer

from lowbit.cli import console
from lowbit.cli.options import Json, Model, Recipe


def register(app: typer.Typer) -> None:
    app.command(epilog="Example:  lowbit plan meta-llama/Llama-3.1-70B w4 --context 32768")(plan)


def plan(
    model: Model,
    recipe: Recipe = "w4",
    context: Annotated[int, typer.Option(min=1, help="Tokens of context that the KV cache is sized for.")] = 4096,
    every: Annotated[bool, typer.Option("--all", help="A row for each tensor instead of each group.")] = False,
    as_json: Json = False,
) -> None:
    """Say what every tensor would become, the exact size and the memory needed, before a weight is read."""
    import lowbit
    from lowbit.report.plan_view import render_plan

    console.quiet()
    made = lowbit.plan(model, recipe, context=context)
    console.print_result(as_json, made.to_json, lambda width: render_plan(made, every=every, width=width))
