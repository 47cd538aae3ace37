"""Qwen3-MoE: Qwen3 with experts, beside layers of plain MLPs where the config says so."""

from __future__ import annotations

from dataclasses import replace

from lowbit.families.config_facts import EXPERTS, LLAMA, WINDOWS, ConfigFacts
from lowbit.families.family import HEAD_NORMS, Family, Gguf
from lowbit.families.llama import SILU
from lowbit.families.mixtral import GRAPH
from lowbit.families.qwen2_moe import ALL_EXPERTS, metadata, refuses_shares

FAMILY = Family(
    "qwen3_moe",
    ConfigFacts(LLAMA | WINDOWS | EXPERTS | {"attention_bias"}),
    graph=replace(GRAPH, inside=tuple(HEAD_NORMS.values())),
    gguf=Gguf(
        "qwen3moe",
        "Qwen3MoeForCausalLM",
        metadata=metadata,
        fixed={**ALL_EXPERTS, **SILU},
        refuses=lambda config: refuses_shares(config, True),
    ),
)
