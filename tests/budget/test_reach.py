"""Targets that no choice of formats meets: refused from config and headers, with what can be had."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import lowbit
from lowbit.budget import allocate
from lowbit.budget.sensitivity import CANDIDATES
from lowbit.budget.sizes import parse_size, size_text, typed_size
from lowbit.cli.main import app
from lowbit.errors import RecipeError
from lowbit.interchange.readers.folder import FolderSource

OF_BYTES = r"ask for ([0-9.]+[kMG]?B) or more"


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a weight, a text or a sensitivity is a failure of the test."""

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("this is work")

    monkeypatch.setattr(FolderSource, "read", never)
    monkeypatch.setattr(allocate, "load_calibration", never)
    monkeypatch.setattr(allocate, "measure_sensitivity", never)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--target-size", "2kB"], ["2,000 bytes is too little", "ask for", "or more"]),
        (["--target-bits", "1.5"], ["1.5 bits are too few", "2.5000", "ask for 2.5 or more"]),
        (["--target-bits", "12"], ["more than these formats reach"]),
        (["--fit-memory", "50MB", "--context", "32768"], ["KV cache of 32,768 tokens", "600MB for Python", "or more"]),
        (["--target-kl", "-1"], ["above 0"]),
        (["--target-size", "80"], ["--target-size 80 has no unit", "80MB", "80GB"]),
        (["--fit-memory", "8"], ["--fit-memory 8 has no unit", "8GB", "8GiB"]),
        (["--target-size", "8 gigs"], ["--target-size", "is no size", "80MB"]),
    ],
)
def test_no_weight_is_read_for_what_cannot_be(
    words: list[str], said: list[str], no_work: None, tmp_path: Path, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["quantize", str(tiny_folder("llama")), *words])
    line = result.stderr.strip().split("\n")[-1]
    assert result.exit_code == 2 and line.startswith("error: "), (result.output, result.exception)
    assert all(word in line for word in said), line
    assert list(tmp_path.iterdir()) == []


def test_what_is_asked_for_instead_is_met(no_work: None, tiny_folder: Callable[[str], Path]) -> None:
    model = tiny_folder("llama")
    for target in ({"target_size": "2kB"}, {"fit_memory": "10MB", "context": 1000}):
        with pytest.raises(RecipeError) as found:
            lowbit.allocate(model, **target)
        named = re.search(OF_BYTES, str(found.value))
        assert named is not None
        (name, _), *others = target.items()
        with pytest.raises(AssertionError, match="this is work"):  # it goes on to measure
            lowbit.allocate(model, **{name: named[1], **dict(others)})


def test_a_shorter_context_is_offered_where_it_is_enough(no_work: None, tiny_folder: Callable[[str], Path]) -> None:
    """Keys and values of two layers with two heads of eight numbers in two bytes: 128 bytes a token."""
    model = tiny_folder("llama")
    with pytest.raises(RecipeError, match=r"context of at most ([0-9,]+) tokens") as found:
        lowbit.allocate(model, fit_memory="620MB", context=10**6)
    context = int(re.search(r"at most ([0-9,]+) tokens", str(found.value))[1].replace(",", ""))  # type: ignore[index]
    with pytest.raises(AssertionError, match="this is work"):
        lowbit.allocate(model, fit_memory="620MB", context=context)
    with pytest.raises(RecipeError, match="too little"):
        lowbit.allocate(model, fit_memory="620MB", context=context + 1)


def test_a_large_embedding_is_named_with_what_a_smaller_one_gives(
    no_work: None, tiny_folder: Callable[[str], Path]
) -> None:
    model = tiny_folder("llama")
    with pytest.raises(RecipeError, match="add embed=") as found:
        lowbit.allocate(model, target_size="2kB")
    fmt, size = re.search(r"add embed=(\S+) to the recipe, which makes it (\S+): ", str(found.value)).groups()  # type: ignore[union-attr]
    assert str(found.value).endswith(f"`lowbit quantize MODEL w4,embed={fmt} --target-size {size}`")
    assert fmt in CANDIDATES
    with pytest.raises(AssertionError, match="this is work"):
        lowbit.allocate(model, f"w4,embed={fmt}", target_size=size)
    with pytest.raises(RecipeError) as again:
        lowbit.allocate(model, f"search@int4:g32,embed={fmt}", target_size="2kB")
    assert "add embed=" not in str(again.value)


@pytest.mark.parametrize("nbytes", [1, 999, 1000, 61_234_567, 99_999_999, 999_999_999, 1_366_000_001, 123_456_789_012])
def test_a_size_is_written_as_no_less_than_it_is(nbytes: int) -> None:
    assert nbytes <= parse_size(size_text(nbytes)) <= 1.01 * nbytes + 1


@pytest.mark.parametrize("text", ["8GB", "8 GB", "8gb", " 8Gb ", "8G", "8000000000", "8000 MB"])
def test_sizes_as_people_type_them(text: str) -> None:
    assert typed_size("--fit-memory", text) == 8 * 10**9
    assert typed_size("--fit-memory", "8GiB") == 8 << 30
