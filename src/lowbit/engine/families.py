"""What the engine must know of a family: names of tensors, and numbers that follow from the config.

The config is the JSON object that transformers writes, so that nothing of transformers needs to be imported. To add a
family: one `Family` here, what it does with each field of its config in `config_facts.py`, and its tiny config in the tests, which hold the logits against transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """Facts of a family; `{i}` in a name is the number of a layer.

    qkv, gate_up    the weights that read one input, or the one that holds them stacked
    norms           our name -> the tensor; those that are absent are not there
    plus_one        norms multiply by 1 + weight
    partial         `partial_rotary_factor` says how much of a head turns; other families turn all of it whatever it says
    values          config -> values of `Shape` that are not those of Llama
    """

    types: tuple[str, ...]
    qkv: tuple[str, ...] = tuple(f"model.layers.{{i}}.self_attn.{x}_proj" for x in "qkv")
    gate_up: tuple[str, ...] = ("model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj")
    output: str = "model.layers.{i}.self_attn.o_proj"
    down: str = "model.layers.{i}.mlp.down_proj"
    norms: Mapping[str, str] = field(
        default_factory=lambda: {
            "attention_norm": "model.layers.{i}.input_layernorm",
            "mlp_norm": "model.layers.{i}.post_attention_layernorm",
            "query_norm": "model.layers.{i}.self_attn.q_norm",
            "key_norm": "model.layers.{i}.self_attn.k_norm",
        }
    )
    plus_one: bool = False
    partial: bool = False
    values: Callable[[Config], dict[str, Any]] = lambda config: {}


def _gemma(config: Config) -> dict[str, Any]:
    return {"embedding_scale": math.sqrt(config["hidden_size"])}


def _gemma3(config: Config) -> dict[str, Any]:
    return {
        **_gemma(config),
        "attention_scale": config["query_pre_attn_scalar"] ** -0.5,
        "logit_soft_cap": config.get("final_logit_softcapping") or 0.0,
    }


def _gemma2(config: Config) -> dict[str, Any]:
    return {**_gemma3(config), "attention_soft_cap": config.get("attn_logit_softcapping") or 0.0}


def _granite(config: Config) -> dict[str, Any]:
    return {
        "embedding_scale": config["embedding_multiplier"],
        "attention_scale": config["attention_multiplier"],
        "residual_scale": config["residual_multiplier"],
        "logit_scale": 1.0 / config["logits_scaling"],
    }


LLAMA = Family(("llama", "mistral", "qwen2", "qwen3", "smollm3"))
GRANITE = replace(LLAMA, types=("granite",), values=_granite)
GEMMA = replace(LLAMA, types=("gemma",), plus_one=True, values=_gemma)
GEMMA2 = replace(
    GEMMA,
    types=("gemma2",),
    norms={
        **LLAMA.norms,
        "mlp_norm": "model.layers.{i}.pre_feedforward_layernorm",
        "attention_post_norm": "model.layers.{i}.post_attention_layernorm",
        "mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm",
    },
    values=_gemma2,
)
GEMMA3 = replace(GEMMA2, types=("gemma3_text",), values=_gemma3)
PHI3 = replace(
    LLAMA,
    types=("phi3",),
    partial=True,
    qkv=("model.layers.{i}.self_attn.qkv_proj",),
    gate_up=("model.layers.{i}.mlp.gate_up_proj",),
)

FAMILIES: Mapping[str, Family] = {
    kind: family for family in (LLAMA, GRANITE, GEMMA, GEMMA2, GEMMA3, PHI3) for kind in family.types
}
