"""Whole folders of tiny models: written, read back by lowbit's own readers, the same weights, inputs and logits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import lowbit
from lowbit.cli.export import summary
from lowbit.cli.main import app
from lowbit.errors import ExportError
from lowbit.interchange.opening import open_source
from tiny import save_tiny

TARGETS = {
    "vllm": ("int4:g32", "uint4:g32:asym", "int8:channel", "int8:tensor,a=int8:token", "mxfp4", "nvfp4", "fp8",
             "e4m3:channel,a=fp8:token", "int4:g32,*.down_proj=int8:channel", "int4:g32,*.0.*.o_proj=keep",
             "int8:channel,a=minmax@int8:tensor,fallback=never", "int8:channel,a=minmax@uint8:tensor:asym,fallback=never"),
    "gptq": ("int4:g32", "uint4:g32:asym", "int2:g16", "int8:channel", "int4:g32,*.down_proj=int8:channel"),
    "awq": ("int4:g32", "uint4:g32:asym", "int4:g32,*.0.*.o_proj=keep"),
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny("llama-tied", folder)
    return folder


def quantized(source: Path, recipe: str, out: Path) -> Path:
    text = [torch.randint(3, 128, (64,), generator=torch.Generator().manual_seed(1)).tolist()]
    calibration = {"calibration": [torch.tensor(text)], "samples": 1, "length": 64} if "minmax" in recipe else {}
    lowbit.quantize(source, recipe, out, **calibration)  # type: ignore[arg-type]
    return out


def section(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


@pytest.mark.parametrize(("target", "recipe"), [(t, r) for t, recipes in TARGETS.items() for r in recipes])
def test_what_is_written_reads_back(llama: Path, tmp_path: Path, target: str, recipe: str) -> None:
    ours = quantized(llama, recipe, tmp_path / "ours")
    made = lowbit.export(ours, target, tmp_path / "theirs")
    names = {p.name for p in made.path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not {"lowbit.json", "journal.jsonl"} & names
    source, folder = open_source(made.path), lowbit.load(ours, torch.float32)
    exact = 0.0 if "channel" not in recipe or target == "vllm" else 2.0**-11
    for name, tensor in folder.state_dict().items():
        if name.endswith("norm.weight"):
            assert torch.equal(source.read(name), tensor)
    for layer in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.o_proj"):
        weight = folder.get_submodule(layer).weight
        expected = weight.dequantize() if hasattr(weight, "dequantize") and not torch.is_tensor(weight) else weight
        apart = (source.read(f"{layer}.weight") - expected).norm() / expected.norm()
        assert float(apart) <= (2.0**-4 if recipe == "nvfp4" else exact)


def test_it_is_the_same_every_time(llama: Path, tmp_path: Path) -> None:
    ours = quantized(llama, "int4:g32", tmp_path / "ours")
    for target in TARGETS:
        one, two = (lowbit.export(ours, target, tmp_path / f"{target}{i}").path for i in (1, 2))
        for path in one.iterdir():
            assert path.read_bytes() == (two / path.name).read_bytes()


def test_config_of_one_and_of_several_ways(llama: Path, tmp_path: Path) -> None:
    recipe = "int4:g32,*.down_proj=int8:channel,*.0.*.o_proj=keep"
    ours = quantized(llama, recipe, tmp_path / "ours")
    vllm = section(lowbit.export(ours, "vllm", tmp_path / "vllm").path)
    assert vllm["format"] == "pack-quantized"
    assert vllm["ignore"] == ["model.layers.0.self_attn.o_proj", "lm_head"]
    groups = list(vllm["config_groups"].values())
    assert sorted(g["weights"]["num_bits"] for g in groups) == [4, 8]
    assert groups[1]["targets"] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    gptq = section(lowbit.export(ours, "gptq", tmp_path / "gptq").path)
    assert (gptq["bits"], gptq["group_size"], gptq["sym"], gptq["checkpoint_format"]) == (4, 32, True, "gptq")
    assert gptq["dynamic"][r"+:^model\.layers\.1\.mlp\.down_proj$"] == {"bits": 8, "group_size": -1}
    assert gptq["dynamic"][r"-:^model\.layers\.0\.self_attn\.o_proj$"] == {}
    with pytest.raises(ExportError, match=r"down_proj.*the nearest is uint4:channel:asym"):
        lowbit.export(ours, "awq", tmp_path / "awq")
    assert not list(tmp_path.glob("awq*"))


def test_tables_go_out_in_sixteen_bits_and_the_note_says_so(llama: Path, tmp_path: Path) -> None:
    ours = quantized(llama, "int4:g32", tmp_path / "ours")
    made = lowbit.export(ours, "vllm", tmp_path / "vllm")
    stored = load_file(made.path / "model.safetensors")
    assert stored["model.embed_tokens.weight"].dtype == torch.float16
    assert "lm_head.weight" not in stored  # tied
    (said,), (change,) = made.notes, made.conversions
    assert said.startswith(
        "model.embed_tokens: float16 for vLLM, 8,192 bytes instead of 4,608; lowbit's folder has int8:channel"
    )
    assert said.endswith(f"relative error {made.weights:.1e}") and change.error == made.weights > 0
    assert made.to_json()["conversions"] == [change.to_json()]


@pytest.mark.parametrize("family", ["qwen2", "mistral", "phi", "opt", "gpt-neox", "gemma3"])
def test_other_families(tmp_path: Path, family: str) -> None:
    save_tiny(family, tmp_path / "float")
    lowbit.quantize(tmp_path / "float", "int4:g32", tmp_path / "ours")
    for target in TARGETS:
        assert lowbit.export(tmp_path / "ours", target, tmp_path / target).logits is not None


@pytest.mark.parametrize(("target", "recipe"), [("vllm", "int4:g32"), ("gptq", "int4:g32"), ("awq", "uint4:g32:asym")])
def test_layers_that_their_module_keeps_turned_go_out_as_all_others(tmp_path: Path, target: str, recipe: str) -> None:
    """GPT-2's Conv1D: [out, in] in the file, as vLLM's GPT-2 wants packed words; transformers does not read them."""
    save_tiny("gpt2", tmp_path / "float")
    lowbit.quantize(tmp_path / "float", f"{recipe},*.0.*c_fc=keep", tmp_path / "ours")
    made = lowbit.export(tmp_path / "ours", target, tmp_path / "theirs")
    assert made.logits is not None and "transformers does not load" in made.notes[0]
    stored = load_file(made.path / "model.safetensors")
    words = stored["transformer.h.1.mlp.c_fc." + ("weight_packed" if target == "vllm" else "qweight")]
    assert tuple(words.shape) == {"vllm": (128, 4), "gptq": (4, 128), "awq": (32, 16)}[target]
    assert tuple(stored["transformer.h.0.mlp.c_fc.weight"].shape) == (32, 128)  # kept: as the module has it


@pytest.mark.parametrize(
    ("target", "recipe", "near"),
    [("vllm", "int8:channel,a=int8:token", "int4:channel"), ("gptq", "uint4:g32:asym", "int4:g32"), ("gptq", "int2:g32", "int4:g32")],
)  # fmt: skip
def test_turned_layers_that_no_reader_has(tmp_path: Path, target: str, recipe: str, near: str) -> None:
    save_tiny("gpt2", tmp_path / "float")
    lowbit.quantize(tmp_path / "float", recipe, tmp_path / "ours")
    with pytest.raises(ExportError, match=rf"\[in, out\].*the nearest is {near}"):
        lowbit.export(tmp_path / "ours", target, tmp_path / target)
    assert not (tmp_path / target).exists()


def test_straight_from_the_float_model(llama: Path, tmp_path: Path) -> None:
    """Presets get the target's sense, widths that 128 does not divide another group, and tables stay float."""
    run = CliRunner()
    done = run.invoke(
        app, ["quantize", str(llama), "int4:g64", "-o", str(tmp_path / "w4"), "--as", "vllm", "--no-card"]
    )
    assert done.exit_code == 0, done.output
    groups = section(tmp_path / "w4")["config_groups"].values()
    assert {g["weights"]["group_size"] for g in groups} <= {32, 64}
    assert load_file(tmp_path / "w4/model.safetensors")["model.embed_tokens.weight"].dtype == torch.float32
    done = run.invoke(app, ["quantize", str(llama), "w8a8", "-o", str(tmp_path / "w8"), "--as", "vllm", "--no-card"])
    assert done.exit_code == 0, done.output
    assert section(tmp_path / "w8")["format"] == "int-quantized"


