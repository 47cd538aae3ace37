"""lowbit generate"""

from __future__ import annotations

import sys
from typing import Annotated

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


def register(app: typer.Typer) -> None:
    app.command(epilog='Example:  lowbit generate smollm2-w4 "Why is the sky blue?" --max-new-tokens 60')(generate)


def generate(
    model: Model,
    prompt: Annotated[list[str], typer.Argument(help="What to answer or to continue.", show_default=False)],
    max_new_tokens: MaxNewTokens = 200,
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
    raw: Annotated[bool, typer.Option("--raw", help="Give the prompt as it is, without the chat template.")] = False,
) -> None:
    """Let a model answer, word by word. Takes quantized folders and float models alike.

    The Llama family runs in lowbit's own engine, any other model in transformers. Several prompts are answered side
    by side and printed one after another.
    """
    with console.stderr().status("loading"):
        generator = console.generator(model, activations=activations, cache=cache, threads=threads)
    alone = len(prompt) == 1
    results = generator.generate(
        prompt, max_new_tokens=max_new_tokens, stop=stop or (), raw=raw, stream=_write if alone else None,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, seed=seed,
    )  # fmt: skip
    sys.stdout.write("\n" if alone else "\n\n".join(r.text for r in results) + "\n")


def _write(piece: str, index: int) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
