"""lowbit doctor"""

from __future__ import annotations

from typing import Annotated

import typer

from lowbit.cli import console
from lowbit.cli.options import Json


def register(app: typer.Typer) -> None:
    app.command(
        rich_help_panel="Look",
        short_help="Show what this machine offers, and how fast its kernels are.",
        epilog="Examples:\nlowbit doctor\nlowbit doctor --json > machine.json",
    )(doctor)


def doctor(
    kernels: Annotated[
        bool,
        typer.Option(
            "--kernels/--no-kernels", help="Time the kernels, which takes some seconds and is done by default."
        ),
    ] = True,
    every: Annotated[
        bool, typer.Option("--all", help="List also the kernels that are slower than the one that is used.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what this machine offers: versions, memory and disk, whether the engine runs, and which kernels there are and how fast."""
    from lowbit.report.doctor import examine
    from lowbit.report.doctor_view import render_report

    with console.stderr().status("timing kernels"):
        report = examine(kernels)
    console.print_result(as_json, report.to_dict, lambda width: render_report(report, every=every, width=width))
