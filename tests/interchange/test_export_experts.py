"""Mixtures of experts as other programs read them: published names, codes that are only moved, routers left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import save_model
from moe_models import EXPERT, MOE_MODELS, UP
from safetensors.torch import load_file

import lowbit
from lowbit.errors import ExportError
from lowbit.formats import QTensor, parse_format
from lowbit.interchange.exporters.common.pieces import PublishedFolder, published, without_number
from lowbit.interchange.exporters.target import target_named
from lowbit.interchange.lowbit_folder import LowbitFolder

RECIPES = {
    "vllm": ("int4:g32", "uint4:g32:asym", "mxfp4", "nvfp4", "int8:channel,a=int8:token", "int4:g32,*experts*=int8:channel"),
    "gptq": ("int4:g32", "uint4:g32:asym", "int8:channel,*experts*=int4:g32"),
    "awq": ("uint4:g32:asym", "int4:g32,*.0.*experts*=keep"),
}  # fmt: skip


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    for name in MOE_MODELS:
        save_model(MOE_MODELS[name](), folder / name)
    return folder


def ours(room: Path, name: str, recipe: str) -> Path:
    out = room / f"{name}-{recipe.translate(str.maketrans('*=:,', '....'))}"
    if not out.exists():
        lowbit.quantize(room / name, recipe, out)
    return out


def section(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


@pytest.mark.parametrize(("target", "recipe"), [(t, r) for t, recipes in RECIPES.items() for r in recipes])
def test_every_way_of_storing_reads_back(room: Path, tmp_path: Path, target: str, recipe: str) -> None:
    made = lowbit.export(ours(room, "qwen3-moe", recipe), target, tmp_path / "theirs")
    assert made.weights <= (2.0**-4 if recipe == "nvfp4" else 2.0**-11) and made.logits is not None
    expert = {"model.layers.1.mlp.experts.3.up_proj", "model.layers.1.mlp.experts.0.down_proj"}
    names = load_file(made.path / "model.safetensors").keys()
    assert expert <= {n.rpartition(".")[0] for n in names}
    assert not any("gate_up_proj" in n for n in names)


@pytest.mark.parametrize("name", MOE_MODELS)
def test_an_expert_has_the_codes_of_its_rows(room: Path, tmp_path: Path, name: str) -> None:
    """The second half of gate_up_proj[3], under the name that the published checkpoint has for it."""
    folder = LowbitFolder(ours(room, name, "int4:g32"))
    stack = folder.read("model.layers.1.mlp.experts.gate_up_proj")
    assert isinstance(stack, QTensor)
    half = stack.shape[1] // 2
    piece = PublishedFolder(folder).read(f"model.layers.1.{EXPERT.get(name, UP)}.weight")
    assert isinstance(piece, QTensor)
    assert torch.equal(piece.unpacked(), stack.unpacked()[3, half:])
    assert torch.equal(piece.dequantize(), stack.dequantize()[3, half:])
    made = lowbit.export(folder.folder, "vllm", tmp_path / "theirs")
    stored = load_file(made.path / "model.safetensors")
    assert f"model.layers.1.{EXPERT.get(name, UP)}.weight_packed" in stored
    router = "model.layers.1.block_sparse_moe.gate" if name == "mixtral" else "model.layers.1.mlp.gate"
    assert f"{router}.weight" in stored and router in section(made.path)["ignore"]


@pytest.mark.parametrize(
    "text", ["int4:g32", "uint4:g32:asym", "int8:tensor", "int8:channel", "nvfp4", "q4_k", "q3_k", "q2_k", "uint4:g32:min=fp16"]
)
def test_rows_of_a_stack_are_what_they_were(room: Path, text: str) -> None:
    """Whatever the scales look like: of rows, groups, whole experts, or scales that have scales."""
    import transformers

    config = transformers.Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"], hidden_size=512, moe_intermediate_size=64, num_experts=3, vocab_size=128,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    save = room / "wide"
    if not save.exists():
        save_model(config, save)
    fit = "absmax" if parse_format(text).offset is None else "minmax"
    folder = LowbitFolder(ours(room, "wide", f"{fit}@{text},embed=keep"))
    whole = folder.values("model.layers.0.mlp.experts.gate_up_proj")
    reader = PublishedFolder(folder)
    for expert in range(3):
        for i, leaf in enumerate(("gate_proj", "up_proj")):
            piece = reader.read(f"model.layers.0.mlp.experts.{expert}.{leaf}.weight")
            assert isinstance(piece, QTensor) and piece.format == parse_format(text)
            assert torch.equal(piece.dequantize(), whole[expert, 64 * i : 64 * (i + 1)])


def test_a_stack_with_levels_of_its_own_stays_whole(room: Path) -> None:
    pieces = published(LowbitFolder(ours(room, "olmoe", "kmeans4:channel,embed=keep")).contents)
    assert "levels of its own" in pieces.problems[0].reason
    with pytest.raises(ExportError, match="levels of its own"):
        lowbit.export(ours(room, "olmoe", "kmeans4:channel,embed=keep"), "vllm", room / "never")
    assert not (room / "never").exists()


def test_what_vllm_runs_no_experts_in_is_refused_for_the_stack(room: Path) -> None:
    """Problems name the model's tensors, which recipes name, and say the same once."""
    problems = target_named("vllm").check(LowbitFolder(ours(room, "qwen3-moe", "fp8")).contents)
    assert {p.tensor for p in problems} == {
        f"model.layers.{i}.mlp.experts.{leaf}" for i in (0, 1) for leaf in ("gate_up_proj", "down_proj")
    }
    assert len(problems) == 4 and all("float-quantized" in p.reason and p.nearest == "int8:channel" for p in problems)


def test_experts_of_a_layer_are_stored_alike(room: Path) -> None:
    folder = LowbitFolder(ours(room, "olmoe", "int4:g32,*experts.down_proj=int8:channel"))
    problems = target_named("vllm").check(folder.contents)
    assert {p.tensor for p in problems} <= {f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1)} | {
        f"model.layers.{i}.mlp.experts.gate_up_proj" for i in (0, 1)
    }
    assert "as one layer" in problems[0].reason and problems[0].nearest == "int8:channel"


def test_config_names_all_experts_of_a_layer_at_once(room: Path, tmp_path: Path) -> None:
    folder = ours(room, "mixtral", "int8:channel,*.0.*experts*=keep,*.1.*experts*=int4:g32")
    made = lowbit.export(folder, "vllm", tmp_path / "v")
    found = section(made.path)
    assert r"re:^model\.layers\.0\.block_sparse_moe\.experts\..*" in found["ignore"]
    four = next(g for g in found["config_groups"].values() if g["weights"]["num_bits"] == 4)
    assert four["targets"] == [r"re:^model\.layers\.1\.block_sparse_moe\.experts\..*"]
    made = lowbit.export(folder, "gptq", tmp_path / "g")
    dynamic = section(made.path)["dynamic"]
    assert dynamic[r"-:^model\.layers\.0\.block_sparse_moe\.experts(\..*)?$"] == {}
    base = section(made.path)["bits"]
    experts = dynamic.get(r"+:^model\.layers\.1\.block_sparse_moe\.experts(\..*)?$", {"bits": base})
    assert experts["bits"] == 4


def test_names_without_the_number_of_an_expert() -> None:
    assert without_number("model.layers.0.mlp.experts.12.up_proj.weight") == "model.layers.0.mlp.experts.up_proj.weight"
    assert without_number("model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
