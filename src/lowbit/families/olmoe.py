"""OLMoE: experts in every layer, norms of queries and keys over all heads."""

from __future__ import annotations

from typing import Any

from lowbit.families.config_facts import EXPERTS, LLAMA, ConfigFacts
from lowbit.families.family import HEAD_NORMS, PRE_NORMS, Decoder, Experts, Family, Gguf
from lowbit.families.llama import SILU
from lowbit.families.mixtral import metadata
from lowbit.families.qwen2_moe import refuses_shares


def _refuses(config: Any) -> str | None:
    if config.num_key_value_heads != config.num_attention_heads:
        return "llama.cpp's olmoe has as many heads of keys as of queries, and this config has fewer"
    return refuses_shares(config, False)


FAMILY = Family(
    "olmoe",
    ConfigFacts(LLAMA | EXPERTS | {"attention_bias"}, {"clip_qkv": (None,)}),
    decoder=Decoder(
        experts=Experts(width="intermediate_size", normalized="norm_topk_prob"),
        norms={**PRE_NORMS, **HEAD_NORMS},
        norms_of_all_heads=True,
        given=("norm_topk_prob", "num_experts", "num_experts_per_tok"),
    ),
    gguf=Gguf(
        "olmoe", "OlmoeForCausalLM", metadata=metadata, head_size=False, fixed=SILU, refuses=_refuses, reader="own"
    ),
)
