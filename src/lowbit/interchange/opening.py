"""Which reader a model is opened with: a folder, a .gguf file, a Hugging Face id, `smollm2` or a torch module."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from lowbit.errors import SourceError
from lowbit.interchange.files.adapter import refuse_adapter
from lowbit.interchange.files.places import check_apart
from lowbit.interchange.near import near_names
from lowbit.interchange.source import Source, say_remarks

WHAT_A_MODEL_CAN_BE = (
    "a model can be a local folder with config.json and safetensors files, a .gguf file, "
    "a Hugging Face id such as 'org/name', or the name 'smollm2'"
)
# Asked in this order; each module has `claims(model) -> bool` and `open_model(model, tokenizer) -> Source`.
# A new kind of source is one file and its name here.
OPENERS = (
    "lowbit.interchange.readers.opened",
    "lowbit.interchange.readers.module",
    "lowbit.interchange.readers.gguf.file",
    "lowbit.interchange.readers.folder",
    "lowbit.interchange.hub.smollm2",
    "lowbit.interchange.hub.hub",
)


def open_source(model: str | Path | nn.Module | Source, *, tokenizer: Any = None) -> Source:
    """Open a folder, a .gguf file, a Hugging Face id, `smollm2` or a module; a source is open already. Weights are not read yet.

    `tokenizer` replaces the model's own one. SourceError when nothing claims the name; the network
    is used only for a name that looks like `org/name` and is no local path, and for `smollm2`.
    """
    for opener in OPENERS:
        module = importlib.import_module(opener)
        if module.claims(model):
            source: Source = module.open_model(model, tokenizer)
            say_remarks(source.label, source.remarks)
            return source
    raise SourceError(_not_found(model))


def open_headers(model: str | Path | nn.Module | Source) -> Source:
    """Like `open_source`, but of a Hugging Face id only config and headers are fetched: enough for a plan."""
    from lowbit.interchange.hub import hub

    return hub.open_headers(str(model)) if hub.claims(model) else open_source(model)


def check_output(model: str | Path | nn.Module | Source, out: str | Path) -> None:
    """OutputError when writing `out` would replace what is read of `model`, or stand among its files."""
    places = (Path(model),) if isinstance(model, (str, Path)) else model.places if isinstance(model, Source) else ()
    for place in places:
        check_apart(place, Path(out))


def open_checked(
    model: str | Path | nn.Module | Source, check: Callable[[Source], None], *, tokenizer: Any = None
) -> Source:  # fmt: skip
    """Like `open_source`, once `check` has seen config and headers: what it raises comes before an id's weights are fetched."""
    from lowbit.interchange.hub import hub

    if hub.claims(model):
        check(hub.open_headers(str(model)))
        return open_source(model, tokenizer=tokenizer)
    source = open_source(model, tokenizer=tokenizer)
    check(source)
    return source


def _not_found(model: Any) -> str:
    """What was looked for under this name, and what would do."""
    if not isinstance(model, (str, Path)):
        return f"cannot use a {type(model).__name__} as a model; {WHAT_A_MODEL_CAN_BE}, or a torch nn.Module"
    path = Path(model)
    if path.is_file():
        refuse_adapter(path.parent, str(path.parent))
        return f"{model} is a file but not a .gguf file; {WHAT_A_MODEL_CAN_BE}"
    close = near_names(str(model), ["smollm2"])
    if path.is_absolute() or str(model).startswith((".", "~")):
        return f"{str(model)!r} is not there{close or f'; {WHAT_A_MODEL_CAN_BE}'}"
    return f"no folder or file {str(model)!r} exists in {Path.cwd()} and it is no known name{close or f'; {WHAT_A_MODEL_CAN_BE}'}"
