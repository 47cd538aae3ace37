"""Tensors that a model of transformers has no place for: counted, named in short, and said in the plan, the run and the card."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.interchange.opening import open_source
from lowbit.interchange.readers.left_out import BUFFERS, OF_THE_PROGRAM, SEVERAL_TOKENS, LeftOut, left_out
from lowbit.measure.api import plan_parts
from tiny import save_tiny


def with_prediction_layers(folder: Path) -> int:
    """A tiny GLM-4-MoE with its layer 46, which predicts a second token; returns the bytes of that layer."""
    config = transformers.Glm4MoeConfig(
        architectures=["Glm4MoeForCausalLM"], vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, moe_intermediate_size=32, n_routed_experts=4,
        num_experts_per_tok=2, first_k_dense_replace=1, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Glm4MoeForCausalLM(config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    layer = {n.replace("layers.1.", "layers.46."): t.clone() for n, t in tensors.items() if ".layers.1." in n}
    layer["model.layers.46.eh_proj.weight"] = torch.ones(32, 64)
    save_file(tensors | layer, folder / "model.safetensors", {"format": "pt"})
    return sum(t.numel() * t.element_size() for t in layer.values())


def test_layers_for_several_tokens_are_named_in_plan_run_and_card(tmp_path: Path) -> None:
    nbytes = with_prediction_layers(tmp_path / "in")
    plan = lowbit.plan(tmp_path / "in", "w8")
    (note,) = plan.notes
    for words in ("model.layers.46.*", f"{nbytes:,} bytes", "multi-token prediction"):
        assert words in note
    assert plan.to_json()["notes"] == [note] and note in plan_parts(plan).notes
    made = lowbit.quantize(tmp_path / "in", "w8", tmp_path / "q")
    (left,) = made.source.left_out
    assert left.nbytes == nbytes and left.tensors == len(made.source.dropped)
    manifest = json.loads((tmp_path / "q/lowbit.json").read_text())
    assert manifest["left_out"]["tensors"] == [left.to_json()] and manifest["notes"] == [note]
    assert lowbit.dequantize_model(tmp_path / "in", tmp_path / "float").notes == (note,)


def test_every_tensor_of_a_checkpoint_is_in_the_model_or_counted(tmp_path: Path) -> None:
    save_tiny("gpt2", tmp_path, tokenizer=False)
    tensors = load_file(tmp_path / "model.safetensors")
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 8, 8) for i in range(2)}
    save_file(tensors | masks, tmp_path / "model.safetensors", {"format": "pt"})
    assert open_source(tmp_path).left_out == (LeftOut("transformer.h.*.attn.bias", 2, 512, BUFFERS),)


def test_kinds_are_told_by_their_names() -> None:
    config = transformers.LlamaConfig(num_hidden_layers=2)
    dropped = {
        "mtp.fc.weight": 1, "mtp.layers.0.q_proj.weight": 2, "model.layers.7.enorm.weight": 4,
        "model.layers.0.self_attn.k_proj.output_scale": 8, "talker.x.weight": 16, f"model.layers.{'9' * 5000}.x": 32,
    }  # fmt: skip
    unused = ["model.layers.0.self_attn.k_proj.output_scale"]
    found = left_out(dropped, dropped.__getitem__, ["model.layers.0.x", "lm_head.weight"], "Llama", config, unused)
    assert found[:4] == (
        LeftOut("mtp.*", 2, 3, SEVERAL_TOKENS),
        LeftOut("model.layers.7.*", 1, 4, SEVERAL_TOKENS),
        LeftOut("model.layers.*.self_attn.k_proj.output_scale", 1, 8, OF_THE_PROGRAM),
        LeftOut("talker.*", 1, 16, "transformers leaves it unread in a Llama"),
    )
    assert sum(each.nbytes for each in found) == sum(dropped.values())
