"""Tiny random mixtures of experts, wide enough for the kernels of serving programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

from tiny import VOCAB

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "num_experts_per_tok": 2,
}  # fmt: skip
_QWEN: dict[str, Any] = {"num_experts": 4, "moe_intermediate_size": 64, **_SIZES}


def _made(name: str, architecture: str, **values: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(architectures=[architecture], **values)


MOE_MODELS: dict[str, Callable[[], Any]] = {
    "mixtral": _made("MixtralConfig", "MixtralForCausalLM", num_local_experts=4, head_dim=32, **_SIZES),
    "qwen2-moe": _made("Qwen2MoeConfig", "Qwen2MoeForCausalLM", shared_expert_intermediate_size=96, **_QWEN),
    "qwen3-moe": _made("Qwen3MoeConfig", "Qwen3MoeForCausalLM", head_dim=32, norm_topk_prob=True, **_QWEN),
    "olmoe": _made("OlmoeConfig", "OlmoeForCausalLM", num_experts=4, **_SIZES | {"num_key_value_heads": 4}),
}  # fmt: skip
EXPERT = {"mixtral": "block_sparse_moe.experts.3.w3"}  # an up projection as the checkpoint calls it; others:
UP = "mlp.experts.3.up_proj"
