"""lowbit dequantize"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli import console
from lowbit.cli.options import Json, Model, Overwrite


def register(app: typer.Typer) -> None:
    app.command(
        rich_help_panel="Convert",
        short_help="Write a quantized model as an ordinary float folder.",
        epilog="Example:  lowbit dequantize smollm2-w4 -o smollm2-float --dtype bfloat16",
    )(dequantize)


def dequantize(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Write this folder.", show_default=False)],
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Write float32, bfloat16 or float16; what the model's config names when it is left out.",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a quantized model, of lowbit or another program, as an ordinary float folder, which transformers reads without lowbit."""
    import lowbit
    from lowbit.report.results_view import dequantized_text

    console.quiet()
    with console.bytes_bar("writing") as progress:
        made = lowbit.dequantize_model(model, out, dtype=dtype, progress=progress, overwrite=overwrite)
    if as_json:
        console.print_json({
            "folder": str(out), "dtype": str(made.dtype).removeprefix("torch."), "tensors": made.tensors, "bytes": made.bytes, "error": made.error,
            "notes": list(made.notes),
        })  # fmt: skip
        return
    console.stdout().print(dequantized_text(made), markup=False, highlight=False, soft_wrap=True)
