"""lowbit compare"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli import console
from lowbit.cli.help import OUTPUT
from lowbit.cli.job import own_name
from lowbit.cli.options import (
    Calibration,
    DataFree,
    Effort,
    FewWindows,
    Json,
    Length,
    Markdown,
    Model,
    Samples,
    Speed,
    Text,
    rung_of,
)


def register(app: typer.Typer) -> None:
    app.command(
        rich_help_panel="Measure",
        short_help="Measure many recipes on one model, in one table.",
        epilog="Examples:\nlowbit compare smollm2\nlowbit compare smollm2 w8 w4 int4:g64 nf4 --windows 8 --plots figures",
    )(compare)


def compare(
    model: Model,
    recipes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE]...",
            help="The recipes; every preset that needs no text when they are left out.",
            show_default=False,
        ),
    ] = None,
    effort: Effort = "auto",
    data_free: DataFree = False,
    calibration: Calibration = None,
    samples: Samples = None,
    text: Text = None,
    windows: FewWindows = 8,
    length: Length = 1024,
    speed: Speed = False,
    plots: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Also draw two figures into this folder, which needs matplotlib.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keep finished rows in this file; the same command goes on from them. When it is left out, a run that is interrupted "
            "keeps them in MODEL.compare.json here, and one that ends well removes that file.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    markdown: Markdown = False,
    as_json: Json = False,
) -> None:
    """Measure many recipes on one model and print one table.

    When it is interrupted, the same command goes on from the recipes that were finished.
    """
    import lowbit
    from lowbit.calibration.data import SAMPLES
    from lowbit.errors import RecipeError
    from lowbit.recipes.recipe import Recipe
    from lowbit.report.tables import compare_json, markdown_compare, render_compare, row_line

    wanted = [Recipe.of(recipe) for recipe in recipes or []]  # a misspelt one is better known before any is measured
    if samples is not None and calibration is None and not any(r.needs_calibration for r in wanted):
        raise RecipeError("--samples would be ignored, as no calibration text is given; add --calibration")
    effort = rung_of(effort, data_free)
    console.quiet()
    file = keep or _default_file(model)
    with console.progress("comparing") as shown:
        rows = lowbit.compare(
            model, recipes or None, text=text, windows=windows, length=length, speed=speed, plots=plots,
            calibration=calibration, samples=samples or SAMPLES, effort=effort, keep=file, keep_after=keep is not None,
            on_step=shown.show, on_row=lambda row: shown.keep(row_line(row)),
        )  # fmt: skip
    if as_json:
        console.print_json(compare_json(rows))
    elif markdown:
        sys.stdout.write(markdown_compare(rows))
    else:
        screen = console.stdout()
        screen.print(render_compare(rows, width=screen.width))
        if plots is not None and (plots / "frontier.png").is_file():
            screen.print(f"figures are in {plots}", style="dim", markup=False)


def _default_file(model: str) -> Path | None:
    """Where finished rows are kept as long as the command runs; None where nothing can be written."""
    file = Path(f"{own_name(model)}.compare.json")
    if os.access(file.parent, os.W_OK):
        return file
    console.dim("the current folder cannot be written to, so finished rows are not kept; name a file with --keep")
    return None
