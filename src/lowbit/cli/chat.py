"""lowbit chat"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from lowbit.cli import console
from lowbit.cli.generation_options import Generation, show, with_generation
from lowbit.cli.options import MaxNewTokens, Model

_HELP = "/exit or Ctrl-D leaves, /reset forgets what was said, Ctrl-C stops an answer"


def register(app: typer.Typer) -> None:
    app.command(
        rich_help_panel="Run",
        short_help="Talk to a model.",
        epilog='Examples:\nlowbit chat smollm2-w4\nlowbit chat smollm2-w4 --system "You answer in one sentence."',
    )(chat)


@with_generation
def chat(
    model: Model,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Tell the model this first.", show_default=False)
    ] = None,
    max_new_tokens: MaxNewTokens = 1024,
    *,
    how: Generation,
) -> None:
    """Talk to a model. Answers come word by word, and what was read once is kept.

    /reset forgets what was said, /exit or Ctrl-D leaves, Ctrl-C stops an answer. Lines may come from a file or a pipe.
    """
    sampling, stop = how.sampling(), how.stops()
    generator = how.generator(model)
    names = how.adapter_names(generator)
    if len(names) > 1:
        from lowbit.errors import RecipeError

        raise RecipeError(
            f"a conversation has one adapter, and {' and '.join(names)} were given; leave out all but one"
        )
    talk = generator.conversation(system, **sampling)
    if sys.stdin.isatty():
        console.dim(_HELP)
    while (line := _line()) is not None and line != "/exit":
        if line == "/reset":
            talk.reset()
        elif line.startswith("/"):
            console.dim(f"there is no {line.split()[0]}; {_HELP}")
        elif line:
            _answer(talk.ask, line, max_new_tokens, stop)


def _line() -> str | None:
    """What the user says, None at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _answer(ask: Callable[..., Any], line: str, limit: int, stop: list[str]) -> None:
    from lowbit.errors import EngineError

    try:
        result = ask(line, show, limit, stop)
        rate = f"{result.tokens_per_second:.0f} tokens/s, " if len(result.tokens) > 1 else ""
        said = f"{len(result.tokens)} tokens, {rate}first token {result.first_seconds:.2f} s"
    except KeyboardInterrupt:
        said = "stopped"
    except EngineError as error:  # such as a conversation that has grown too long, which /reset mends
        if not sys.stdin.isatty():
            raise
        said = str(error)
    show("\n")
    console.dim(said)
