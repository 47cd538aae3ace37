"""Mixtures of experts as other programs read them: published names, codes that are only moved, routers left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_models import save_model
from moe_models import EXPERT, MOE_MODELS, UP
from safetensors.torch import load_file
from typer.testing import CliRunner

import lowbit
from lowbit.cli.main import app
from lowbit.errors import ExportError
from lowbit.formats import QTensor, parse_format
from lowbit.interchange.exporters.common.published_experts import PublishedFolder, published, without_number
from lowbit.interchange.exporters.exporter import exporter_named
from lowbit.interchange.exporters.gguf.metadata import family_of, refusal
from lowbit.interchange.readers.lowbit_folder import LowbitFolder

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
    assert target == "vllm" or "transformers does not load experts" in made.notes[0]
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
    "text",
    [
        "int4:g32",
        "uint4:g32:asym",
        "int8:tensor",
        "int8:channel",
        "nvfp4",
        "q4_k",
        "q3_k",
        "q2_k",
        "uint4:g32:min=fp16",
    ],
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
    problems = exporter_named("vllm").check(LowbitFolder(ours(room, "qwen3-moe", "fp8")).contents)
    assert {p.tensor for p in problems} == {
        f"model.layers.{i}.mlp.experts.{leaf}" for i in (0, 1) for leaf in ("gate_up_proj", "down_proj")
    }
    assert len(problems) == 4 and all("float-quantized" in p.reason and p.nearest == "int8:channel" for p in problems)


def test_experts_of_a_layer_are_stored_alike(room: Path) -> None:
    folder = LowbitFolder(ours(room, "olmoe", "int4:g32,*experts.down_proj=int8:channel"))
    problems = exporter_named("vllm").check(folder.contents)
    assert {p.tensor for p in problems} <= {f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1)} | {
        f"model.layers.{i}.mlp.experts.gate_up_proj" for i in (0, 1)
    }
    assert "as one layer" in problems[0].reason and problems[0].nearest == "int8:channel"


def test_config_names_all_experts_of_a_layer_at_once(room: Path, tmp_path: Path) -> None:
    folder = ours(room, "mixtral", "int8:channel,*.0.*experts*=keep,*.1.*experts*=int4:g32")
    made = lowbit.export(folder, "vllm", tmp_path / "v")
    found = section(made.path)
    assert "transformers takes the experts" in " ".join(made.notes)
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


@pytest.mark.parametrize("name", MOE_MODELS)
def test_gguf_has_the_experts_of_a_layer_in_three_tensors(room: Path, name: str) -> None:
    """Read by the `gguf` package, against our own values; what was written is also read back by the export itself."""
    folder = ours(room, name, "q4_0,embed=q8_0,*.1.*experts*=keep")
    made = lowbit.export(folder, "gguf", room / f"{name}.gguf")
    assert made.weights == 0.0
    reader = gguf.GGUFReader(made.path)
    there = {t.name: t for t in reader.tensors}
    model = LowbitFolder(folder)
    for layer in (0, 1):
        stack = model.values(f"model.layers.{layer}.mlp.experts.gate_up_proj").float()
        half = stack.shape[1] // 2
        parts = {
            "gate": stack[:, :half],
            "up": stack[:, half:],
            "down": model.values(f"model.layers.{layer}.mlp.experts.down_proj"),
        }
        for leaf, wanted in parts.items():
            found = there[f"blk.{layer}.ffn_{leaf}_exps.weight"]
            assert found.tensor_type.name == ("F32" if layer else "Q4_0")
            values = torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type).copy()).reshape(
                wanted.shape
            )
            assert torch.equal(values, wanted.float())
    assert there["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"
    known = {key: field.contents() for key, field in reader.fields.items()}
    prefix = known["general.architecture"]
    assert (known[f"{prefix}.expert_count"], known[f"{prefix}.expert_used_count"]) == (4, 2)
    if name == "qwen2-moe":
        assert list(there["blk.0.ffn_gate_inp_shexp.weight"].shape) == [128]
        assert known["qwen2moe.expert_shared_feed_forward_length"] == 96


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [("qwen3-moe", {"norm_topk_prob": False}, "norm_topk_prob"), ("qwen2-moe", {"norm_topk_prob": True}, "norm_topk_prob"),
     ("qwen3-moe", {"mlp_only_layers": [0]}, "mlp_only_layers"), ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
     ("olmoe", {"num_key_value_heads": 2}, "fewer")],
)  # fmt: skip
def test_what_llama_cpp_computes_otherwise_is_refused(name: str, change: dict[str, Any], what: str) -> None:
    config = MOE_MODELS[name]()
    for key, value in change.items():
        setattr(config, key, value)
    family = family_of(config)
    assert family is not None and what in str(refusal(family, config))


@pytest.mark.parametrize(("target", "recipe"), [("vllm", "w4"), ("gptq", "w4"), ("awq", "w4"), ("gguf", "q4_k_m")])
def test_straight_from_the_float_model(room: Path, tmp_path: Path, target: str, recipe: str) -> None:
    """Widths that a group or block does not divide get another, and a stack is named as the model has it."""
    out = tmp_path / ("out.gguf" if target == "gguf" else "out")
    done = CliRunner().invoke(
        app, ["quantize", str(room / "qwen3-moe"), recipe, "-o", str(out), "--as", target, "--no-card"]
    )
    assert done.exit_code == 0, done.output
    assert out.exists() and not list(tmp_path.glob("*.lowbit"))


def test_tensors_that_are_saved_as_one_are_refused_by_name(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import core_model_loading as rules

    true = rules.revert_weight_conversion
    contents = LowbitFolder(ours(room, "qwen3-moe", "int4:g32")).contents
    monkeypatch.setattr(rules, "revert_weight_conversion", lambda m, t: {
        n.replace("q_proj", "qk").replace("k_proj", "qk"): v for n, v in true(m, t).items()
    })  # fmt: skip
    pieces = published(contents)
    lost = {p.tensor for p in pieces.problems}
    assert lost == {n for n in contents.tensors if n.endswith(("q_proj.weight", "k_proj.weight"))}
    assert {p.whole for p in pieces.by_name.values()} == set(contents.tensors) - lost
