"""Layers that a serving program runs as one: their parts must be stored alike.

By the names that models of transformers give them; the names of the whole are vLLM's (`packed_modules_mapping`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from lowbit.families.fused import TOGETHER

FUSED = tuple((whole, parts) for whole, parts in TOGETHER if whole is not None)
_EXPERT = re.compile(r"^(.*\bexperts)\.\d+\.")
_PART_OF = {part: whole for whole, parts in FUSED for part in parts}


def fused_with(modules: Iterable[str]) -> list[tuple[str, ...]]:
    """The sets of two or more of these module names that are parts of one layer, in the order of their first."""
    found: dict[str, list[str]] = {}
    for module in modules:
        found.setdefault(run_as(module), []).append(module)
    return [tuple(parts) for parts in found.values() if len(parts) > 1]


def whole_of(module: str) -> str:
    """The name of the layer that a module becomes part of; its own where it stands alone."""
    parent, dot, leaf = module.rpartition(".")
    return f"{parent}{dot}{_PART_OF.get(leaf, leaf)}"


def experts_of(module: str) -> str | None:
    """`model.layers.0.mlp.experts` of a layer of one expert; None for others."""
    match = _EXPERT.match(module)
    return None if match is None else match[1]


def run_as(module: str) -> str:
    """As `whole_of`, and all experts of a layer are one."""
    return experts_of(module) or whole_of(module)
