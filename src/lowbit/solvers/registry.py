"""Fits and solvers by name, each found in a file of its own.

A fit is a function `(x, fmt, importance, *, options) -> scale` or `-> (scale, offset)` on blocks:
`x` float32 [n, size], `importance` float32 [n, size] >= 0 or None, results float32 [n]; the offset is in
level units, x ~= scale * (level - offset). A solver is `(weight, fmt, fit, stats, *, options) -> Found`, `stats` being
what calibration saw of the weight's input (`solvers/stats.py`) or None. A transform rewrites a model and lives in a
package of its own, which announces itself here.
Writing `@fit()` or `@solver()` above one, in a file of `solvers/fits` or `solvers/methods`, is all that adding it takes;
what a method makes use of is said there, and a recipe that gives it anything else is an error.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lowbit.discovery import modules_of
from lowbit.errors import RecipeError, nearest
from lowbit.formats import Format, stores
from lowbit.solvers.found import Found

# Names of the options that make no difference for a format, without and with statistics of the input.
Ignores = Callable[[Format, bool], Sequence[str]]
Needs = Literal["nothing", "second_moment", "drift"]


def _nothing(fmt: Format, with_stats: bool) -> Sequence[str]:
    return ()


@dataclass(frozen=True)
class Method:
    """A registered function, its name, its options with their defaults, and what it makes use of (`fit`, `solver`)."""

    name: str
    kind: str
    function: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    offset: Literal["any", "never", "always"] = "any"
    learns_levels: bool = False
    needs: Needs = "nothing"
    weighs: bool = False
    ignores: Ignores = _nothing
    in_core: Callable[..., Any] | None = None

    def declines(self, fmt: Format) -> str | None:
        """Why this method cannot fill a format, or None if it can."""
        if self.kind == "solver":
            if self.learns_levels and fmt.codebook is None:
                return f"learns the levels, and {fmt} has fixed ones; use a kmeans grid, e.g. kmeans4:channel"
            if not self.learns_levels and fmt.codebook is not None:
                return f"cannot learn the levels of {fmt}; use kmeans@{fmt}"
        elif self.kind in ("transform", "tuner"):
            return None
        elif fmt.scale is None:
            return f"finds a scale, and {fmt} has none; leave it out, or give the codebook a scale with cb=tensor"
        elif self.offset == "never" and fmt.offset is not None:
            return f"is symmetric and cannot fill the offset of {fmt}; use {_with_offset()}"
        elif self.offset == "always" and fmt.offset is None:
            return f"needs an offset and {fmt} has none; add ':asym', ':zero=fp32' or ':min=fp16'"
        return None

    @property
    def summary(self) -> str:
        """The first line of its docstring: a plain sentence."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def details(self) -> str:
        """The rest of its docstring: the formula, what bounds the error, the source."""
        return (inspect.getdoc(self.function) or "").partition("\n")[2].strip("\n")


_METHODS: dict[str, Method] = {}


def _with_offset() -> str:
    """The fits that fill an offset, as a sentence lists them."""
    names = [name for name, method in methods("fit").items() if method.offset != "never"]
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _register(kind: str, function: Callable[..., Any], **facts: Any) -> Callable[..., Any]:
    name = function.__name__
    parameters = inspect.signature(function).parameters.values()
    options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    _METHODS[name] = Method(name, kind, function, options, **facts)
    return function


def register(kind: str, function: Callable[..., Any], **facts: Any) -> Callable[..., Any]:
    """Register a method of another kind, which a package above this one knows: a transform, a tuner."""
    return _register(kind, function, **facts)


def weighting(function: Callable[..., Any]) -> Callable[..., Any]:
    """Register a weighting of tokens under the name of its function."""
    return _register("weighting", function)


