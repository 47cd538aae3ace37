"""A model as `lowbit generate` runs it: by the engine, or by transformers where the engine does not take it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.engine.attached import TextOrTensors
from lowbit.engine.engine import Engine
from lowbit.engine.fallback import answering_type
from lowbit.errors import EngineError
from lowbit.interchange.files.settings import is_ours
from lowbit.interchange.hf.loading import load_config
from lowbit.measure.backends import Backend, in_transformers, of_engine


def as_generated(model: str | Path | nn.Module, module: nn.Module, tokenizer: Any = None) -> Backend:
    """What answers text with `model`: the engine, or transformers with the reason as its note.

    module: the same model in transformers; when `model` is a name it is cast to the type that `generate` loads it in. A
    module is the engine's only if `lowbit.load` made it. SourceError for a model that generates no text.
    """
    if isinstance(model, nn.Module):
        if not isinstance(getattr(model, "generate", None), TextOrTensors):
            return in_transformers(model)
        name, again = None, None
    else:
        name, again = model, {"model": str(model)}
    try:
        engine = Engine.open(model, tokenizer=tokenizer)
    except EngineError as error:
        if name is None or again is None:
            return in_transformers(module, note=str(error))
        dtype = _loaded_as(name)
        return in_transformers(module.to(dtype), {**again, "dtype": str(dtype).removeprefix("torch.")}, str(error))
    return of_engine(engine, str(engine.describe()), again)


def _loaded_as(name: str | Path) -> torch.dtype:
    """The type in which transformers loads a folder that lowbit wrote; float models are loaded in float32."""
    path = Path(name)
    if not is_ours(path):
        return torch.float32
    return answering_type(load_config(path))
