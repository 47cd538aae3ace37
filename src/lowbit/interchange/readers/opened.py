"""A source that is open already, such as a model with an adapter in it: every call that takes a model takes one."""

from __future__ import annotations

from typing import Any

from lowbit.errors import SourceError
from lowbit.interchange.source import Source


def claims(model: Any) -> bool:
    """Whether `model` is a source."""
    return isinstance(model, Source)


def open_model(model: Source, tokenizer: Any = None) -> Source:
    """The source itself. SourceError for a tokenizer, which it would ignore."""
    if tokenizer is not None:
        raise SourceError(
            f"{model.label} is open already, so another tokenizer would be ignored; give it where the model is opened"
        )
    return model
