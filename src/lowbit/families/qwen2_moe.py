"""Qwen2-MoE: experts, and one more that all tokens share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowbit.families.config_facts import EXPERTS, LLAMA, WINDOWS, ConfigFacts
from lowbit.families.family import Family, Gguf
from lowbit.families.llama import QKV_BIASES, SILU

# Of layers without experts llama.cpp's architectures of Qwen know nothing.
ALL_EXPERTS: Mapping[str, tuple[Any, ...]] = {"mlp_only_layers": ([], None), "decoder_sparse_step": (1,)}


def metadata(config: Any) -> dict[str, Any]:
    """How many experts there are and how wide they are."""
    shared = getattr(config, "shared_expert_intermediate_size", None)
    return {
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
        **({"expert_shared_feed_forward_length": shared} if shared else {}),
    }


def refuses_shares(config: Any, renormalized: bool) -> str | None:
    """Whether the shares of the chosen experts are brought to a sum of 1, which is in llama.cpp's code."""
    if bool(config.norm_topk_prob) != renormalized:
        return f"llama.cpp takes norm_topk_prob as {str(renormalized).lower()}, and this config has the other value"
    return None


FAMILY = Family(
    "qwen2_moe",
    ConfigFacts(LLAMA | WINDOWS | EXPERTS | {"shared_expert_intermediate_size", "qkv_bias"}),
    gguf=Gguf(
        "qwen2moe",
        "Qwen2MoeForCausalLM",
        metadata=metadata,
        head_size=False,
        fixed={**ALL_EXPERTS, **SILU},
        refuses=lambda config: refuses_shares(config, False),
        biases=QKV_BIASES,
    ),
)
