"""Tiny random models, one for each thing that a cache has to do: windows, linear attention, shared keys, heads of two widths."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from tiny import TINY, VOCAB, tiny_model
from unusual_models import UNUSUAL, unusual_model

_TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip

OTHERS: dict[str, tuple[str, Callable[[], PretrainedConfig]]] = {
    # keys are wider than values
    "mla": ("DeepseekV3ForCausalLM", lambda: transformers.DeepseekV3Config(
        **_TEXT | {"num_key_value_heads": 4}, q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=32,
        first_k_dense_replace=1)),
    # a window of 8 tokens in every other layer
    "windows": ("Gemma3ForCausalLM", lambda: transformers.Gemma3TextConfig(
        **_TEXT, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"])),
    # layers with a state of linear attention
    "linear": ("Qwen3NextForCausalLM", lambda: transformers.Qwen3NextConfig(
        **_TEXT, head_dim=8, layer_types=["linear_attention", "full_attention"], linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32, shared_expert_intermediate_size=32)),
}  # fmt: skip


def cache_model(name: str) -> PreTrainedModel:
    """A tiny model in evaluation mode, its weights drawn from a seed."""
    if name in TINY:
        return tiny_model(name)
    if name in UNUSUAL:
        return unusual_model(name)
    architecture, config = OTHERS[name]
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, architecture)(config())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.1)
    return model.eval()
