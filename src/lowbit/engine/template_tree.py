"""The tree of a chat template with payments in it: what the compiler makes of it counts its own steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from lowbit.engine.template_budget import STEP, TooMuch

PAY, WEIGH, TEXT = "lowbit:pay", "lowbit:weigh", "lowbit:text"  # filters, by names that a template cannot write

_LARGEST = 256 << 10  # characters of a template; the longest of real models have 30,000
_TAGS, _NODES, _NESTING = 8_000, 40_000, 200  # of its text and of its tree; of real models 1,000, 5,000 and 50


def check_source(source: str) -> None:
    """TooMuch for a template that would take long to parse."""
    if len(source) > _LARGEST:
        raise TooMuch(f"it has {len(source)} characters")
    if source.count("{{") + source.count("{%") > _TAGS:
        raise TooMuch("it has too many parts")


def with_payments(tree: nodes.Template, environment: Any) -> nodes.Template:
    """`tree`, changed. TooMuch for one on which compilers would work long or go too deep."""
    _check_size(tree)
    found: nodes.Template = _Paying().visit(tree)
    found.set_environment(environment)
    return found


def _check_size(tree: nodes.Node) -> None:
    count, row = 0, [tree]
    for _ in range(_NESTING):
        row = [child for node in row for child in node.iter_child_nodes()]
        count += len(row)
        if count > _NODES:
            raise TooMuch("it has too many parts")
        if not row:
            return
    raise TooMuch("it nests too deeply")


class _Paying(NodeTransformer):
    """Puts a payment in front of what may run often, and has weighed what is printed, joined, compared, cut or a key."""

    def get_visitor(self, node: nodes.Node) -> Callable[..., Any] | None:
        change = _CHANGES.get(type(node))
        return None if change is None else lambda at: change(self.generic_visit(at))


def _body(node: Any) -> Any:
    units = sum(_units(part) for part in node.body)
    node.body.insert(0, nodes.ExprStmt(_filter(nodes.Const(None), PAY, units)).set_lineno(node.lineno))
    return node


def _loop(node: Any) -> Any:
    if node.test is not None:
        node.test = nodes.And(_filter(nodes.Const(True), PAY, _units(node.test)), node.test)
    return _body(node)


def _output(node: Any) -> Any:
    node.nodes = [part if isinstance(part, nodes.TemplateData) else _weighed(part, TEXT) for part in node.nodes]
    return node


def _concat(node: Any) -> Any:
    node.nodes = [_weighed(part, TEXT) for part in node.nodes]
    return node


def _compare(node: Any) -> Any:
    node.expr = _weighed(node.expr, WEIGH)
    for operand in node.ops:
        operand.expr = _weighed(operand.expr, WEIGH)
    return node


def _cut(node: Any) -> Any:
    if isinstance(node.arg, nodes.Slice):
        node.node = _weighed(node.node, WEIGH)
    return node


def _pair(node: Any) -> Any:
    node.key = _weighed(node.key, WEIGH)
    return node


_CHANGES: dict[type, Callable[[Any], Any]] = {
    nodes.Macro: _body, nodes.CallBlock: _body, nodes.Block: _body, nodes.For: _loop, nodes.Output: _output,
    nodes.Concat: _concat, nodes.Compare: _compare, nodes.Getitem: _cut, nodes.Pair: _pair,
}  # fmt: skip


def _weighed(node: Any, how: str) -> Any:
    return node if isinstance(node, nodes.Const) else _filter(node, how)


def _filter(node: Any, name: str, *args: int) -> Any:
    made = nodes.Filter(node, name, [nodes.Const(value) for value in args], [], None, None)
    return made.set_lineno(getattr(node, "lineno", None) or 1, override=False)


def _units(node: Any) -> int:
    """What running a node once takes at most, the text that stands in it included; loops in it pay for themselves."""
    total, waiting = 0, [node]
    while waiting:
        at = waiting.pop()
        total += STEP + (len(at.data) if isinstance(at, nodes.TemplateData) else 0)
        total += len(at.value) if isinstance(at, nodes.Const) and isinstance(at.value, str) else 0
        waiting.extend(at.iter_child_nodes())
    return total
