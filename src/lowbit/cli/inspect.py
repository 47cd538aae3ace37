"""lowbit inspect"""

from __future__ import annotations

from pathlib import Path
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
    from lowbit.interchange.files.settings import is_ours
    from lowbit.interchange.opening import open_source
    from lowbit.report.inspect import inspect_quantized, inspect_source, render_inspection

    console.quiet()
    if is_ours(model):
        found = inspect_quantized(Path(model))
    else:
        source = open_source(model)
        with console.bytes_bar("reading") as progress:
            found = inspect_source(source, progress)
    console.print_result(as_json, found.to_dict, lambda width: render_inspection(found, every=every, width=width))
