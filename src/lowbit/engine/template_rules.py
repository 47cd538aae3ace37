"""What the filters, tests, methods and formats of Jinja take, said before they are called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lowbit.engine.template_budget import WIDEST, Budget, TooMuch

Cost = Callable[..., int]  # (budget, value, arguments of the call) -> units

_ESCAPED = 6  # characters of one in HTML
_PIECE = 60  # bytes of a short string in a list


def _of(value: Any, kind: type, usual: Any) -> Any:
    return value if isinstance(value, kind) else usual


def _width(value: Any) -> int:
    """A width in characters as units; a wrong type is left for the call to refuse."""
    return max(0, _of(value, int, 0))


def deep(budget: Budget, *args: Any, **options: Any) -> int:
    """The usual price: all that is read."""
    return sum(map(budget.weigh, (*args, *options.values())))


def nothing(budget: Budget, *args: Any, **options: Any) -> int:
    """Of what only looks at the outside."""
    return 0


def times(factor: int) -> Cost:
    return lambda budget, *args, **options: factor * deep(budget, *args, **options)


def _padded(budget: Budget, text: Any, width: Any = 80, *rest: Any) -> int:
    return budget.weigh(text) + 4 * _width(width)


def _replaced(budget: Budget, text: Any, old: Any = "", new: Any = "", count: Any = None, **more: Any) -> int:
    text, old, new = (
        _of(v, str, "") or str(v) if not isinstance(v, (list, dict, tuple)) else "" for v in (text, old, new)
    )
    return _ESCAPED * (len(text) + text.count(old) * len(new))


def _joined(budget: Budget, items: Any, by: Any = "", attribute: Any = None) -> int:
    weight = budget.weigh(items)
    return (
        weight + (weight // 20 + 1) * (len(by) if isinstance(by, str) else budget.weigh(by)) + deep(budget, attribute)
    )


def _indented(budget: Budget, text: Any, width: Any = 4, *rest: Any, **more: Any) -> int:
    wide = len(width) if isinstance(width, str) else _width(width)
    return 2 * budget.weigh(text) + (_of(text, str, "").count("\n") + 2) * wide


def _wrapped(
    budget: Budget, text: Any, width: Any = 79, long: Any = True, by: Any = None, *rest: Any, **more: Any
) -> int:
    by, width = more.get("wrapstring", by), more.get("width", width)
    size = budget.weigh(text)
    # What is left of a long word is copied for every line that is cut from it; a unit is time for 100 bytes.
    copied = size * size // (100 * max(1, _width(width)))
    return size * (30 + (len(by) if isinstance(by, str) else 1)) + copied


def _rounded(budget: Budget, value: Any, precision: Any = 0, *rest: Any) -> int:
    if abs(_of(precision, int, 0)) > 308:
        raise TooMuch("it rounds to too many digits")
    return budget.weigh(value)


def _batched(budget: Budget, items: Any, count: Any, *rest: Any, **more: Any) -> int:
    return budget.weigh(items) * 2 + 30 * _width(count)


def _as_json(
    budget: Budget,
    value: Any,
    ensure_ascii: Any = False,
    indent: Any = None,
    separators: Any = None,
    *rest: Any,
    **more: Any,
) -> int:
    wide = len(indent) if isinstance(indent, str) else _width(indent)
    if wide > 100 or budget.weigh(separators) > 1000:
        raise TooMuch("it writes JSON with too much space")
    return budget.weigh(value) * (1 + wide + budget.weigh(separators))


def _summed(budget: Budget, items: Any, attribute: Any = None, start: Any = 0) -> int:
    weight = budget.weigh(items) + deep(budget, attribute, start)
    return weight if isinstance(start, (int, float)) else weight * weight // 200


def _by_attribute(budget: Budget, items: Any, *args: Any, **options: Any) -> int:
    return budget.weigh(items) * (20 + deep(budget, *args, **options))


def _squared(budget: Budget, text: Any, *args: Any, **options: Any) -> int:
    weight = budget.weigh(text)
    return (20 + deep(budget, *args, **options)) * weight + weight * weight // 100


def _parsed(budget: Budget, text: Any, default: Any = 0, base: Any = 10) -> int:
    if isinstance(text, str) and len(text) > 4300:
        raise TooMuch("it reads a number of too many digits")
    return budget.weigh(text)


def _split(budget: Budget, text: str, by: Any = None, *rest: Any, **more: Any) -> int:
    by = more.get("sep", by)
    pieces = text.count(by) if isinstance(by, str) and by else len(text) // 2
    return len(text) + _PIECE * pieces


def _tabs(budget: Budget, text: str, size: Any = 8, *rest: Any, **more: Any) -> int:
    return len(text) + text.count("\t") * _width(more.get("tabsize", size))


def _printed(budget: Budget, text: Any, *args: Any, **options: Any) -> int:
    return printf_cost(budget, str(text) if isinstance(text, str) else "", options or args)


def printf_cost(budget: Budget, text: str, given: Any) -> int:
    """Of `text % given`. TooMuch for a field that is padded beyond reason."""
    fields = 0
    for width in _printf_widths(text):
        if width > WIDEST:
            raise TooMuch("it pads a text to too many characters")
        fields += 1 + width
    each = budget.weigh(given)
    return len(text) + fields + each * (text.count("%") if isinstance(given, dict) else 1)


def _printf_widths(text: str) -> Iterator[int]:
    """Width plus precision of every field; that of `*`, which an argument gives, counts as endless."""
    at = text.find("%")
    while 0 <= at < len(text):
        at, width = at + 1, 0
        if text.startswith("(", at):
            nested = 0
            while at < len(text):
                nested += {"(": 1, ")": -1}.get(text[at], 0)
                at += 1
                if nested == 0:
                    break
        number = ""
        while at < len(text) and text[at] in "-+ #0123456789.*":
            if text[at] == "*":
                width = WIDEST + 1
            if text[at].isdecimal():
                number += text[at]
            else:
                width, number = width + _small(number), ""
            at += 1
        yield width + _small(number)
        at = text.find("%", at + 1)


def _small(digits: str) -> int:
    return int(digits[:9] or 0) if len(digits) < 10 else WIDEST + 1


def check_format_spec(spec: str) -> None:
    """TooMuch for a `{:...}` that pads beyond reason."""
    digits = "".join(c if c.isdecimal() else " " for c in spec).split()
    if any(_small(d) > WIDEST for d in digits):
        raise TooMuch("it pads a text to too many characters")


FILTERS: dict[str, Cost] = {
    **dict.fromkeys(("abs", "attr", "count", "d", "default", "first", "items", "last", "length", "random"), nothing),
    **dict.fromkeys(("e", "escape", "forceescape", "xmlattr", "urlencode"), times(12)),
    **dict.fromkeys(("sort", "unique", "groupby", "dictsort", "min", "max", "map", "select", "reject", "selectattr",
                     "rejectattr"), _by_attribute),
    **dict.fromkeys(("capitalize", "title", "upper", "lower"), times(3)),
    **dict.fromkeys(("list", "wordcount", "pprint", "filesizeformat", "reverse"), times(30)),
    **dict.fromkeys(("striptags", "urlize"), _squared),
    "batch": _batched, "center": _padded, "float": _parsed, "format": _printed, "indent": _indented, "int": _parsed,
    "join": _joined, "replace": _replaced, "round": _rounded, "slice": _batched, "sum": _summed, "tojson": _as_json,
    "wordwrap": _wrapped,
}  # fmt: skip

TESTS: dict[str, Cost] = dict.fromkeys(
    ("boolean", "callable", "defined", "false", "filter", "float", "integer", "iterable", "mapping", "none", "number",
     "sameas", "sequence", "string", "test", "true", "undefined"), nothing
)  # fmt: skip

TEXT_METHODS: dict[str, Cost] = {
    **dict.fromkeys(
        ("count", "endswith", "find", "index", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier",
         "islower", "isnumeric", "isprintable", "isspace", "istitle", "isupper", "lstrip", "partition", "removeprefix",
         "removesuffix", "rfind", "rindex", "rpartition", "rstrip", "startswith", "strip"), deep,
    ),
    **dict.fromkeys(("capitalize", "casefold", "lower", "swapcase", "title", "upper"), times(3)),
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _padded),
    **dict.fromkeys(("split", "rsplit", "splitlines"), _split),
    "expandtabs": _tabs, "join": lambda budget, by, items: _joined(budget, items, by), "replace": _replaced,
}  # fmt: skip
METHODS: tuple[tuple[type, dict[str, Cost]], ...] = (
    (str, TEXT_METHODS),
    (dict, {"get": lambda budget, value, *args: deep(budget, *args[:1]), "copy": deep, "items": nothing, "keys": nothing,
            "values": nothing}),
    (list, {"copy": deep, "count": deep, "index": deep}),
    (tuple, {"count": deep, "index": deep}),
    (int, {"bit_length": nothing, "is_integer": nothing}),
    (float, {"is_integer": nothing}),
)  # fmt: skip
