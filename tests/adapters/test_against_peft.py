"""Adapters that peft itself trains and saves: what lowbit makes of them beside what peft computes, unmerged and merged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
from lowbit.errors import SourceError
from tiny import tiny_model

peft = pytest.importorskip("peft")
IDS = torch.tensor([[1, 5, 9, 20, 3], [7, 7, 2, 90, 11]])


def trained(arch: str, **settings: Any) -> Any:
    """A model of peft whose adapter is not zero, as training leaves it."""
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(tiny_model(arch)), peft.LoraConfig(r=4, **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param += torch.randn(param.shape, generator=generator) * 0.2
    return model.eval()


ALL = "all-linear"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "queries and values": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "a regex": ("llama", {"target_modules": r".*layers\.1.*(q|k)_proj"}),
    "rsLoRA": ("llama", {"target_modules": ALL, "use_rslora": True, "lora_alpha": 3}),
    "patterns": ("llama", {"target_modules": ALL, "rank_pattern": {"layers.0.self_attn.q_proj": 2, r"^model.layers.1.*v_proj": 6}, "alpha_pattern": {"q_proj": 5}}),
    "DoRA": ("llama", {"target_modules": ALL, "use_dora": True}),
    "DoRA of Conv1D": ("gpt2", {"target_modules": ["c_attn"], "use_dora": True}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj", "wte"], "fan_in_fan_out": True}),
    "an embedding that is tied": ("llama-tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "both that are tied": ("llama-tied", {"target_modules": ["embed_tokens", "lm_head"]}),
    "tied together": ("llama-tied", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "saved modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head"]}),
    "saved modules that are tied": ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "biases": ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}),
    "biases of LoRA": ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "biases in LoRA": ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True}),
    "fused projections": ("gpt-neox", {"target_modules": ALL}),
}  # fmt: skip
PEFT_MERGES_OTHERWISE = {
    "Conv1D",
    "an embedding that is tied",
    "both that are tied",
    "tied together",
}  # it adds to both at once


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_is_what_peft_computes(case: str, tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    arch, settings = CASES[case]
    model = trained(arch, **settings)
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        apart = model(input_ids=IDS).logits
        before = tiny_model(arch)(input_ids=IDS).logits
        both = lowbit.with_adapter(tiny_folder(arch), tmp_path / "adapter")
        mine = both.load_float()(input_ids=IDS).logits
        merged = model.merge_and_unload()(input_ids=IDS).logits
    moved = float((apart - before).abs().max())
    assert moved > 1e-4
    assert float((mine - apart).abs().max()) < 1e-6
    if case not in PEFT_MERGES_OTHERWISE:
        assert float((mine - merged).abs().max()) < 1e-6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("arch", "settings", "said"),
    [
        ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}, "embedding with DoRA"),
        ("llama", {"target_modules": ["q_proj"], "lora_bias": True}, "has no bias that could take it"),
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}, "single rows of the embedding"),
        ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "changed the weights of the base too"),
        ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}, "stacks of experts"),
    ],
)  # fmt: skip
def test_what_is_refused_by_name(
    arch: str, settings: dict[str, Any], said: str, tmp_path: Path, tiny_folder: Callable[[str], Path]
) -> None:
    trained(arch, **settings).save_pretrained(tmp_path / "adapter")
    with pytest.raises(SourceError, match=said):
        lowbit.with_adapter(tiny_folder(arch), tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["IA3Config", "LoHaConfig"])
def test_other_kinds_are_refused_by_name(kind: str, tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    extra = {"feedforward_modules": ["down_proj"]} if kind == "IA3Config" else {}
    config = getattr(peft, kind)(target_modules=["q_proj", *extra.get("feedforward_modules", [])], **extra)
    peft.get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(SourceError, match=f"of the kind '{kind.removesuffix('Config').upper()}'"):
        lowbit.with_adapter(tiny_folder("llama"), tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore")
def test_a_base_model_without_its_head(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    """An adapter of the inner model, whose names lack what a model with a head puts before them."""
    torch.manual_seed(0)
    inner = copy.deepcopy(tiny_model("llama")).model
    model = peft.get_peft_model(inner, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    both = lowbit.with_adapter(tiny_folder("llama"), tmp_path / "adapter").load_float()
    with torch.no_grad():
        assert float((both.model(input_ids=IDS)[0] - model.eval()(input_ids=IDS)[0]).abs().max()) < 1e-5
