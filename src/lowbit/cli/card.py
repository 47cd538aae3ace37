"""lowbit card"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli import console
from lowbit.cli.options import Json


def register(app: typer.Typer) -> None:
    app.command(
        rich_help_panel="Measure",
        short_help="Print the card that a folder carries, without measuring.",
        epilog="Examples:\nlowbit card smollm2-w4\nlowbit card smollm2-w4 --markdown",
    )(card)


def card(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="A folder that lowbit wrote, or an export that is a folder.", show_default=False
        ),
    ],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the folder's README.md only.")] = False,
    rewrite: Annotated[
        bool, typer.Option("--rewrite", help="Write README.md anew from the card, also where it was changed by hand.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print the card that a folder carries: what quantizing cost when it was measured. Nothing is measured now."""
    from lowbit.errors import RecipeError
    from lowbit.interchange.model_card import README, facts_of_folder, text_of
    from lowbit.measure.advice import advice
    from lowbit.report import card as cards
    from lowbit.report.panel import render_card

    if markdown and as_json:
        raise RecipeError("--markdown and --json are two forms of the card; give one of them")
    saved = cards.read(folder)
    late = cards.outdated(saved, folder)
    if rewrite:
        made = cards.Made(facts_of_folder(folder), saved.target, saved.base, saved.command)
        cards.keep_readme(saved.card, folder, made, rewrite=True)
    if late is not None:
        console.stderr().print(late, style="yellow", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        console.print_json(saved.to_json())
    elif markdown:
        typer.echo(text_of(folder / README) or cards.text(saved, folder), nl=False)
    else:
        console.stdout().print(render_card(saved.card, advice(saved.card, saved.base, saved.target)))
