"""lowbit recipes"""

from __future__ import annotations

from typing import Annotated

import typer

from lowbit.cli import console
from lowbit.cli.options import Json


def register(app: typer.Typer) -> None:
    app.command(
        rich_help_panel="Look",
        short_help="List presets, methods and formats, or look one up.",
        epilog="Examples:\nlowbit recipes\nlowbit recipes gptq\nlowbit recipes solver",
    )(recipes)


def recipes(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="Print everything about this name, about all names that contain it, or about all names of a kind: preset, method, "
            "fit, solver, transform, weighting, tuner, range or format.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the presets by what they are for, and the methods and formats that recipes are built from.

    With a name, print everything about it: what it stands for, also where there is calibration text, when to use it, its options,
    and where it comes from.
    """
    from lowbit.report.catalogue import catalogue, matching, to_json
    from lowbit.report.catalogue_view import render_catalogue, render_entries

    found, others = catalogue(), list[str]()
    if what is not None:
        found, others = matching(found, what)
    console.print_result(
        as_json,
        lambda: to_json(found),
        lambda width: render_catalogue(found, width) if what is None else render_entries(found, others, width),
    )
