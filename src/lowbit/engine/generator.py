"""Which program generates text with a model: the engine, or transformers where the engine does not compute it, and why."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from lowbit.engine.engine import Engine
from lowbit.engine.fallback import Transformers
from lowbit.engine.runtime_formats import ActivationFormat
from lowbit.errors import EngineError, RecipeError
from lowbit.interchange.source import Source
from lowbit.kv import CacheFormat

if TYPE_CHECKING:
    from lowbit.adapters.adapter import Adapter

BESIDE = "the engine does not compute adapters beside the weights yet (`lowbit merge BASE ADAPTER -o OUT` puts one into them)"


class Choice(NamedTuple):
    """The engine with a model, or None and the reason why transformers is to run it."""

    engine: Engine | None
    reason: str = ""


def choose(
    model: str | Path | nn.Module | Source, options: Mapping[str, Any], tokenizer: Any = None, threads: int | None = None,
    spelled: str = "{}", either: Collection[str] = (), adapters: Mapping[str, Adapter] | None = None,
) -> Choice:  # fmt: skip
    """The engine where it computes `model` with the cache format that is asked for, or that its folder carries, and without adapters
    beside its weights, which it does not compute yet.

    options: of `Engine.open`: EngineError where transformers would ignore one that is not None, with its name `spelled` as the user
    knows it. either: those that the caller gives transformers too. RecipeError and FormatError for what no program takes.
    """
    given = {name: value for name, value in options.items() if value is not None}
    ActivationFormat.of(given.get("activations", "exact"))
    if "cache" in given:
        CacheFormat.of(given["cache"])
    try:
        if adapters:
            raise EngineError(BESIDE)
        return Choice(Engine.open(model, tokenizer=tokenizer, **{"threads": threads, **given}))
    except (EngineError, RecipeError) as error:  # a RecipeError is about the cache, as all else was checked
        if ignored := [spelled.format(name) for name in given if name not in either]:
            raise EngineError(f"{error}; transformers runs it, without {' and '.join(ignored)}") from None
        return Choice(None, str(error))


def open_generator(
    model: str,
    options: Mapping[str, Any],
    before_transformers: Callable[[], object] = lambda: None,
    spelled: str = "{}",
    adapters: Mapping[str, Adapter] | None = None,
) -> Engine | Transformers:
    """What generates text with a folder that lowbit wrote, or a float model by any name that lowbit takes.

    adapters: those that are to stand beside the weights, by name. options, spelled: as for `choose`. before_transformers: called where it is not the engine, before transformers is imported.
    """
    engine, reason = choose(model, options, spelled=spelled, either=("cache",), adapters=adapters)
    if engine is not None:
        return engine
    before_transformers()
    return Transformers.open(model, reason, options.get("cache"), adapters)
