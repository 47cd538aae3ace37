"""The `lowbit` command."""

from __future__ import annotations

from typing import Annotated

import typer

from lowbit import __version__
from lowbit.cli import (
    bench,
    card,
    chat,
    check_kv,
    compare,
    console,
    dequantize,
    doctor,
    evaluate,
    explain,
    export,
    generate,
    importing,
    inspect,
    merge,
    plan,
    quantize,
    recipes,
    recommend,
)
from lowbit.cli.guard import Guarded, end_in_order
from lowbit.cli.help import App

app = App(
    cls=Guarded,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"lowbit {__version__}")
        raise typer.Exit


@app.callback()
def _lowbit(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make language models small and fast, and see what it cost.

    MODEL is a Hugging Face id, a folder with safetensors (float, or quantized by a program that lowbit reads), a .gguf file, or
    the demo [bold]smollm2[/bold].

    Start with:  [cyan]lowbit quantize smollm2[/cyan]
    """


for command in (
    quantize, merge, recommend, plan, evaluate, card, compare, check_kv, generate, chat, bench, importing, dequantize, export, inspect, explain,
    doctor, recipes,
):  # fmt: skip
    command.register(app)


def main() -> None:
    """The entry point."""
    console.prepare_streams()
    end_in_order()
    app(prog_name="lowbit")
