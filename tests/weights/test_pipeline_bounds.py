"""Memory stays bounded by the largest tensor, whatever the model's size; slabs change no bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import lowbit
from lowbit.errors import LowbitError
from lowbit.formats import parse_format
from lowbit.interchange.files.safetensors_reader import bytes_of
from lowbit.interchange.files.safetensors_writer import create, index_json, shards_of
from lowbit.interchange.tensors import TensorPlan
from lowbit.planning import plan as plan_module
from lowbit.planning.tensor import by_rows
from lowbit.recipes.recipe import Recipe
from lowbit.weights import solve as solve_module
from strategies import steady
from tiers import mostly_nightly
from tiny import tiny_tokenizer

MB = 1 << 20
# Quantizes in a process of its own, under a limit of address space if one is given, and says what it took.
RUN = """
import json, resource, sys
import torch
torch.set_num_threads(1)
import lowbit
from lowbit.interchange.opening import open_source
from lowbit.measure.memory import peak_resident
model, recipe, out, small, limit = sys.argv[1:6]
lowbit.quantize(small, recipe, out + "-small")  # everything is imported and warm
before = peak_resident()  # not ru_maxrss, which starts at the parent's
if int(limit):
    resource.setrlimit(resource.RLIMIT_AS, (int(limit), int(limit)))
