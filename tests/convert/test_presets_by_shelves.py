"""Which presets' folders each exporter holds: what it holds reads back, and what it refuses names a command that runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from gguf.quants import dequantize
from typer.testing import CliRunner

import lowbit
from lowbit.cli.main import app
from lowbit.errors import ExportError
from lowbit.interchange.readers.lowbit_folder import LowbitFolder
from lowbit.recipes.presets import PRESETS
from lowbit.recipes.recipe import Recipe
from tiny import _ROPE, tiny_tokenizer

# Others run every night: these are one of each kind of answer.
DAILY = ("w8", "w4", "w4 calibrated", "w3", "nl4", "smoothquant", "zeropoint", "nf4", "fp8", "mxfp4")
SHELVES = ("gguf", "vllm", "gptq", "awq")
INTEGERS = "vllm gptq awq"
# Preset -> the shelves that hold its folder; "calibrated" after a name: with calibration text.
HELD = {
    "w8": "gguf vllm gptq", "w4": f"gguf {INTEGERS}", "w4 calibrated": f"gguf {INTEGERS}", "w3": "", "w3 calibrated": "",
    "w2": "", "nl4": "gguf", "awq": f"gguf {INTEGERS}", "gptq": f"gguf {INTEGERS}", "smoothquant": "vllm", "w8a8": "",
    "w4a8": "", "absmax": "gguf vllm gptq", "zeropoint": "gptq", "minmax": "", "linear": "gptq",
    "symmetric": "gguf vllm gptq", "per-channel": "gguf vllm gptq", "blockwise": "gguf vllm gptq",
    "groupwise": f"gguf {INTEGERS}", "zeroquant": "gptq", "simquant": "", "llm-int8": "", "kmeans": "", "hqq": "gguf",
    "nf4": "", "fp8": "vllm", "mxfp4": "gguf vllm", "nvfp4": "vllm",
}  # fmt: skip


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shelves")


@pytest.fixture(scope="module")
def float_model(room: Path) -> Path:
    """One layer, of widths that 64 divides and 128 does not."""
    sizes = _ROPE | {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 1, "tie_word_embeddings": True}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(architectures=["LlamaForCausalLM"], **sizes))
    model.save_pretrained(room / "float")
    tiny_tokenizer().save_pretrained(room / "float")
    return room / "float"


@pytest.fixture(scope="module")
def ran() -> set[str]:
    """The suggested commands that have run already."""
    return set()


def quantized(model: Path, preset: str, out: Path) -> Path:
    name, _, calibrated = preset.partition(" ")
    text = torch.randint(3, 128, (2, 64), generator=torch.Generator().manual_seed(1))
    needs = calibrated or Recipe.parse(name).needs_calibration is not None
    if not out.exists():
        lowbit.quantize(model, name, out, **({"calibration": [text]} if needs else {"effort": "none"}))
    return out


def test_every_preset_has_its_row() -> None:
    assert {name.split()[0] for name in HELD} == set(PRESETS)


@pytest.mark.parametrize(
    "preset", [pytest.param(name, marks=() if name in DAILY else pytest.mark.slow) for name in HELD]
)
def test_what_a_preset_writes_is_held_or_a_command_that_runs_is_named(
    room: Path, float_model: Path, ran: set[str], preset: str
) -> None:
    folder = quantized(float_model, preset, room / preset)
    held = []
    for shelf in SHELVES:
        try:
            made = lowbit.export(folder, shelf, room / f"{preset}-{shelf}{'.gguf' if shelf == 'gguf' else ''}")
        except ExportError as error:
            found = re.search(
                r"this works: (lowbit quantize MODEL \S+ --as \S+(?: --calibration builtin)?)$", str(error)
            )
            assert found, error
            if found[1] not in ran:
                ran.add(found[1])
                words = shlex.split(found[1].replace("MODEL", shlex.quote(str(float_model))))[1:]
                words += ["-o", str(room / f"instead-{len(ran)}{'.gguf' if shelf == 'gguf' else ''}"), "--no-card"]
                words += ["--samples", "2"] if "--calibration" in words else []
                done = CliRunner().invoke(app, words)
                assert done.exit_code == 0, (found[1], done.output)
        else:
            held.append(shelf)
            assert made.logits is not None and made.logits < (0.05 if preset == "nvfp4" else 1e-3)
            assert made.weights <= (2.0**-4 if preset == "nvfp4" else 2.0**-10), made.unequal
            changed = {c.tensor: c for c in made.conversions}
            assert "model.embed_tokens.weight" in changed
            assert all(changed[name].error > 0 for name in made.unequal if name in changed)
    assert held == HELD[preset].split()


@pytest.mark.parametrize(
    ("recipe", "embedding", "layer"),
    [
        ("w4", "Q8_0", "Q4_0"), ("w8", "Q8_0", "Q8_0"), ("int4:channel,embed=int6:g64", "Q8_0", "Q4_0"),
        ("iq4nl:g64,embed=uint4:g64:asym", "Q4_1", "IQ4_NL"), ("uint4:g64:asym,embed=nf4:g64", "F16", "Q4_1"),
        ("int5:tensor,embed=e4m3:channel", "F16", "Q5_0"), ("q4_k,embed=int8:*x32", "Q8_0", "Q4_1"),
        ("uint5:g64:zero=fp16,embed=keep", "F32", "Q5_1"), ("int8:channel:narrow,embed=keep", "F32", "Q8_0"),
    ],
)  # fmt: skip
def test_gguf_by_its_own_package(float_model: Path, tmp_path: Path, recipe: str, embedding: str, layer: str) -> None:
    """The `gguf` package's dequantizer is the oracle: what it makes of the file is lowbit's own weight, and its bytes are told."""
    lowbit.quantize(
        float_model, f"search@{recipe}" if "@" not in recipe and ":" in recipe else recipe, tmp_path / "ours"
    )
    made = lowbit.export(tmp_path / "ours", "gguf", tmp_path / "x.gguf")
    ours = LowbitFolder(tmp_path / "ours")
    there = {t.name: t for t in gguf.GGUFReader(made.path).tensors}
    changed = {c.tensor: c for c in made.conversions}
    for name, place, kind in (
        ("model.embed_tokens.weight", "token_embd.weight", embedding),
        ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight", layer),
        ("model.layers.0.self_attn.o_proj.weight", "blk.0.attn_output.weight", layer),
    ):
        found = there[place]
        assert found.tensor_type.name == kind
        expected = ours.values(name)
        values = torch.from_numpy(dequantize(found.data, found.tensor_type).copy()).float()
        apart = float((values - expected).double().norm() / expected.double().norm())
        assert apart <= 2.0**-9
        if name in changed:
            assert changed[name].error == pytest.approx(apart, abs=1e-9) and changed[name].after == found.n_bytes
        else:
            assert apart == 0


def test_a_zero_point_that_has_no_room_is_an_error_and_leaves_nothing(float_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    quantized(float_model, "zeropoint", tmp_path / "ours")
    file = tmp_path / "ours" / "model.safetensors"
    parts = load_file(file)
    parts["model.layers.0.mlp.down_proj.weight.offset"] += 300
    save_file(parts, file, {"format": "pt"})
    with pytest.raises(
        ExportError, match=r"down_proj.weight has zero-points from .* and there is room for -128 to 127"
    ):
        lowbit.export(tmp_path / "ours", "gptq", tmp_path / "theirs")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours"]
