"""lowbit bench"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli import console
from lowbit.cli.options import CacheType, Json, Threads


def register(app: typer.Typer) -> None:
    app.command(epilog="Example:  lowbit bench smollm2-w4 --beside smollm2 --gguf smollm2-q4_0.gguf")(bench)


def bench(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Quantized folders or float models.", show_default=False)
    ],
    beside: Annotated[
        list[str] | None,
        typer.Option(
            help="A model that transformers runs, in the same rounds; may be given again.", show_default=False
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="What transformers computes in: float32 or bfloat16.", show_default="float32")
    ] = None,
    gguf: Annotated[
        list[Path] | None,
        typer.Option(help="A file for llama.cpp, in the same rounds; may be given again.", show_default=False),
    ] = None,
    llama_bench: Annotated[
        str | None, typer.Option(help="llama.cpp's llama-bench.", show_default="the one on the PATH")
    ] = None,
    program: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=COMMAND", help="Another program, which answers line by line.", show_default=False),
    ] = None,
    activations: Annotated[
        list[str] | None,
        typer.Option(help="exact or int8, of the engine; give both for a row each.", show_default="exact"),
    ] = None,
    cache: CacheType = None,
    threads: Threads = None,
    rounds: Annotated[int, typer.Option(min=1, help="Medians are of so many, after one to warm up.")] = 5,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    as_json: Json = False,
) -> None:
    """Measure how fast a model answers here, compared with others and with what this machine can do at best.

    Every round measures each program once: decode, prefill, a batch of 20, and the first token of a fresh process.
    """
    import lowbit

    console.quiet()
    with console.count_bar("measuring", "runs") as progress:
        found = lowbit.bench(
            models, beside=beside or None, dtype=dtype, gguf=gguf or (), llama_bench=llama_bench,
            programs=named(program or []), activations=activations or None,
            cache=cache, threads=threads, rounds=rounds, progress=progress,
        )  # fmt: skip
    from lowbit.report.bench_view import render_bench

    if as_json:
        console.print_json(found.to_dict())
    elif markdown:
        sys.stdout.write(found.to_markdown())
    else:
        screen = console.stdout()
        screen.print(render_bench(found, width=screen.width))


def named(programs: list[str]) -> dict[str, str]:
    """By name. RecipeError for one without a name or a command."""
    from lowbit.errors import RecipeError

    found = dict[str, str]()
    for text in programs:
        name, equals, command = (part.strip() for part in text.partition("="))
        if not (name and equals and command):
            raise RecipeError(f"--program {text!r} has no name or no command; write NAME=COMMAND")
        found[name] = command
    return found
