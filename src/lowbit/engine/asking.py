"""`generate` and `chat` as one call: a model by name, and what opens it chosen here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lowbit.engine.arguments import sampling_of, stop_strings
from lowbit.engine.conversation import Conversation
from lowbit.engine.engine import Engine
from lowbit.engine.fallback import Transformers
from lowbit.engine.generation import OnText
from lowbit.engine.generator import open_generator
from lowbit.errors import EngineError, SourceError

if TYPE_CHECKING:
    from lowbit.adapters.named import Given


def generate(
    model: Any,
    prompt: Any,
    *,
    max_new_tokens: int = 200,
    raw: bool = False,
    stop: str | Sequence[str] = (),
    stream: OnText | None = None,
    activations: str | None = None,
    cache: str | None = None,
    threads: int | None = None,
    adapter: Given = None,
    **sampling: Any,
) -> Any:
    """Let a model answer one prompt, or each of a list of them. To ask again and again, open an `Engine` once.

    model: a folder that lowbit wrote, a float model by any of its names, what `quantize` returned, a module that the engine computes, or
    an `Engine`. Most families of decoders run in the engine, any other model in transformers. prompt: text, which goes into the chat template where the model has one and `raw` is
    not set, or token ids. stop: texts that end an answer. stream: called with (new text, index of the prompt) as it comes.
    activations: "exact" or "int8"; threads: all cores when None; these two are the engine's. cache: how keys and values are stored, any
    `lowbit.CacheFormat` such as "int8", "int16" (as they are) or "k=int8,v=int4:g32"; what the model's folder says when None.
    adapter: the folder of a LoRA adapter that stands beside the weights, float or packed, or several by name: {"french": FOLDER, ...}. Each then answers, and the
    result is a dict by these names. Transformers runs models with adapters.
    sampling: temperature, top_k, top_p, min_p, repetition_penalty and seed, as in `lowbit.engine.generation.Sampling`.

    One `Generated` for one prompt, which prints as its text, and a list of them for a list. EngineError for a prompt that does not
    fit the model, RecipeError for options that cannot be, SourceError for what is no model.

    >>> answer = lowbit.generate(model, "Why is the sky blue?", max_new_tokens=4)
    >>> len(answer.tokens) <= 4
    True
    """
    strings = stop_strings(stop)
    sampling_of(sampling)
    program = _opened(model, adapter, activations=activations, cache=cache, threads=threads)
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "raw": raw, "stop": strings, "stream": stream, **sampling}
    if adapter is None or isinstance(adapter, (str, Path)) or isinstance(program, Engine):
        return program.generate(prompt, **how)
    return {name: program.generate(prompt, adapter=name, **how) for name in program.adapters}


def chat(
    model: Any,
    system: str | None = None,
    *,
    activations: str | None = None,
    cache: str | None = None,
    threads: int | None = None,
    adapter: str | Path | None = None,
    **sampling: Any,
) -> Conversation:
    """A conversation with a model: `chat(model).ask("Hello")` answers, and what was read once is not read again.

    system: what the model is told first. activations, cache, threads, adapter (one) and sampling are those of `generate`. EngineError for a model without a chat template.

    >>> talk = lowbit.chat(model, system="You answer in one sentence.")
    >>> len(talk.ask("Why?", max_new_tokens=4).tokens) <= 4
    True
    """
    sampling_of(sampling)
    program = _opened(model, adapter, activations=activations, cache=cache, threads=threads)
    return program.conversation(system, **sampling)


def _opened(model: Any, adapter: Given = None, **options: Any) -> Engine | Transformers:
    """What generates text with a model. EngineError for options that an engine which is open already would ignore."""
    given = {name: value for name, value in options.items() if value is not None}
    if adapter is not None and isinstance(model, (Engine, nn.Module)):
        raise EngineError(
            "an adapter is put beside the weights of a model that is given by its name; give the folder of the model"
        )
    if isinstance(model, Engine):
        if given:
            raise EngineError(f"{' and '.join(given)} would be ignored: the engine is open; give them to Engine.open")
        return model
    if isinstance(model, nn.Module):
        return Engine.open(model, **given)
    folder = getattr(model, "folder", model)  # of what `quantize` returned
    if not isinstance(folder, (str, Path)):
        raise SourceError(f"this {type(model).__name__} has no folder to run; save it first, and give the folder")
    if adapter is None:
        return open_generator(str(folder), options)
    from lowbit.adapters.named import named_adapters

    return open_generator(str(folder), options, adapters=named_adapters(adapter, folder))