plan = lowbit.quantize(model, recipe, out).plan
after = peak_resident()  # not ru_maxrss, which starts at the parent's
largest = max(t.bytes_before for t in plan.tensors)
print(json.dumps({"before": before, "after": after, "planned": plan.peak_bytes, "largest": largest, "output": plan.output_bytes}))
"""


def synthetic(folder: Path, layers: int, hidden: int, vocab: int, max_shard: int) -> int:
    """Write a Llama of random weights in float32, a tensor at a time; returns the bytes of its files."""
    config = transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=hidden, intermediate_size=11 * hidden // 4,
        num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=16, vocab_size=vocab,
        tie_word_embeddings=True,
    )  # fmt: skip
    folder.mkdir()
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        state = transformers.LlamaForCausalLM(config).state_dict()
    del state["lm_head.weight"]
    stored = {name: (torch.float32, tuple(tensor.shape)) for name, tensor in state.items()}
    shards = shards_of([(name, {name: spec}) for name, spec in stored.items()], max_shard)
    create(folder, shards)
    (folder / "model.safetensors.index.json").write_bytes(index_json(shards))
    noise = (
        torch.randn(max(tensor.numel() for tensor in state.values()), generator=torch.Generator().manual_seed(0)) * 0.05
    )
    for shard in shards:
        with (folder / shard.file).open("r+b") as file:
            for begin, end in shard.spans.values():
                file.seek(begin)
                file.write(bytes_of(noise[: (end - begin) // 4]))
    return sum(shard.file_bytes for shard in shards)


def quantize_apart(model: Path, recipe: str, out: Path, limit: int = 0) -> dict[str, int]:
    synthetic(out.parent / "small", 1, 64, 128, 1 << 30)
    command = [sys.executable, "-c", RUN, str(model), recipe, str(out), str(out.parent / "small"), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="counts resident memory as Linux does")
@pytest.mark.parametrize(
    "recipe", [pytest.param("absmax@int8:channel", marks=pytest.mark.slow), "absmax@int4:g32,embed=int4:g32"]
)
def test_peak_memory_is_far_below_the_file(recipe: str, tmp_path: Path) -> None:
    size = synthetic(tmp_path / "model", 12, 1024, 4096, 200 * MB)
    assert size > 600 * MB
    took = quantize_apart(tmp_path / "model", recipe, tmp_path / "out")
    grown = took["after"] - took["before"]
    assert took["after"] < took["planned"]
    assert grown < size / 3 and grown < 8 * took["largest"] + 64 * MB, took


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits address space as Linux does")
def test_four_gigabytes_under_a_limit_of_less_than_half(tmp_path: Path) -> None:
    size = synthetic(tmp_path / "model", 20, 2048, 32768, 2 << 30)
    assert size > 4 << 30
    took = quantize_apart(tmp_path / "model", "absmax@int4:g32", tmp_path / "out", limit=9 * size // 20)
    assert took["after"] < took["planned"] < size / 2, took
    assert took["after"] - took["before"] < 5 * took["largest"]


FORMATS = ["int4:g32", "int4:g24", "int8:channel", "uint3:g16:asym", "uint4:g8:min=fp16", "kmeans3:channel", "kmeans2:g20",
           "ternary:g20", "int5:g7", "mxfp4", "nvfp4", "int8:tensor", "int8:*x8", "int4:4x8", "nf4:g32:s=(uint8:g64:s=fp32)"]  # fmt: skip


def solved(x: torch.Tensor, text: str, transposed: bool) -> dict[str, torch.Tensor]:
    plan = TensorPlan("w", tuple(x.shape), "linear", x.dtype, transposed, parse_format(text), None)
    result = solve_module.solve(plan, x, Recipe.of(parse_format(text)))
    assert {k: (v.dtype, tuple(v.shape)) for k, v in result.stored.items()} == plan.stored()
    dense = result.qtensor().dequantize()
    whole = x.transpose(-1, -2) if transposed else x
    assert result.error == pytest.approx(float((dense - whole).norm() / whole.norm()), rel=1e-3)
    return result.stored


SHAPES = [(40, 48), (37, 33), (5, 24, 40), (3, 17, 33), (1, 48), (40, 1)]


@pytest.mark.parametrize(
    ("text", "shape", "transposed"),
    mostly_nightly(FORMATS, SHAPES, [False, True], every=lambda f, s, t: (f + s + 2 * t) % 4 == 0),
)
def test_slabs_change_no_bit(
    text: str, shape: tuple[int, ...], transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    whole = solved(x, text, transposed)
    for slab in (1, 100, 700):
        monkeypatch.setattr(solve_module, "SLAB", slab)
        pieces = solved(x, text, transposed)
        assert all(torch.equal(pieces[name], tensor) for name, tensor in whole.items()), slab


@given(st.data())
@steady(60)
def test_slabs_of_any_shape(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(FORMATS))
    shape = tuple(data.draw(st.lists(st.integers(1, 40), min_size=2, max_size=3)))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    whole = solved(x, text, False)
    slab = solve_module.SLAB
    try:
        solve_module.SLAB = data.draw(st.integers(1, 200))
        pieces = solved(x, text, False)
    finally:
        solve_module.SLAB = slab
    assert all(torch.equal(pieces[name], tensor) for name, tensor in whole.items())


def test_which_weights_are_cut_into_slabs() -> None:
    def cut(text: str, shape: tuple[int, ...]) -> bool:
        return by_rows(parse_format(text), shape)

    assert cut("int4:g32", (64, 64)) and cut("int8:channel", (64, 64)) and cut("int8:tensor", (4, 64, 64))
    assert not cut("int8:tensor", (64, 64)) and not cut("int8:*x8", (64, 64)) and not cut("nf4-dq", (64, 64))
    assert not cut("int3:g7", (64, 33))  # rows of 99 bits share bytes
    assert plan_module.SLAB == solve_module.SLAB


def test_a_nan_in_a_late_slab_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve_module, "SLAB", 64)
    x = torch.randn(40, 48)
    x[39, 47] = float("nan")
    with pytest.raises(LowbitError, match="'w' has 1 NaN"):
        solved(x, "int8:channel", False)


def test_the_source_is_not_changed() -> None:
    x = torch.randn(33, 40)
    before = x.clone()
    for text in FORMATS:
        solved(x, text, False)
    assert torch.equal(x, before)


def test_a_device_is_where_the_work_is_done_not_where_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[Any] = []
    original = torch.Tensor.to

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs:
            moved.append(kwargs["device"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    lowbit.quantize(torch.nn.Linear(32, 32), "w8", tmp_path / "out", device=torch.device("cpu"))
    assert torch.device("cpu") in moved
