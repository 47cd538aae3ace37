"""lowbit evaluate"""

from __future__ import annotations

from typing import Annotated

import typer

from lowbit.cli import console
from lowbit.cli.help import MEASURING
from lowbit.cli.kept_card import keep_evaluated
from lowbit.cli.options import Json, Model, Speed, Text, Windows


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
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Put this LoRA adapter into the weights of the model after --against first: what a merged model is to be.",
            show_default=False,
        ),
    ] = None,
    text: Text = None,
    windows: Windows = None,
    length: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="N",
            help="Put N tokens into a window; 1024 when it is left out, and 128 for models that make embeddings, scores or labels of texts.",
            show_default=False,
            rich_help_panel=MEASURING,
        ),
    ] = None,
    inputs: Annotated[
        str | None,
        typer.Option(
            "--inputs",
            metavar="PATH",
            help="For a model that reads images or sounds, compare on these: a folder or a file of images (.png, .jpg), of sounds (.wav), or of "
            "arrays by the names of the model's arguments (.npz). When it is left out, lowbit makes a few itself.",
            show_default=False,
            rich_help_panel=MEASURING,
        ),
    ] = None,
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

    Of a model that predicts no tokens it measures, against its float model, what it gives instead: embeddings, scores, labels or transcripts; of
    64 texts, 16 images or 8 sounds where nothing else is said.

    Models that take more than about a gigabyte together are read and run block by block, so that memory never holds either whole. When
    it is interrupted, the same command goes on from the windows and blocks that were finished.
    """
    import lowbit
    from lowbit.errors import RecipeError
    from lowbit.measure.kept import place_of

    if adapter is not None and against is None:
        raise RecipeError("--adapter belongs to the model after --against and would be ignored; add --against MODEL")
    console.quiet()
    held = against if against is None or adapter is None else lowbit.with_adapter(against, adapter)
    with console.steps() as (say, progress):
        card = lowbit.evaluate(
            model,
            held,
            text,
            windows=windows,
            length=length,
            speed=speed,
            inputs=inputs,
            keep=place_of(model),
            progress=progress,
            told=say,
        )
    from lowbit.measure.advice import advice
    from lowbit.report.panel import render_card

    console.print_result(as_json, card.to_json, lambda width: render_card(card, advice(card, against)))
    if save and against is not None:
        for line in keep_evaluated(card, model, against, text, windows, length, speed, inputs, adapter):
            console.dim(line)
