"""Jinja for templates of strangers: every operation, filter, method, loop and output is paid for before it runs.

Jinja's own sandbox keeps a template from what it must not see, and leaves it to run and to grow for ever. Here the compiler
is given a tree in which loops and macros begin with a payment and in which what is printed, joined, compared or cut is
weighed first; operators, filters, tests and calls come through the environment anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import update_wrapper
from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import BlockReference, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Cycler, Joiner, Namespace

from lowbit.engine import template_rules as rules
from lowbit.engine.template_budget import DEPTH, STEP, WIDEST, Budget, TooMuch
from lowbit.engine.template_tree import PAY, TEXT, WEIGH, check_source, with_payments


class Sandbox(ImmutableSandboxedEnvironment):
    """An environment for one rendering, which may do what `budget` allows."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self, budget: Budget) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], optimized=False)
        self.budget = budget
        self.filters = {name: self._paid(f, rules.FILTERS.get(name, rules.deep)) for name, f in self.filters.items()}
        self.tests = {name: self._paid(f, rules.TESTS.get(name, rules.deep)) for name, f in self.tests.items()}
        self.filters |= {
            PAY: pass_context(lambda context, value, units: self._pay(value, units)),
            WEIGH: pass_context(lambda context, value: self._pay(value, budget.weigh(value))),
            TEXT: pass_context(lambda context, value: self._pay(value, _written(budget, context, value))),
        }
        self._functions: dict[int, rules.Cost] = {}
        for name, value, cost in (("dict", _Dict(), rules.deep), ("namespace", _Namespace, rules.deep),
                                  ("range", self.globals["range"], rules.deep), ("cycler", Cycler, rules.deep),
                                  ("joiner", Joiner, rules.deep), ("lipsum", self.globals["lipsum"], _lipsum)):  # fmt: skip
            self.allow(name, value, cost)

    def allow(self, name: str, value: Any, cost: rules.Cost = rules.deep) -> None:
        """Give templates a function."""
        self.globals[name] = value
        self._functions[id(value)] = cost

    def allow_filter(self, name: str, function: Any) -> None:
        """Give templates a filter in place of Jinja's."""
        self.filters[name] = self._paid(function, rules.FILTERS[name])

    # ---- what the compiler sees

    def _parse(self, source: str, name: Any, filename: Any) -> nodes.Template:
        check_source(source)
        return with_payments(super()._parse(source, name, filename), self)

    # ---- what the compiled template calls

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = self.budget
        if operator == "%" and isinstance(left, str):
            budget.spend(rules.printf_cost(budget, left, right))
        elif operator == "+" and type(left) is str and type(right) is str:
            budget.spend(len(left) + len(right))
        else:
            budget.check_numbers(left, right)
            budget.spend(_product(budget, left, right) if operator in ("*", "**") else _sizes(left, right))
            if operator == "**" and isinstance(left, int) and isinstance(right, int):
                budget.check_bits(left.bit_length() * max(0, right))
        return super().call_binop(context, operator, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if not isinstance(argument, (str, int)):
            self.budget.spend(self.budget.weigh(argument))
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Any:
        if super().wrap_str_format(value) is None:
            return None
        text, named = value.__self__, value.__name__ == "format_map"
        formatter = _Formatter(self)

        def wrapper(*args: Any, **kwargs: Any) -> str:
            if named and (len(args) != 1 or kwargs):
                raise TypeError("format_map() takes exactly one argument")
            return formatter.vformat(str(text), () if named else args, args[0] if named else kwargs)

        made = update_wrapper(wrapper, value)
        made.lowbit_sandbox = self  # type: ignore[attr-defined]
        return made

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  as Jinja has it
        budget = __self.budget
        if isinstance(__obj, (Macro, BlockReference, LoopContext)):
            budget.spend(5 * STEP)
            if budget.depth >= DEPTH:
                raise TooMuch("its macros call each other without end")
            budget.depth += 1
            try:
                made = super().call(__context, __obj, *args, **kwargs)
            finally:
                budget.depth -= 1
            budget.spend(budget.weigh(made))
            return made
        cost = __self._cost_of(__obj)
        subject = (__obj.__self__,) if isinstance(__obj, (BuiltinMethodType, MethodType)) else ()
        budget.spend(cost(budget, *subject, *args, **kwargs))
        return super().call(__context, __obj, *args, **kwargs)

    def _cost_of(self, function: Any) -> rules.Cost:
        """What a call takes. SecurityError for what no chat template has a use for."""
        known = self._functions.get(id(function))
        if known is not None:
            return known
        if isinstance(function, (Undefined, Joiner)) or getattr(function, "lowbit_sandbox", None) is self:
            return rules.deep
        if isinstance(function, (BuiltinMethodType, MethodType)):
            subject = function.__self__
            if isinstance(subject, (LoopContext, Cycler, _Dict)):
                return lambda budget, subject, *args, **options: rules.deep(budget, *args, **options)
            for kind, costs in rules.METHODS:
                if isinstance(subject, kind) and function.__name__ in costs:
                    return costs[function.__name__]
        what = getattr(function, "__qualname__", type(function).__name__)
        raise SecurityError(f"it calls {what}, which no chat template needs")

    def _pay(self, value: Any, units: int) -> Any:
        self.budget.spend(units)
        return value

    def _paid(self, function: Any, cost: rules.Cost) -> Callable[..., Any]:
        """A filter or test that is paid for; what it makes one by one is made at once, and paid for too."""
        first = getattr(getattr(function, "jinja_pass_arg", None), "name", None)
        budget = self.budget

        @pass_context
        def paid(context: Any, /, *args: Any, **kwargs: Any) -> Any:
            budget.spend(cost(budget, *args, **kwargs))
            own = {"context": (context,), "eval_context": (context.eval_ctx,), "environment": (self,)}.get(
                first or "", ()
            )
            made = function(*own, *args, **kwargs)
            if isinstance(made, Iterator):
                made = iter([self._pay(item, 0) for item in made])
            elif type(made) is str:
                budget.spend(len(made))
            return made

        return paid


class _Formatter(SandboxedFormatter):
    """`str.format`, each field weighed."""

    def format_field(self, value: Any, format_spec: str) -> str:
        rules.check_format_spec(format_spec)
        budget = self._env.budget  # type: ignore[attr-defined]
        budget.spend(budget.weigh(value) + WIDEST * bool(format_spec))
        return str(super().format_field(value, format_spec))

    def convert_field(self, value: Any, conversion: Any) -> Any:
        budget = self._env.budget  # type: ignore[attr-defined]
        budget.spend(12 * budget.weigh(value))
        return super().convert_field(value, conversion)


class _Generation(Extension):
    """`{% generation %}`, with which templates mark what the assistant said; here it only passes through."""

    tags = {"generation"}  # noqa: RUF012  Jinja declares it so

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Dict:
    """`dict(...)`, of which a template sees nothing else."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace(...)`, without names that begin with an underscore, as transformers has it."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` is a name that a template may give
        self, rest = args[0], args[1:]
        found = dict(*rest, **kwargs)
        for name in found:
            _check_name(name)
        Namespace.__init__(self, found)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"it keeps {name!r} in a namespace, where no name begins with an underscore")


def _written(budget: Budget, context: Any, value: Any) -> int:
    """Units of the text of a value, which may be escaped."""
    return budget.weigh(value) * (6 if context.eval_ctx.autoescape else 1)


def _lipsum(budget: Budget, n: Any = 5, html: Any = True, min: Any = 20, max: Any = 100) -> int:
    return 30 * abs(int(n)) * (abs(int(max)) + abs(int(min)))


def _sizes(*values: Any) -> int:
    return sum(
        8 * len(v) if isinstance(v, (list, tuple)) else 6 * len(v) if isinstance(v, str) else STEP for v in values
    )


def _product(budget: Budget, left: Any, right: Any) -> int:
    """Units of left * right."""
    for one, other in ((left, right), (right, left)):
        if isinstance(one, (str, list, tuple)) and isinstance(other, int):
            return _sizes(one) * max(0, other)
    return STEP
