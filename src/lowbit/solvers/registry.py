"""Fits and solvers by name, each found in a file of its own.

A fit is a function `(x, fmt, importance, *, options) -> scale` or `-> (scale, offset)` on blocks:
`x` float32 [n, size], `importance` float32 [n, size] >= 0 or None, results float32 [n]; the offset is in
level units, x ~= scale * (level - offset). A solver is `(weight, fmt, fit, importance, *, options) -> QTensor`.
Writing `@fit` or `@solver` above one, in a file of `solvers/fits` or `solvers/methods`, is all that adding it takes.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lowbit.errors import RecipeError, nearest


@dataclass(frozen=True)
class Method:
    """A registered function, its name and its options with their defaults."""

    name: str
    kind: str
    function: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (inspect.getdoc(self.function) or "").split("\n")[0]


_METHODS: dict[str, Method] = {}
_FOUND: list[str] = []


def _register(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
    name = function.__name__
    parameters = inspect.signature(function).parameters.values()
    options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    _METHODS[name] = Method(name, kind, function, options)
    return function


def fit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Register a fit under the name of its function."""
    return _register("fit", function)


def solver(function: Callable[..., Any]) -> Callable[..., Any]:
    """Register a solver under the name of its function."""
    return _register("solver", function)


def methods(kind: str | None = None) -> dict[str, Method]:
    """Every registered method (of one kind), in alphabetical order."""
    if not _FOUND:
        for package in ("lowbit.solvers.fits", "lowbit.solvers.methods"):
            for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
                importlib.import_module(f"{package}.{module.name}")
        _FOUND.append("all")
    return {k: m for k, m in sorted(_METHODS.items()) if kind in (None, m.kind)}


@dataclass(frozen=True)
class Call:
    """A method with its options, as a recipe writes it: `percentile(p=99.9)`."""

    name: str
    options: tuple[tuple[str, float | int | str | bool], ...] = ()

    def __post_init__(self) -> None:
        method = self.method
        for key, value in self.options:
            if key not in method.options:
                known = f"it has {', '.join(method.options)}" if method.options else "it has none"
                raise RecipeError(f"{self.name!r} has no option {key!r}{nearest(key, method.options)} ({known})")
            default = method.options[key]
            if isinstance(default, (int, float)) and not isinstance(value, (int, float)):
                raise RecipeError(f"option {key!r} of {self.name!r} is a number, not {value!r}")
        object.__setattr__(self, "options", tuple(sorted(self.options)))

    @property
    def method(self) -> Method:
        known = methods()
        if self.name not in known:
            raise RecipeError(f"unknown method {self.name!r}{nearest(self.name, known)}")
        return known[self.name]

    def __call__(self, *args: Any) -> Any:
        return self.method.function(*args, **dict(self.options))

    def __str__(self) -> str:
        inside = ",".join(f"{k}={v}" for k, v in self.options)
        return f"{self.name}({inside})" if inside else self.name
