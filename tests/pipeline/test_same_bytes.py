"""What is written says nothing of where the model lay: the same bytes from two folders, and no path in any file."""

from __future__ import annotations

import shutil
from pathlib import Path

import lowbit
from tiny import save_tiny


def written(model: Path, out: Path) -> dict[str, bytes]:
    """Everything that is made of `model` with text that it writes itself, by name."""
    out.mkdir()
    found = lowbit.allocate(
        model, "gptq@int4:g32", target_bits=6, samples=4, length=128, sensitivity=out / "sensitivity.json",
        candidates=("int4:g32", "int8:g32"),
    )  # fmt: skip
    lowbit.quantize(model, found.recipe, out / "q", calibration="self", samples=2, length=64)
    lowbit.dequantize_model(out / "q", out / "float")
    lowbit.quantize(model, "int4:g32,embed=keep", out / "w4")
    lowbit.export(out / "w4", "vllm", out / "vllm")
    return {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}


def test_the_place_of_the_model_is_not_in_what_is_written(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "first-place")
    shutil.copytree(tmp_path / "first-place", tmp_path / "deeper" / "second-place")
    one = written(tmp_path / "first-place", tmp_path / "one")
    two = written(tmp_path / "deeper" / "second-place", tmp_path / "two")
    assert one.keys() == two.keys() and "q/lowbit.json" in one and "vllm/config.json" in one
    assert [name for name in one if one[name] != two[name]] == []
    places = (str(tmp_path).encode(), b"first-place")
    assert [name for name, content in one.items() if any(place in content for place in places)] == []
