"""Adapters as peft writes them, made by hand, so that tests need no peft."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SETTINGS = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/tiny", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"],
    "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True, "peft_version": "0.21.2", "inference_mode": True, "lora_dropout": 0.0,
    "use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "loftq_config": {}, "megatron_core": "megatron.core",
}  # fmt: skip
LLAMA = {"q_proj": (32, 32), "v_proj": (16, 32)}  # [out, in] of the linear layers of the tiny llama


def factors(
    modules: Mapping[str, tuple[int, int]], rank: int = 4, seed: int = 0, size: float = 0.3
) -> dict[str, Tensor]:
    """A [r, in] and B [out, r] of each module, by the names that peft gives them."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for module, (out, inner) in modules.items():
        made[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, inner, generator=generator) * size
        made[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * size
    return made


def llama_factors(rank: int = 4, seed: int = 0, size: float = 0.3) -> dict[str, Tensor]:
    """Of queries and values of both layers of the tiny llama."""
    modules = {f"model.layers.{i}.self_attn.{name}": shape for i in range(2) for name, shape in LLAMA.items()}
    return factors(modules, rank, seed, size)


def write(folder: Path, tensors: Mapping[str, Tensor], **settings: Any) -> Path:
    """A folder with these tensors and the usual settings, some of them changed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "adapter_model.safetensors")
    return folder
