"""The options of commands that generate text, declared once, and what each becomes a call of."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from lowbit.cli import console
from lowbit.cli.help import ENGINE, SAMPLING
from lowbit.cli.options import CacheType, Threads

_ENGINE = ("activations", "cache", "threads")
_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


@dataclass(frozen=True)
class Generation:
    """How answers are made: each field is an option of the command line, by the same name."""

    temperature: Annotated[
        float,
        typer.Option(
            min=0.0,
            metavar="T",
            help="Sample from the probabilities at this temperature; 0 always takes the likeliest token.",
            rich_help_panel=SAMPLING,
        ),
    ] = 0.0
    top_k: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Draw from the N likeliest tokens only; 0 allows all.", rich_help_panel=SAMPLING
        ),
    ] = 0
    top_p: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            metavar="P",
            help="Draw from the likeliest tokens that together have this probability.",
            rich_help_panel=SAMPLING,
        ),
    ] = 1.0
    min_p: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            metavar="P",
            help="Leave out tokens that are less likely than P times the likeliest one.",
            rich_help_panel=SAMPLING,
        ),
    ] = 0.0
    repetition_penalty: Annotated[
        float,
        typer.Option(
            min=0.0,
            metavar="X",
            help="Above 1, make tokens less likely that were there before.",
            rich_help_panel=SAMPLING,
        ),
    ] = 1.0
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Draw with this seed; the same seed gives the same answer.",
            rich_help_panel=SAMPLING,
        ),
    ] = 0
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help=r"End the answer before this text, in which \n is a new line, \t a tab and \\ a backslash. May be given again.",
            show_default=False,
        ),
    ] = None
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER",
            help="Put this LoRA adapter beside the weights: a folder that peft wrote, or NAME=FOLDER. Given again, each adapter answers in turn.",
            show_default=False,
        ),
    ] = None
    activations: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Compute with activations of 15 bits (exact) or of 8 (int8), which is faster and less precise. What a recipe says "
            "of inputs holds in either case.",
            show_default="exact",
            rich_help_panel=ENGINE,
        ),
    ] = None
    cache: CacheType = None
    threads: Threads = None

    def generator(self, model: str) -> Any:
        """What generates text with `model`; one dim line on stderr says what it is, and why where it is not the engine."""
        from lowbit.engine.generator import open_generator

        adapters = None
        if self.adapter:
            from lowbit.adapters.named import named_adapters

            console.quiet()
            adapters = named_adapters(self.adapter, model)
        with console.stderr().status("loading"):
            options = {name: getattr(self, name) for name in _ENGINE}
            found = open_generator(model, options, before_transformers=console.quiet, spelled="--{}", adapters=adapters)
        console.dim(f"{found}{_too_many(self.threads or 0)}")
        return found

    def adapter_names(self, generator: Any) -> tuple[str, ...]:
        """The names of the adapters that were given, in their order."""
        return tuple(generator.adapters) if self.adapter else ()

    def sampling(self) -> dict[str, Any]:
        """Fields of `Sampling`. RecipeError for what they cannot be, before a model is loaded."""
        from lowbit.engine.arguments import sampling_of

        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in (*_ENGINE, "stop", "adapter")}
        sampling_of(found)
        return found

    def stops(self) -> list[str]:
        """The strings that end an answer, as a shell cannot easily write them. RecipeError for empty ones."""
        from lowbit.engine.arguments import stop_strings

        return stop_strings([re.sub(r"\\([nt\\])", lambda m: _ESCAPES[m[1]], text) for text in self.stop or ()])


def with_generation(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the fields of `Generation` as options, in place of its parameter `how`."""

    @wraps(command)
    def called(**given: Any) -> None:
        how = Generation(**{f.name: given.pop(f.name) for f in fields(Generation)})
        command(**given, how=how)

    hints = get_type_hints(command, include_extras=True) | get_type_hints(Generation, include_extras=True)
    taken = list[inspect.Parameter]()
    for name, parameter in inspect.signature(command).parameters.items():
        if name == "how":
            taken += [_option(f.name, f.default, hints[f.name]) for f in fields(Generation)]
        else:
            taken.append(_option(name, parameter.default, hints[name]))
    called.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
    called.__annotations__ = {p.name: p.annotation for p in taken}
    return called


def _option(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _too_many(threads: int) -> str:
    """What is to be said of more threads than cores: they wait for each other."""
    from lowbit.kernels.core import core

    module = core() if threads else None
    cores = 0 if module is None else module.features()["cores"]
    return f"; this machine has {cores} cores, so many threads are slower" if threads > cores > 0 else ""


def show(text: str) -> None:
    """New text of an answer, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
