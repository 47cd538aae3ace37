"""Tiny float64 models of every family that lowbit has facts about, and of what their configs can vary."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from transformers import PretrainedConfig

from lowbit.interchange.opening import open_source
from lowbit.interchange.source import Source
from tiny import TINY, VOCAB


def _like(name: str, **changes: object) -> Callable[[], PretrainedConfig]:
    def build() -> PretrainedConfig:
        config = TINY[name]()
        values = {**config.to_dict(), **changes}
        return type(config).from_dict(values)

    return build


_ROPE = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    **{n: TINY[n] for n in ("llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi", "gpt2",
                            "gpt-neox", "opt", "t5", "mixtral", "qwen3-moe")},
    "qwen3-moe-mixed": _like("qwen3-moe", mlp_only_layers=[0]),
    "llama-biases": _like("llama", attention_bias=True, mlp_bias=True),
    "qwen2-untied": _like("qwen2", tie_word_embeddings=False),
    "gemma": lambda: transformers.GemmaConfig(architectures=["GemmaForCausalLM"], head_dim=8, **_ROPE),
    "gemma-wide-heads": lambda: transformers.GemmaConfig(
        architectures=["GemmaForCausalLM"], head_dim=16, **{**_ROPE, "num_key_value_heads": 1}
    ),
    "phi3": lambda: transformers.Phi3Config(architectures=["Phi3ForCausalLM"], **_ROPE),
    "smollm3": lambda: transformers.SmolLM3Config(architectures=["SmolLM3ForCausalLM"], **_ROPE),
    "granite": lambda: transformers.GraniteConfig(
        architectures=["GraniteForCausalLM"], embedding_multiplier=3.0, attention_multiplier=0.4, residual_multiplier=0.6,
        logits_scaling=2.5, **_ROPE,
    ),
    "olmoe": lambda: transformers.OlmoeConfig(
        architectures=["OlmoeForCausalLM"], num_experts=4, num_experts_per_tok=2, **_ROPE
    ),
    "olmo2": lambda: transformers.Olmo2Config(architectures=["Olmo2ForCausalLM"], **_ROPE),
    "olmo3": lambda: transformers.Olmo3Config(architectures=["Olmo3ForCausalLM"], **_ROPE),
    "phi-relu": _like("phi", hidden_act="relu", qk_layernorm=True),
    "gpt2-relu": _like("gpt2", activation_function="relu"),
    "gpt-neox-sequential": _like("gpt-neox", use_parallel_residual=False, tie_word_embeddings=True),
    "gpt-neox-no-bias": _like("gpt-neox", attention_bias=False),
    "opt-gelu": _like("opt", activation_function="gelu"),
    "opt-projected": _like("opt", word_embed_proj_dim=16),
    "t5-gated": _like("t5", feed_forward_proj="gated-gelu"),
    "t5-untied-scale": _like("t5", tie_word_embeddings=False),
}  # fmt: skip


def random_source(config: PretrainedConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> Source:
    """A model of `config` with every tensor random: norms and biases too, so that no factor is one and no term zero."""
    torch.manual_seed(seed)
    model = getattr(transformers, config.architectures[0])(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator, dtype=torch.float64) * 0.2 + 0.05)
    return open_source(model.eval())


def family_source(name: str, seed: int = 0) -> Source:
    """The tiny float64 model of a family."""
    return random_source(FAMILIES[name](), seed)
