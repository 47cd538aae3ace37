"""lowbit evaluate"""

from __future__ import annotations

from typing import Annotated

import typer

from lowbit.cli import console
from lowbit.cli.kept_card import keep_evaluated
from lowbit.cli.options import Json, Length, Model, Speed, Text, Windows


def register(app: typer.Typer) -> None:
    app.command(
        rich_help_panel="Measure",
        short_help="Measure one model, alone or against its float model.",
        epilog="Examples:\nlowbit evaluate smollm2-w4\nlowbit evaluate smollm2-w4 --against smollm2 --windows 8",
    )(evaluate)


def evaluate(
    model: Model,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Compare with this model, the float one that it was made from.", show_default=False
        ),
    ] = None,
    text: Text = None,
    windows: Windows = None,
    length: Length = 1024,
    speed: Speed = False,
    save: Annotated[
        bool,
        typer.Option(
            "--save/--no-save",
            help="Keep the figures in the folder as its card (README.md, card.json), which is done where --against is given.",
        ),
    ] = True,
    as_json: Json = False,
) -> None:
    """Measure a model: perplexity, and against its float model also KL divergence, agreement and speed.

    Models that take more than about a gigabyte together are read and run block by block, so that memory never holds either whole. When
    it is interrupted, the same command goes on from the windows and blocks that were finished.
    """
    import lowbit
    from lowbit.measure.kept import place_of

    console.quiet()
    with console.steps() as (say, progress):
        card = lowbit.evaluate(
            model, against, text, windows=windows, length=length, speed=speed, keep=place_of(model), progress=progress, told=say
        )  # fmt: skip
    from lowbit.measure.advice import advice
    from lowbit.report.panel import render_card

    console.print_result(as_json, card.to_json, lambda width: render_card(card, advice(card, against)))
    if save and against is not None:
        for line in keep_evaluated(card, model, against, text, windows, length, speed):
            console.dim(line)
