"""Tiny random models of the families that the engine knows, and how far logits are apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from tiny import tiny_tokenizer

VOCAB, POSITIONS = 200, 1024
_BASE = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": POSITIONS, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_ROPE = {"rope_theta": 10000.0}
_MIXTURE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
_LONG = {"short_factor": [1.0 + 0.1 * i for i in range(4)], "long_factor": [2.0 + i for i in range(4)]}

# name -> (config class, values that are not those above)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-odd": ("Llama", {"hidden_size": 80, "intermediate_size": 104, "vocab_size": 203, "head_dim": 16}),
    "llama-48": ("Llama", {"hidden_size": 48, "intermediate_size": 72, "num_key_value_heads": 4, "head_dim": 16}),
    "llama-wide": ("Llama", {"hidden_size": 64, "num_attention_heads": 16, "num_key_value_heads": 1, "head_dim": 16}),
    "llama3": ("Llama", {"rope_parameters": {
        **_ROPE, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128}}),
    "linear": ("Llama", {"rope_parameters": {**_ROPE, "rope_type": "linear", "factor": 4.0}}),
    "yarn": ("Llama", {"rope_parameters": {
        **_ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}}),
    "yarn-mscale": ("Llama", {"rope_parameters": {
        **_ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "mscale": 0.8,
        "mscale_all_dim": 0.5, "truncate": False}}),
    "mistral": ("Mistral", {"sliding_window": 20}),
    "mistral-full": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-sliding": ("Qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1]}),
    "gemma": ("Gemma", {"num_key_value_heads": 1}),
    "gemma2": ("Gemma2", {
        "sliding_window": 20, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 24}),
    "gemma3_text": ("Gemma3Text", {
        "sliding_window": 20, "query_pre_attn_scalar": 24, "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "phi3-partial": ("Phi3", {"rope_parameters": {**_ROPE, "rope_type": "default", "partial_rotary_factor": 0.5}}),
    "phi3-long": ("Phi3", {
        "original_max_position_embeddings": 128,
        "rope_parameters": {**_ROPE, "rope_type": "longrope", "partial_rotary_factor": 0.5, **_LONG}}),
    "olmo2": ("Olmo2", {}),
    "olmo2-one-key": ("Olmo2", {"num_key_value_heads": 1, "attention_bias": True}),
    "olmo3": ("Olmo3", {"sliding_window": 20, "num_hidden_layers": 4, "rope_parameters": {
        "sliding_attention": {**_ROPE, "rope_type": "default"},
        "full_attention": {"rope_theta": 5000.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}}}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", {
        **_MIXTURE, "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "qwen3_moe-shares": ("Qwen3Moe", {**_MIXTURE, "norm_topk_prob": False, "decoder_sparse_step": 2, "num_experts_per_tok": 1}),
    "olmoe": ("Olmoe", {"num_experts": 5, "num_experts_per_tok": 3}),
    "granite": ("Granite", {
        "embedding_multiplier": 3.0, "attention_multiplier": 0.11, "residual_multiplier": 0.6, "logits_scaling": 2.5}),
}  # fmt: skip


def build_model(name: str, seed: int = 0, **changed: Any) -> Any:
    """The model `name`, its weights random, its norms near one, its biases not zero. changed: fields of its config."""
    kind, values = MODELS[name]
    values = {**_BASE, **values, **changed}
    if kind in ("Phi3", "Qwen2", "Granite", "SmolLM3", "Olmoe"):  # heads are hidden / heads wide there
        values["hidden_size"] = values["num_attention_heads"] * values.pop("head_dim") // (2 if kind == "Phi3" else 1)
    architecture = {"Gemma3Text": "Gemma3"}.get(kind, kind) + "ForCausalLM"
    config = getattr(transformers, f"{kind}Config")(architectures=[architecture], **values)
    model = getattr(transformers, architecture)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            if param.ndim > 1:
                param.copy_(noise * param.shape[1] ** -0.5 if "embed" not in key else noise)
            else:
                param.add_(noise * 0.1)
    return model.float().eval()


def save_model(name: str, folder: Path) -> None:
    """Write it as a Hugging Face folder with a tokenizer."""
    build_model(name).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def tokens(count: int, seed: int = 0, vocabulary: int = VOCAB) -> list[int]:
    """Random token ids."""
    return torch.randint(3, vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def reference(model: Any, ids: list[int]) -> Tensor:
    """The logits [n, vocabulary] of transformers."""
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float()


def apart(found: Tensor, right: Tensor) -> float:
    """|found - right| / |right| over all logits."""
    return float((found - right).norm() / right.norm())


def worst(found: Tensor, right: Tensor) -> float:
    """The same for the worst token."""
    return float(((found - right).norm(dim=-1) / right.norm(dim=-1)).max())