def fit(
    offset: Literal["any", "never", "always"] = "any",
    *,
    weighs: bool = False,
    ignores: Ignores = _nothing,
    in_core: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a fit under the name of its function. `offset`: whether it fills formats with or without one.

    `weighs`: whether it looks at the importance of elements, which statistics of the input give. `ignores`: its options that
    make no difference for a format, without and with statistics. `in_core`: from the format and all options, what the C++ core
    is asked to do in its place, a `CoreFit`, or None where it cannot.
    """
    facts = {"offset": offset, "weighs": weighs, "ignores": ignores, "in_core": in_core}
    return lambda function: _register("fit", function, **facts)


def solver(
    learns_levels: bool = False,
    needs: Needs = "nothing",
    *,
    weighs: bool = False,
    ignores: Ignores = _nothing,
    in_core: Callable[..., Found | None] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a solver under the name of its function.

    `learns_levels`: for learned grids, and only for them. `needs`: the statistics of the input that it cannot do
    without; "drift" also needs the float model's own input, and so a second stream. `weighs`: whether it looks at statistics
    itself, where they are there, and does not only hand their importance to the fit. `ignores`: as of a fit. `in_core`: the same
    function by the C++ core, of weights in any float type, which returns None where it does not take one.
    """
    facts = {"learns_levels": learns_levels, "needs": needs, "weighs": weighs, "ignores": ignores, "in_core": in_core}
    return lambda function: _register("solver", function, **facts)


# Where methods are found; a package above this one adds its own (`announce`).
_PACKAGES = ["lowbit.solvers.fits", "lowbit.solvers.methods"]


def announce(package: str) -> None:
    """Let `methods()` look into another package, once."""
    if package not in _PACKAGES:
        _PACKAGES.append(package)


def methods(kind: str | None = None) -> dict[str, Method]:
    """Every registered method (of one kind), in alphabetical order."""
    for package in _PACKAGES:
        modules_of(package)
    return {k: m for k, m in sorted(_METHODS.items()) if kind in (None, m.kind)}


_MOST = 10_000  # steps or iterations; more is a slip of the finger


def _check_number(what: str, default: Any, value: Any) -> None:
    """Every option is a number of the kind of its default: a count up to _MOST, or finite and not negative."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, int) and not (number and isinstance(value, int) and 0 <= value <= _MOST):
        raise RecipeError(f"{what} is a whole number from 0 to {_MOST}, not {value!r}")
    if isinstance(default, float) and not (number and math.isfinite(value) and value >= 0):
        raise RecipeError(f"{what} is a finite number and not negative, not {value!r}")


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
            _check_number(f"option {key!r} of {self.name!r}", method.options[key], value)
        if len({key for key, _ in self.options}) < len(self.options):
            raise RecipeError(f"an option of {self.name!r} is given twice")
        object.__setattr__(self, "options", tuple(sorted(self.options)))

    @property
    def method(self) -> Method:
        known = methods()
        if self.name not in known:
            raise RecipeError(f"unknown method {self.name!r}{nearest(self.name, known)}")
        return known[self.name]

    def __call__(self, x: Any, fmt: Format, *others: Any) -> Any:
        """Run a fit on blocks, or a solver on a weight (its QTensor alone). RecipeError when it cannot fill `fmt`."""
        if self.method.kind == "solver":
            return self.solve(x, fmt, *others).weight
        reason = self.method.declines(fmt)
        if reason is not None and fmt.scale is not None:
            raise RecipeError(f"{self.name!r} {reason}")
        return self.method.function(x, fmt, *others, **dict(self.options))

    def core_fit(self, fmt: Format) -> Any | None:
        """What the C++ core is asked to do in place of a fit (`solvers/in_core.py`); None where it does not know it."""
        method = self.method
        if method.in_core is None or method.declines(fmt) is not None:
            return None
        return method.in_core(fmt, **{**method.options, **dict(self.options)})

    def solve_in_core(self, weight: Any, fmt: Format, *others: Any) -> Found | None:
        """`solve` by the C++ core, for a weight of any float type; None where it does not take it."""
        method = self.method
        if method.in_core is None or method.declines(fmt) is not None:
            return None
        return self._of_usual_size(method.in_core, weight, fmt, *others)

    def solve(self, weight: Any, fmt: Format, *others: Any) -> Found:
        """Run a solver on a weight, `others` being fit and statistics. RecipeError when it cannot fill `fmt`."""
        reason = self.method.declines(fmt)
        if reason is not None:
            raise RecipeError(f"{self.name!r} {reason}")
        found = self.solve_in_core(weight, fmt, *others) or self._of_usual_size(
            self.method.function, weight, fmt, *others
        )
        assert found is not None
        return found

    def _of_usual_size(
        self, function: Callable[..., Found | None], weight: Any, fmt: Format, *others: Any
    ) -> Found | None:
        """Solvers and fits know scales of usual size; powers of two change nothing but the exponent."""
        x = stores.times_power(weight, -fmt.exponent) if fmt.exponent else weight
        found = function(x, fmt.plain, *others, **dict(self.options))
        return replace(found, weight=replace(found.weight, format=fmt)) if found and fmt.exponent else found

    def __str__(self) -> str:
        inside = ",".join(f"{k}={v}" for k, v in self.options)
        return f"{self.name}({inside})" if inside else self.name
