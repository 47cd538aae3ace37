"""lowbit chat"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from lowbit.cli import console
from lowbit.cli.options import (
    Activations,
    CacheType,
    MaxNewTokens,
    MinP,
    Model,
    RepetitionPenalty,
    Seed,
    Stop,
    Temperature,
    Threads,
    TopK,
    TopP,
)

_HELP = "/reset forgets what was said, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


def register(app: typer.Typer) -> None:
    app.command(epilog='Example:  lowbit chat smollm2-w4 --system "You answer in one sentence."')(chat)


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="What the model is told first.", show_default=False)] = None,
    max_new_tokens: MaxNewTokens = 1024,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
    activations: Activations = None,
    cache: CacheType = None,
    threads: Threads = None,
) -> None:
    """Talk to a model. Answers come word by word, and what was read once is not read again.

    /reset forgets what was said, /exit or Ctrl-D leaves, Ctrl-C stops an answer. Lines may come from a file or a pipe.
    """
    with console.stderr().status("loading"):
        generator = console.generator(model, activations=activations, cache=cache, threads=threads)
    sampling = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "seed": seed,
    }  # fmt: skip
    talk = generator.conversation(system, **sampling)
    if sys.stdin.isatty():
        console.dim(_HELP)
    while (line := _line()) is not None and line != "/exit":
        if line == "/reset":
            talk.reset()
        elif line.startswith("/"):
            console.dim(f"there is no {line.split()[0]}; {_HELP}")
        elif line:
            _answer(talk.ask, line, max_new_tokens, stop or [])


def _line() -> str | None:
    """What the user says, None at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _answer(ask: Callable[..., Any], line: str, limit: int, stop: list[str]) -> None:
    try:
        result = ask(line, _write, limit, stop)
        rate = f"{result.tokens_per_second:.0f} tokens/s, " if len(result.tokens) > 1 else ""
        said = f"{len(result.tokens)} tokens, {rate}first token {result.first_seconds:.2f} s"
    except KeyboardInterrupt:
        said = "stopped"
    _write("\n")
    console.dim(said)


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
