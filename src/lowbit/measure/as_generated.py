"""A model as `lowbit generate` runs it: by the engine, or by transformers where the engine does not take it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.engine.fallback import answering_type
from lowbit.engine.generate_method import GenerateMethod
from lowbit.engine.generator import choose
from lowbit.interchange.files.settings import is_ours
from lowbit.interchange.hf.loading import load_config
from lowbit.measure.backends import Backend, in_transformers, of_engine


def as_generated(model: str | Path | nn.Module, module: nn.Module, tokenizer: Any = None) -> Backend:
    """What answers text with `model`: the engine, or transformers with the reason as its note.

    module: the same model in transformers; when `model` is a name it is cast to the type that `generate` loads it in. A
    module is the engine's only if `lowbit.load` made it. SourceError for a model that generates no text.
    """
    if isinstance(model, nn.Module) and not isinstance(getattr(model, "generate", None), GenerateMethod):
        return in_transformers(model)
    engine, reason = choose(model, {}, tokenizer)
    if engine is not None:
        return of_engine(engine, str(engine), None if isinstance(model, nn.Module) else {"model": str(model)})
    if isinstance(model, nn.Module):
        return in_transformers(module, note=reason)
    dtype = _loaded_as(model)
    again = {"model": str(model), "dtype": str(dtype).removeprefix("torch.")}
    return in_transformers(module.to(dtype), again, reason)


def _loaded_as(name: str | Path) -> torch.dtype:
    """The type in which transformers loads a folder that lowbit wrote; float models are loaded in float32."""
    path = Path(name)
    if not is_ours(path):
        return torch.float32
    return answering_type(load_config(path))
