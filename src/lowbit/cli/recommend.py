"""lowbit recommend"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from lowbit.cli import console
from lowbit.cli.guard import MISTAKE
from lowbit.cli.help import MEASURING
from lowbit.cli.options import Calibration, Json, Model, Samples, Text


def register(app: typer.Typer) -> None:
    app.command(
        rich_help_panel="Make",
        short_help="Say which recipe to take in a given memory, and why.",
        epilog="Examples:\nlowbit recommend smollm2 --memory 8GB\n"
        "lowbit recommend smollm2 --memory 8GB --context 2048 --for gguf",
    )(recommend)


def recommend(
    model: Model,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="Fit weights, KV cache and the program into this memory, such as 8GB; what this machine has free when it is left out.",
            show_default=False,
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            min=1,
            metavar="N",
            help="Make room for a KV cache of N tokens; 4096, or what the model takes where that is less, when it is left out.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            "--for", metavar="PROGRAM", help="Recommend for lowbit, gguf (llama.cpp and Ollama), vllm, gptq or awq."
        ),
    ] = "lowbit",
    cache: Annotated[
        str | None,
        typer.Option(
            "--cache",
            metavar="FORMAT",
            help="Count the KV cache in this format, such as int8, and recommend recipes that say so; 16 bits when it is left out.",
            show_default=False,
        ),
    ] = None,
    speed: Annotated[
        bool,
        typer.Option("--speed", help="Take the fastest of the recipes that lose little, not the one that loses least."),
    ] = False,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Quantize with the best three recipes, measure them, and decide by that.",
            rich_help_panel=MEASURING,
        ),
    ] = False,
    calibration: Calibration = None,
    samples: Samples = None,
    text: Text = None,
    windows: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="With --measure, use the first N windows of the text; 2 when it is left out.",
            show_default=False,
            rich_help_panel=MEASURING,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say which recipe to take for MODEL in this much memory, why, and what the second choice is. No weight is read.

    Exit code 2 when nothing fits.
    """
    from lowbit.budget.sizes import typed_size
    from lowbit.errors import RecipeError
    from lowbit.report import recommend as report
    from lowbit.report.recommendation import Recommendation

    if windows is not None and not measure:
        raise RecipeError("--windows would be ignored, as nothing is measured; add --measure, or leave it out")
    if memory is not None:
        typed_size("--memory", memory)
    console.quiet()

    def asked(**watching: Any) -> Recommendation:
        return report.recommend(
            model, memory, context, target, cache=cache, speed=speed, measure=measure, calibration=calibration, samples=samples, text=text,
            windows=windows or report.WINDOWS, **watching,
        )  # fmt: skip

    if measure:
        with console.count_bar("measuring", "windows") as progress:
            found = asked(progress=progress, told=console.dim)
    else:
        found = asked()
    if as_json:
        console.print_json(found.to_dict())
    else:
        sys.stdout.write(found.text(min(console.stdout().width, 100)) + "\n")
    if found.best is None:
        raise typer.Exit(MISTAKE)
