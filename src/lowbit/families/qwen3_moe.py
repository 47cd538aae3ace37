"""Qwen3-MoE: Qwen3 with experts, beside layers of plain MLPs where the config says so."""

from __future__ import annotations

from lowbit.families.config_facts import EXPERTS, LLAMA, WINDOWS, ConfigFacts
from lowbit.families.family import HEAD_NORMS, PRE_NORMS, Config, Decoder, Experts, Family, Gguf
from lowbit.families.llama import SILU
from lowbit.families.qwen2_moe import ALL_EXPERTS, metadata, refuses_shares


def _has(config: Config, layer: int) -> bool:
    return layer not in (config.get("mlp_only_layers") or ()) and (layer + 1) % config["decoder_sparse_step"] == 0


FAMILY = Family(
    "qwen3_moe",
    ConfigFacts(LLAMA | WINDOWS | EXPERTS | {"attention_bias", "mlp_only_layers", "decoder_sparse_step"}),
    decoder=Decoder(
        experts=Experts(normalized="norm_topk_prob", has=_has),
        norms={**PRE_NORMS, **HEAD_NORMS},
        given=(
            "decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob", "num_experts_per_tok",
            "num_local_experts", "sliding_window",
        ),
    ),
    gguf=Gguf(
        "qwen3moe",
        "Qwen3MoeForCausalLM",
        metadata=metadata,
        fixed={**ALL_EXPERTS, **SILU},
        refuses=lambda config: refuses_shares(config, True),
    ),
)  # fmt: skip
