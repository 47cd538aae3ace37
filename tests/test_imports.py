"""What the graph of imports promises: no circles but those of a value and its text, and one door to transformers' internals."""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules

import pytest

import lowbit
from test_public import imports

SRC = Path(lowbit.__file__).parent
# Modules that import one another, those only for type checkers counted too. A value and the text that it is written as
# need each other; the rest is to be untangled.
CIRCLES = [
    {"lowbit.engine.conversation", "lowbit.engine.engine", "lowbit.engine.fallback"},
    {"lowbit.formats.format", "lowbit.formats.parsing"},
    {"lowbit.measure.bench", "lowbit.measure.bench_table"},
    {"lowbit.recipes.recipe", "lowbit.recipes.text"},
]


# `logging` is among the public names too.
SUBMODULES = {module.name for module in iter_modules(find_spec("transformers").submodule_search_locations)}  # type: ignore[union-attr]


def modules() -> dict[str, Path]:
    """Every module of the package and its file."""
    found = {".".join(("lowbit", *path.relative_to(SRC).with_suffix("").parts)): path for path in SRC.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in found.items()}


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The sets of two and more modules each of which reaches all others of its set."""
    reached = {}
    for start in graph:
        seen, ahead = set(), [start]
        while ahead:
            for name in graph[ahead.pop()] - seen:
                seen.add(name)
                ahead.append(name)
        reached[start] = seen
    found = {frozenset(m for m in reached[name] if name in reached[m]) for name in graph if name in reached[name]}
    return sorted((set(f) for f in found), key=min)


def test_circles_are_found_whatever_their_length() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": set(), "f": {"g"}, "g": {"f"}}
    assert circles(graph) == [{"a", "b", "c"}, {"f", "g"}]


def test_no_new_circle_of_imports() -> None:
    known = modules()
    graph = {name: (imports(path) & known.keys()) - {name} for name, path in known.items()}
    inits = {name for name, path in known.items() if path.name == "__init__.py"}
    # `from lowbit.room import module` names the room as well, which is no import of what the room's own __init__ has.
    graph = {name: {n for n in found if n not in inits or _uses(known[name], n)} for name, found in graph.items()}
    found = circles(graph)
    assert not [circle for circle in found if not any(circle <= allowed for allowed in CIRCLES)]


def inside_transformers(source: str) -> set[str]:
    """The submodules of transformers that some source imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module or "")
            if (
                node.module == "transformers"
            ):  # a submodule is no public name, even where its package has an attribute for it
                found |= {f"transformers.{a.name}" for a in node.names if a.name in SUBMODULES}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # for importlib
            found |= {node.value} if re.fullmatch(r"transformers(\.[a-z_]+)+", node.value) else set()
    return {name for name in found if name.startswith("transformers.")}


@pytest.mark.parametrize(
    "source",
    [
        "from transformers.cache_utils import DynamicLayer",
        "def f():\n    import transformers.masking_utils as masks",
        "if TYPE_CHECKING:\n    from transformers import modeling_utils",
        "importlib.import_module('transformers.core_model_loading')",
    ],
)
def test_a_way_into_transformers_is_seen(source: str) -> None:
    assert inside_transformers(source)
    assert not inside_transformers(
        "import transformers\nfrom transformers import DynamicLayer, logging\nfrom lowbit import nn"
    )


def test_one_door_to_the_internals_of_transformers() -> None:
    doors = ("lowbit.interchange.hf.", "lowbit._hook")
    found = {n: inside_transformers(p.read_text("utf-8")) for n, p in modules().items() if not n.startswith(doors)}
    assert not {name: reached for name, reached in found.items() if reached}


def _uses(path: Path, package: str) -> bool:
    """Whether a file imports a name that is in the `__init__` of a package, and not a module of it."""
    known = modules()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == package:
            if any(f"{package}.{alias.name}" not in known for alias in node.names):
                return True
        elif isinstance(node, ast.Import) and any(alias.name == package for alias in node.names):
            return True
    return False
