"""lowbit generate"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lowbit.cli.generation_options import Generation, show, with_generation
from lowbit.cli.options import MaxNewTokens, Model


def register(app: typer.Typer) -> None:
    app.command(
        rich_help_panel="Run",
        short_help="Let a model answer.",
        epilog='Examples:\nlowbit generate smollm2-w4 "Why is the sky blue?" --max-new-tokens 60\n'
        'lowbit generate smollm2 "Write a haiku." --temperature 0.7 --max-new-tokens 60',
    )(generate)


@with_generation
def generate(
    model: Model,
    prompt: Annotated[
        list[str], typer.Argument(metavar="PROMPT...", help="What to answer or to continue.", show_default=False)
    ],
    max_new_tokens: MaxNewTokens = 200,
    raw: Annotated[bool, typer.Option("--raw", help="Give the prompt as it is, without the chat template.")] = False,
    *,
    how: Generation,
) -> None:
    """Let a model answer, word by word. Takes quantized folders and float models alike.

    Most families of decoders run in lowbit's own engine, any other model in transformers; a message says so. Several
    prompts are answered side by side and printed one after another.
    """
    sampling, stop = how.sampling(), how.stops()
    generator = how.generator(model)
    alone = len(prompt) == 1
    names = how.adapter_names(generator)
    for name in names or (None,):
        if len(names) > 1:
            show(f"{name}:\n")
        chosen = {} if name is None else {"adapter": name}
        results = generator.generate(
            prompt, max_new_tokens=max_new_tokens, stop=stop, raw=raw,
            stream=(lambda text, index: show(text)) if alone else None, **chosen, **sampling,
        )  # fmt: skip
        sys.stdout.write("\n" if alone else "\n\n".join(r.text for r in results) + "\n")
        if len(names) > 1 and name != names[-1]:
            sys.stdout.write("\n")
