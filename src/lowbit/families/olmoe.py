"""OLMoE: experts in every layer, norms of queries and keys over all heads."""

from __future__ import annotations

from typing import Any

from lowbit.families.config_facts import EXPERTS, LLAMA, ConfigFacts
from lowbit.families.family import Family, Gguf
from lowbit.families.llama import SILU
from lowbit.families.qwen2_moe import refuses_shares


def _metadata(config: Any) -> dict[str, Any]:
    return {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}


def _refuses(config: Any) -> str | None:
    if config.num_key_value_heads != config.num_attention_heads:
        return "llama.cpp's olmoe has as many heads of keys as of queries, and this config fewer"
    return refuses_shares(config, False)


FAMILY = Family(
    "olmoe",
    ConfigFacts(LLAMA | EXPERTS | {"attention_bias"}, {"clip_qkv": (None,)}),
    gguf=Gguf(
        "olmoe", "OlmoeForCausalLM", metadata=_metadata, head_size=False, fixed=SILU, refuses=_refuses, reader="own"
    ),
)
