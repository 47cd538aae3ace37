"""What the C++ part says of the processor agrees with the system, and its stub with the module."""

from __future__ import annotations

import ast
import os
import re
import sys
from pathlib import Path

import pytest

import lowbit
from lowbit.kernels.core import core, why_absent

pytestmark = pytest.mark.skipif(why_absent() is not None, reason=f"no C++ part: {why_absent()}")

LIST = Path(__file__).parents[2] / "csrc" / "kernels" / "isas.def"
LINE = re.compile(r'^LOWBIT_ISA\((\w+), (\w+), (\w+), "([^"]*)", "([^"]*)", "([^"]*)"\)$', re.MULTILINE)
SETS = {name: (extends, flags.split()) for name, _, extends, flags, *_ in LINE.findall(LIST.read_text())}
ORDER = [*reversed(SETS)]


def test_sets_of_instructions_are_nested_and_end_with_portable() -> None:
    isas = core().isas()
    assert isas == [isa for isa in ORDER if isa in isas]
    missing = core().features()["missing"]
    assert list(missing) == ORDER and missing["portable"] == []
    for wide, (narrow, _) in SETS.items():
        assert set(missing[narrow]) <= set(missing[wide])
    for isa in isas:
        assert missing[isa] == []


def test_flags_of_the_list_are_known() -> None:
    """A flag that the core does not ask the processor for is one that it never has."""
    assert ORDER[-1] == "portable" and len(SETS) == LIST.read_text().count("\nLOWBIT_ISA(")
    known = core().features()["flags"]
    assert not known or {flag for _, flags in SETS.values() for flag in flags} <= set(known)


def test_features_are_sane() -> None:
    found = core().features()
    assert set(found) == {"flags", "caches", "cores", "missing"}
    assert all(type(usable) is bool for usable in found["flags"].values())
    assert 1 <= found["cores"] <= os.cpu_count()
    known = [size for size in (found["caches"][level] for level in ("l1d", "l2", "l3")) if size]
    assert known == sorted(known) and all(size % 1024 == 0 for size in known)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc/cpuinfo")
def test_flags_are_those_of_the_system() -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    system = next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())
    for name, usable in core().features()["flags"].items():
        assert usable == (name in system), name


def test_limits_are_measured_for_every_set_of_instructions() -> None:
    pool = core().ThreadPool(2)
    for isa in core().isas():
        found = core().limits(pool, isa, bytes=1 << 20, repeats=1)
        assert set(found) == {"read_bytes_per_second", "int8_products_per_second"}
        assert all(1e6 < value < 1e16 for value in found.values())
    for wrong in ({"isa": "mmx"}, {"bytes": 0}, {"repeats": 0}):
        with pytest.raises(ValueError):
            core().limits(pool, **wrong)


def test_the_stub_is_the_module() -> None:
    """Names, members, parameters and their defaults."""
    tree = ast.parse((Path(lowbit.__file__).parent / "_core.pyi").read_text())
    written = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    types = {name for name, node in written.items() if isinstance(node, ast.ClassDef) and bases(node) == {"TypedDict"}}
    named = set(written) - types | {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)}
    assert named == {name for name in dir(core()) if not name.startswith("_")}
    for name, node in written.items():
        if name in types:
            continue
        real = getattr(core(), name)
        if isinstance(node, ast.FunctionDef):
            assert parameters(node) == real_parameters(real), name
        elif bases(node) == {"Enum"}:
            assert {item.targets[0].id for item in node.body if isinstance(item, ast.Assign)} == set(real.__members__)
        else:
            members = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
            assert set(members) == {m for m in vars(real) if not m.startswith("_")} | set(members) & {"__init__"}, name
            for member, item in members.items():
                if item.decorator_list:
                    assert isinstance(vars(real)[member], property), f"{name}.{member}"
                else:
                    assert parameters(item) == real_parameters(vars(real)[member]), f"{name}.{member}"
    features = {item.target.id for item in written["Features"].body if isinstance(item, ast.AnnAssign)}
    assert features == set(core().features())


def bases(node: ast.ClassDef) -> set[str]:
    return {base.id for base in node.bases if isinstance(base, ast.Name)}


def parameters(node: ast.FunctionDef) -> tuple[list[str], list[object]]:
    """(names, defaults)"""
    given = [default for default in [*node.args.defaults, *node.args.kw_defaults] if default is not None]
    return [a.arg for a in [*node.args.args, *node.args.kwonlyargs]], [ast.literal_eval(default) for default in given]


def real_parameters(function: object) -> tuple[list[str], list[object]]:
    """The same of what nanobind says; the types of arrays are no Python."""
    ((text, _, defaults),) = function.__nb_signature__  # type: ignore[attr-defined]
    plain = re.sub(r"\\\d+", "...", re.sub(r"ndarray\[[^\]]*\]", "Any", text))
    names = parameters(ast.parse(f"{plain}: ...").body[0])[0]  # type: ignore[arg-type]
    count = plain.count("= ...")
    return names, list(defaults[-count:]) if count else []
