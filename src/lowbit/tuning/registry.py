"""Tuners by name. One is `(problem, *, options) -> Tuned`, and a recipe writes it after the solver.

    gptq+distill@int4:g32               the whole model at once
    gptq+reconstruct(steps=50)@int4:g64 each block when its weights have codes

Writing `@tuner(...)` above a function, in a file of this folder, is all that adding one takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from lowbit.solvers.registry import announce
from lowbit.solvers.registry import register as register_method

announce("lowbit.tuning")  # a new tuner is a file of this folder

Scope = Literal["model", "block"]
SCOPES: dict[str, Scope] = {}


def tuner(scope: Scope, **facts: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a tuner under the name of its function. `scope`: whether it sees the whole model or one block. `facts`: as a
    `Method` has them, such as the options that it `ignores`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        SCOPES[function.__name__] = scope
        return register_method("tuner", function, **facts)

    return register
