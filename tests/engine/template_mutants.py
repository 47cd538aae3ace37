"""Chat templates that nobody would write: random expressions of what may be slow or large, and real ones cut and joined."""

from __future__ import annotations

import random
from collections.abc import Sequence

FILTERS = ["abs", "attr", "batch", "capitalize", "center", "count", "d", "default", "dictsort", "e", "escape", "filesizeformat", "first", "float", "forceescape", "format", "groupby", "indent", "int", "join", "last", "length", "list", "lower", "items", "map", "min", "max", "pprint", "random", "reject", "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "slice", "sort", "string", "striptags", "sum", "title", "trim", "truncate", "unique", "upper", "urlencode", "urlize", "wordcount", "wordwrap", "xmlattr", "tojson"]  # fmt: skip
TESTS = [
    "odd",
    "even",
    "divisibleby(3)",
    "defined",
    "undefined",
    "none",
    "string",
    "mapping",
    "number",
    "sequence",
    "iterable",
    "in([1])",
    "eq(1)",
    "sameas(1)",
    "lower",
    "callable",
]
METHODS = ["center", "ljust", "rjust", "zfill", "replace", "join", "split", "rsplit", "splitlines", "upper", "title", "format", "format_map", "expandtabs", "encode", "translate", "count", "find", "strip", "partition", "get", "items", "keys", "values", "copy", "index", "append", "pop", "to_bytes", "bit_length", "hex", "fromkeys", "next", "cycle", "changed", "__class__", "casefold"]  # fmt: skip
LEAVES = (
    "0", "1", "-1", "7", "10**9", "99999", "2**64", "1.5", "1e308", "''", "'x'", "'ab\\n'", "'<b>é'", "'%9999999s'", "'{:99999999}'", "'%s'", "'{}{0!r}'",
    "none", "true", "messages", "messages[0]", "messages[0].content", "range(99999)", "range(9)", "[]", "[1, 2]", "(1,)", "{'a': 1}", "ns.x", "ns.x",
    "ns", "i", "loop", "bos_token", "tools", "f", "dict", "namespace", "cycler", "joiner", "lipsum", "strftime_now", "self", "undefined_name", "'x' * 9999",
)  # fmt: skip
OPERATORS = ["+", "-", "*", "/", "//", "**", "%", "~", "==", "<", "in", "and", "or"]


def expression(rng: random.Random, depth: int) -> str:
    """A random expression of Jinja."""
    if depth == 0 or rng.random() < 0.15:
        return rng.choice(LEAVES)

    def inner() -> str:
        return expression(rng, depth - 1)

    kind = rng.randrange(9)
    if kind == 0:
        return f"({inner()} {rng.choice(OPERATORS)} {inner()})"
    if kind in (1, 2):
        args = ", ".join(inner() for _ in range(rng.randrange(3)))
        if rng.random() < 0.2:
            args = rng.choice(
                (
                    "attribute='role'",
                    "attribute=0",
                    "'upper'",
                    "'center', 99999",
                    "start=[]",
                    "indent=9",
                    "width=9999",
                    "'odd'",
                )
            )
        return f"({inner()})|{rng.choice(FILTERS)}" + (f"({args})" if args else "")
    if kind in (3, 4):
        return f"({inner()}).{rng.choice(METHODS)}({', '.join(inner() for _ in range(rng.randrange(3)))})"
    if kind == 5:
        return rng.choice(
            (f"[{inner()}, {inner()}]", f"({inner()}, {inner()})", f"{{{inner()}: {inner()}}}", f"[{inner()}]")
        )
    if kind == 6:
        return rng.choice(
            (f"({inner()})[{inner()}]", f"({inner()})[{inner()}:]", f"({inner()})[::-1]", f"({inner()})({inner()})")
        )
    if kind == 7:
        return f"({inner()} if {inner()} else {inner()})"
    return f"(({inner()}) is {rng.choice(TESTS)})"


def statement(rng: random.Random, depth: int) -> str:
    """A random piece of a template."""
    if depth == 0 or rng.random() < 0.3:
        return rng.choice(("{{{{ {} }}}}", "{{% set ns.x = {} %}}", "{{% set y = {} %}}", "text")).format(
            expression(rng, 3)
        )
    body = "".join(statement(rng, depth - 1) for _ in range(rng.randint(1, 3)))
    value = expression(rng, 2)
    return rng.choice((
        f"{{% for i in {value} %}}{body}{{% endfor %}}", f"{{% for i in range(99999) %}}{body}{{% endfor %}}",
        f"{{% for i in range(99) if {value} %}}{body}{{% endfor %}}", f"{{% for i in {value} recursive %}}{body}{{{{ loop([1]) }}}}{{% endfor %}}",
        f"{{% if {value} %}}{body}{{% else %}}{body}{{% endif %}}", f"{{% set y %}}{body}{{% endset %}}", f"{{% filter {rng.choice(FILTERS)} %}}{body}{{% endfilter %}}",
        f"{{% macro f(a={value}) %}}{body}{{{{ f(a) }}}}{{% endmacro %}}{{{{ f(1) }}}}", f"{{% call f(1) %}}{body}{{% endcall %}}",
        f"{{% with a = {value} %}}{body}{{% endwith %}}", f"{{% autoescape true %}}{body}{{% endautoescape %}}",
        f"{{% set ns.x = [ns.x, ns.x] %}}{body}", f"{{% set ns.x = ns.x + ns.x %}}{body}", f"{{% block b{rng.randrange(9)} %}}{body}{{% endblock %}}",
    ))  # fmt: skip


def mutants(rng: random.Random, count: int, known: Sequence[str]) -> list[str]:
    """`count` templates, a third of them of damaged `known` ones."""
    made = []
    for number in range(count):
        if number % 3:
            made.append("{% set ns = namespace(x=['ab']) %}{% macro f(a=1) %}{{ a }}{% endmacro %}" + statement(rng, 3))
            continue
        one, other = rng.choice(known), rng.choice(known)
        cut = sorted(rng.randrange(len(one) + 1) for _ in range(2))
        piece = other[rng.randrange(len(other)) :][: rng.randrange(200)]
        made.append(one[: cut[0]] + piece * rng.choice((0, 1, 1, 50)) + one[cut[1] :])
    return made
