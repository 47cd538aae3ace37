"""What the engine does with each field of the config of each family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lowbit.families.config_facts import LLAMA, WINDOWS, ConfigFacts, listed

_BIASES = frozenset({"attention_bias", "mlp_bias"})  # there where their tensors are
_GEMMA = {"use_bidirectional_attention": (False, None)}
_CAPS = frozenset({"hidden_activation", "query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping"})

FACTS: Mapping[str, ConfigFacts] = {
    "llama": listed(LLAMA | _BIASES),
    "mistral": listed(LLAMA | {"sliding_window"}),
    "qwen2": listed(LLAMA | WINDOWS),
    "qwen3": listed(LLAMA | WINDOWS | _BIASES),
    "smollm3": listed(LLAMA | WINDOWS | _BIASES | {"no_rope_layers"}),
    "granite": listed(
        LLAMA | _BIASES | {"embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"}
    ),
    "gemma": replace(listed(LLAMA | _BIASES, **_GEMMA), neutral=frozenset({"hidden_activation"})),
    "gemma2": listed(LLAMA | WINDOWS | _BIASES | _CAPS, **_GEMMA),
    "gemma3_text": replace(  # its attention has a cap in the config, and none in transformers' code
        listed(LLAMA | WINDOWS | _BIASES | _CAPS - {"attn_logit_softcapping"}, **_GEMMA),
        neutral=frozenset({"attn_logit_softcapping"}),
    ),
    "phi3": listed(LLAMA | {"sliding_window"}),
}