def test_what_cannot_be_is_said_before_anything_is_quantized(llama: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["quantize", str(llama), "nf4", "-o", str(tmp_path / "out"), "--as", "vllm"])
    assert done.exit_code == 2
    assert "has no nf4" in done.output
    assert "int4:" in done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["export", "quantize"])
@pytest.mark.parametrize("target", ["vllm", "gguf"])
def test_what_is_read_is_never_replaced(llama: Path, tmp_path: Path, command: str, target: str) -> None:
    model = tmp_path / "in" / ("model" if target == "vllm" else "model.gguf")
    if command == "export":
        lowbit.quantize(llama, "int4:g32,embed=int8:g32", model)
    else:
        shutil.copytree(llama, model)
    before = {path: path.read_bytes() for path in model.iterdir()}
    (tmp_path / f"link{model.suffix}").symlink_to(model)
    words = [
        command,
        str(model),
        *(["int4:g32", "--no-card"] if command == "quantize" else []),
        "--as",
        target,
        "--overwrite",
    ]
    outs = [model, tmp_path / f"link{model.suffix}", *([model.parent] if target == "vllm" else [])]
    for out in outs:
        done = CliRunner().invoke(app, [*words, "-o", str(out)])
        assert done.exit_code == 2, done.output
        assert "holds the model that is read" in done.output
    assert {path: path.read_bytes() for path in model.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", f"link{model.suffix}"]


def test_what_is_not_equal_is_named(llama: Path, tmp_path: Path) -> None:
    lowbit.quantize(llama, "int4:g32", tmp_path / "w4")
    made = lowbit.export(tmp_path / "w4", "vllm", tmp_path / "out")
    assert made.unequal == ("model.embed_tokens.weight",)
    assert "every weight equal but model.embed_tokens.weight, within" in summary(made)


def test_what_a_killed_run_left_goes_with_the_next(llama: Path, tmp_path: Path) -> None:
    lowbit.quantize(llama, "int4:g32", tmp_path / "w4")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for process in (str(gone.pid), str(os.getpid()), "notes"):
        (tmp_path / f"out.exporting-{process}-x").mkdir()
    (tmp_path / f"other.exporting-{gone.pid}-x").mkdir()
    lowbit.export(tmp_path / "w4", "vllm", tmp_path / "out")
    kept = {f"out.exporting-{os.getpid()}-x", "out.exporting-notes-x", f"other.exporting-{gone.pid}-x"}
    assert {path.name for path in tmp_path.iterdir()} == {"w4", "out", *kept}


@pytest.mark.parametrize("seed", range(3))
def test_nvfp4_of_any_weights_is_exported(tmp_path: Path, seed: int) -> None:
    save_tiny("llama-tied", tmp_path / "m", seed=seed)
    made = lowbit.export(quantized(tmp_path / "m", "nvfp4", tmp_path / "ours"), "vllm", tmp_path / "theirs")
    alone = [n for n in made.unequal if "o_proj" in n or "down_proj" in n]
    assert made.weights <= 2.0**-4 and len(alone) <= 4
