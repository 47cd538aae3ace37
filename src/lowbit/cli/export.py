"""lowbit export"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowbit.cli import console
from lowbit.cli.kept_card import described
from lowbit.cli.options import KV, As, Chat, Json, KVCalibration, Overwrite, Samples

if TYPE_CHECKING:
    from lowbit.convert.exporting import Exported


def register(app: typer.Typer) -> None:
    app.command(
        rich_help_panel="Convert",
        short_help="Write a folder of lowbit for another program.",
        epilog="Examples:\nlowbit export smollm2-w4 --as gguf -o smollm2.gguf\nlowbit export smollm2-w4 --as vllm",
    )(export)


def export(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that lowbit wrote.", show_default=False)],
    target: As,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="PATH",
            help="Write here; FOLDER with an ending for the program when it is left out.",
            show_default=False,
        ),
    ] = None,
    kv: KV = None,
    calibration: KVCalibration = None,
    samples: Samples = None,
    chat: Chat = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a quantized folder in the format of another program, read it back and compare."""
    from lowbit.convert.exporting import export as write
    from lowbit.errors import RecipeError

    if kv is None and (calibration is not None or samples is not None or chat):
        raise RecipeError(
            "--calibration, --samples and --chat would be ignored: the weights are quantized already, and only --kv looks at text in an export"
        )
    console.quiet()
    with console.share_bar("exporting") as progress:
        made = write(
            folder, target, out, kv=kv, calibration=calibration, samples=samples, chat=chat, overwrite=overwrite,
            progress=progress,
        )  # fmt: skip
    described(folder, made)
    if as_json:
        console.print_json(made.to_json())
    else:
        console.say(console.stdout(), summary(made))


def summary(made: Exported) -> str:
    """One line on what was written and how it compared, then what else people should know."""
    from lowbit.report.results_view import exported_text

    return exported_text(made)
