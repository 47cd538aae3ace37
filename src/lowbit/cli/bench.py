"""lowbit bench"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli import console
from lowbit.cli.help import ENGINE, MEASURING, PROGRAMS
from lowbit.cli.options import CacheType, Json, Markdown, Threads


def register(app: typer.Typer) -> None:
    app.command(
        rich_help_panel="Measure",
        short_help="Measure how fast models answer here, side by side.",
        epilog="Examples:\nlowbit bench smollm2-w4\nlowbit bench smollm2-w4 --beside smollm2 --rounds 3\n"
        "lowbit bench smollm2-w4 --gguf smollm2-q4_0.gguf",
    )(bench)


def bench(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Quantized folders or float models.", show_default=False)
    ],
    beside: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="Also measure this model as transformers runs it. May be given again.",
            show_default=False,
            rich_help_panel=PROGRAMS,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Let transformers compute in float32 or in bfloat16.",
            show_default="float32",
            rich_help_panel=PROGRAMS,
        ),
    ] = None,
    gguf: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Also measure llama.cpp on this file. May be given again.",
            show_default=False,
            rich_help_panel=PROGRAMS,
        ),
    ] = None,
    llama_bench: Annotated[
        str | None,
        typer.Option(
            metavar="PROGRAM",
            help="Run this llama-bench of llama.cpp.",
            show_default="the one on the PATH",
            rich_help_panel=PROGRAMS,
        ),
    ] = None,
    program: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=COMMAND",
            help="Also measure this program, which takes requests and answers line by line.",
            show_default=False,
            rich_help_panel=PROGRAMS,
        ),
    ] = None,
    activations: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TYPE",
            help="Compute with activations of 15 bits (exact) or of 8 (int8) in the engine. Given twice, both are measured.",
            show_default="exact",
            rich_help_panel=ENGINE,
        ),
    ] = None,
    cache: CacheType = None,
    threads: Threads = None,
    rounds: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Measure N rounds after one to warm up; figures are medians of them.",
            rich_help_panel=MEASURING,
        ),
    ] = 5,
    markdown: Markdown = False,
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
