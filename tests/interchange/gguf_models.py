"""Tiny random models of every family that GGUF is written for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from tiny import _ROPE, TINY, tiny_tokenizer

_GEMMA: dict[str, Any] = {"head_dim": 8, **_ROPE}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def _made(name: str, architecture: str, **values: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(architectures=[architecture], **values)


FAMILY_MODELS: dict[str, Callable[[], Any]] = {
    **{name: TINY[name] for name in ("llama", "llama-tied", "mistral", "qwen2", "qwen3", "phi", "gpt2")},
    "llama-3.1": _made("LlamaConfig", "LlamaForCausalLM", rope_parameters=_LLAMA3, attention_bias=True, **_ROPE),
    "gemma": _made("GemmaConfig", "GemmaForCausalLM", **_GEMMA),
    "gemma2": _made("Gemma2Config", "Gemma2ForCausalLM", query_pre_attn_scalar=8, sliding_window=16, **_GEMMA),
    "gemma3": _made("Gemma3TextConfig", "Gemma3ForCausalLM", query_pre_attn_scalar=8, sliding_window=16, **_GEMMA),
    "olmo2": _made("Olmo2Config", "Olmo2ForCausalLM", **_ROPE),
    "phi3": _made("Phi3Config", "Phi3ForCausalLM", **_ROPE),
}


def faint_of(name: str) -> str:
    """A matrix of a family's model after which nothing brings it back to size, as a norm does (gemma3 has none such)."""
    return {
        "gpt2": "transformer.h.0.mlp.c_fc.weight",
        "phi": "model.layers.0.mlp.fc1.weight",
        "gemma2": "model.layers.0.self_attn.k_proj.weight",
    }.get(name, "model.layers.0.mlp.down_proj.weight")


def save_model(config: Any, folder: Path, spread: float = 0.1, faint: str = "") -> Any:
    """Save a model of `config` with weights from N(0, spread^2) and the tiny tokenizer, and return it.

    The matrix `faint` is a thousand times smaller, so that how it is rounded hardly shows."""
    torch.manual_seed(0)
    model = getattr(transformers, config.architectures[0])(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * spread * (1e-3 if name == faint else 1))
    model.eval().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model
