"""Transforms by name, and the order in which they make sense.

A *source* transform is `(source, *, options) -> TransformedSource` and needs no data. A *group* transform is
`(weights, stats, quantize, shared, *, options) -> Scaling` for the weights that share one input. Both are
methods of kind "transform" in the registry of the solvers, so a recipe writes them as it writes a fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lowbit.errors import RecipeError, nearest
from lowbit.solvers.registry import announce
from lowbit.solvers.registry import register as register_method

announce("lowbit.transforms")  # a new transform is a file of this package


@dataclass(frozen=True)
class Facts:
    """What a transform works on, which ones undo it when they come later, and which ones do its work already.

    undone_by   transforms that must come before this one, if they are used: name -> what they would destroy
    replaces    transforms that cannot stand beside this one: name -> why
    """

    kind: Literal["source", "group"]
    undone_by: dict[str, str]
    replaces: dict[str, str]


FACTS: dict[str, Facts] = {}


def transform(
    kind: Literal["source", "group"], undone_by: dict[str, str] | None = None, replaces: dict[str, str] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a transform under the name of its function."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        FACTS[function.__name__] = Facts(kind, undone_by or {}, replaces or {})
        return register_method("transform", function)

    return register


def check_order(names: Sequence[str]) -> None:
    """RecipeError, naming the right order, when transforms that a recipe lists in this order undo one another."""
    for i, name in enumerate(names):
        if name not in FACTS:
            raise RecipeError(f"{name!r} is no transform{nearest(name, FACTS)} (there are {', '.join(sorted(FACTS))})")
        if name in names[:i]:
            raise RecipeError(f"transform {name!r} is given twice; once is enough")
    for i, name in enumerate(names):
        for later in names[i + 1 :]:
            if later in FACTS[name].undone_by:
                right = "+".join(_moved(names, later, name))
                raise RecipeError(f"{later!r} after {name!r} {FACTS[name].undone_by[later]}; write {right}")
        for other in names:
            if other in FACTS[name].replaces:
                raise RecipeError(f"{name!r} beside {other!r}: {FACTS[name].replaces[other]}; keep one of them")


def _moved(names: Sequence[str], item: str, before: str) -> list[str]:
    """`names` with `item` put directly before `before`."""
    others = [n for n in names if n != item]
    at = others.index(before)
    return [*others[:at], item, *others[at:]]
