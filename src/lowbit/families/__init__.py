"""What lowbit knows of families of models, one file a family: the engine, transforms and exporters are views of it.

A file of this package that defines a `Family` adds it; nothing lists the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from lowbit.discovery import modules_of
from lowbit.families.family import Config, Decoder, Family


@cache
def families() -> Mapping[str, Family]:
    """Every family by its `model_type`, in alphabetical order."""
    found = {f.model_type: f for file in modules_of(__name__) for f in vars(file).values() if isinstance(f, Family)}
    return dict(sorted(found.items()))


def family_of(model_type: Any) -> Family | None:
    """The family of a `model_type`, whatever a config has there; None for one that lowbit knows nothing of."""
    return families().get(str(model_type))


def decoder_of(config: Config) -> Decoder | None:
    """The decoder of a config, as JSON; None where the engine has none for its `model_type`."""
    family = family_of(config.get("model_type"))
    return family.decoder if family else None
