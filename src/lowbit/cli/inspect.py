"""lowbit inspect"""

from __future__ import annotations

from typing import Annotated

import typer

from lowbit.cli import console
from lowbit.cli.options import Json, Model


def register(app: typer.Typer) -> None:
    app.command(
        rich_help_panel="Look",
        short_help="Show the tensors of a model: shapes, ranges, outliers, bits.",
        epilog="Examples:\nlowbit inspect smollm2\nlowbit inspect smollm2-w4 --all",
    )(inspect)


def inspect(
    model: Model,
    every: Annotated[
        bool, typer.Option("--all", help="List each tensor by itself instead of groups that are alike.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what is in a model: shapes, ranges, outliers and bytes; formats and bits of a quantized one."""
    import lowbit
    from lowbit.report.inspect import render_inspection

    console.quiet()
    with console.bytes_bar("reading") as progress:
        found = lowbit.inspect(model, progress=progress)
    console.print_result(as_json, found.to_dict, lambda width: render_inspection(found, every=every, width=width))
