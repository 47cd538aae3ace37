"""lowbit export"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowbit.cli import console
from lowbit.cli.kept_card import described
from lowbit.cli.options import KV, As, Calibration, Chat, Json, Samples

if TYPE_CHECKING:
    from lowbit.convert.exporting import Exported

_NAMED = 2  # weights that are named


def register(app: typer.Typer) -> None:
    app.command(epilog="Example:  lowbit export smollm2-w4 --as gguf -o smollm2.gguf")(export)


def export(
    folder: Annotated[Path, typer.Argument(help="A folder that lowbit wrote.", show_default=False)],
    target: As,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="What to write; FOLDER with the target's ending when left out.", show_default=False
        ),
    ] = None,
    kv: KV = None,
    calibration: Calibration = None,
    samples: Samples = None,
    chat: Chat = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write a quantized folder in the format of another program, read it back and compare."""
    from lowbit.convert.exporting import export as write
    from lowbit.errors import RecipeError

    if kv is None and (calibration is not None or samples is not None or chat):
        raise RecipeError(
            "--calibration, --samples and --chat would be ignored: the weights are done, and only --kv looks at text in an export"
        )
    console.quiet()
    with console.bytes_bar("exporting") as progress:
        made = write(
            folder, target, out, kv=kv, calibration=calibration, samples=samples, chat=chat, overwrite=overwrite,
            progress=progress,
        )  # fmt: skip
    described(folder, made)
    if as_json:
        console.print_json(made.to_json())
    else:
        console.stdout().print(summary(made), markup=False)


def summary(made: Exported) -> str:
    """One line on what was written and how it compared, then what else people should know."""
    from lowbit.report.wording import bytes_text

    weights = "every weight equal"
    if made.unequal:
        named = " and ".join(made.unequal) if len(made.unequal) <= _NAMED else f"{len(made.unequal)} weights"
        weights += f" but {named}, within {made.weights:.1e}"
    logits = "" if made.logits is None else f", logits within {made.logits:.1e}"
    return "\n".join([f"{made.path}: {bytes_text(made.nbytes)}, read back: {weights}{logits}", *made.notes])
