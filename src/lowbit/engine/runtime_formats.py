"""The format of activations, which is chosen when a model is opened, not stored with its weights.

A small value with a text form, made at the front door (`--activations int8`, `Engine.open(activations="int8")`) and handed down as it is to
where the kernels' arguments are made of it. That of the KV cache is `lowbit.kv.CacheFormat`; see `cache_layout.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.engine.arguments import one_of

ACTIVATIONS = ("exact", "int8")


@dataclass(frozen=True)
class ActivationFormat:
    """How activations are rounded before a weight whose recipe says nothing about its inputs.

    name: "exact", 15 bits, which is as good as no rounding; or "int8". RecipeError for any other.
    """

    name: str = "exact"

    def __post_init__(self) -> None:
        one_of("activations", self.name, ACTIVATIONS)

    @staticmethod
    def of(given: str | ActivationFormat) -> ActivationFormat:
        """The format of this text."""
        return given if isinstance(given, ActivationFormat) else ActivationFormat(given)

    def __str__(self) -> str:
        return self.name
