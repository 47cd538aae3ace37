"""What the C++ part says of the processor agrees with the system, and its stub with the module."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import pytest

import lowbit
from lowbit.kernels.core import core, why_absent

pytestmark = pytest.mark.skipif(why_absent() is not None, reason=f"no C++ part: {why_absent()}")

ORDER = ["avx512vnni", "avx512", "avx2", "portable"]


def test_sets_of_instructions_are_nested_and_end_with_portable() -> None:
    isas = core().isas()
    assert isas == ORDER[-len(isas) :]
    missing = core().features()["missing"]
    assert list(missing) == ORDER and missing["portable"] == []
    for narrow, wide in zip(ORDER[1:], ORDER, strict=False):
        assert set(missing[narrow]) <= set(missing[wide])
    for isa in isas:
        assert missing[isa] == []


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
    pool = core().Pool(2)
    for isa in core().isas():
        found = core().limits(pool, isa, bytes=1 << 20, repeats=1)
        assert set(found) == {"read_bytes_per_second", "int8_products_per_second"}
        assert all(1e6 < value < 1e16 for value in found.values())
    for wrong in ({"isa": "mmx"}, {"bytes": 0}, {"repeats": 0}):
        with pytest.raises(ValueError):
            core().limits(pool, **wrong)


def test_the_stub_names_what_the_module_has() -> None:
    tree = ast.parse((Path(lowbit.__file__).parent / "_core.pyi").read_text())
    types = {node.name for node in tree.body if isinstance(node, ast.ClassDef) and _is_typed_dict(node)}
    named = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))} - types
    named |= {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)}
    assert named == {name for name in dir(core()) if not name.startswith("_")}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "Features":
            assert {item.target.id for item in node.body} == set(core().features())


def _is_typed_dict(node: ast.ClassDef) -> bool:
    return any(isinstance(base, ast.Name) and base.id == "TypedDict" for base in node.bases)
