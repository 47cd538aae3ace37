"""What becomes of each field of a config in a GGUF file: written, in llama.cpp's own code, or without influence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowbit.families.config_facts import DECODER, LLAMA, ROPE, WINDOWS, ConfigFacts, listed

_SILU: Mapping[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish")}
_TANH = (
    "gelu_pytorch_tanh",
    "gelu_new",
    "gelu",
)  # ggml has one GELU, by the hyperbolic tangent; `gelu` is within 1e-3 of it
_BOTH = {"use_bidirectional_attention": (False, None)}
_LLAMA = LLAMA - {"hidden_act"}
# Windows: of families that llama.cpp has none for, the context that is written ends where the window begins to matter.
_WINDOW = WINDOWS
_BIASES = frozenset({"attention_bias", "mlp_bias"})  # of tensors, each of which has a place or is refused
_GEMMA = _LLAMA | {"attention_bias"}
_CAPS = frozenset(
    {"query_pre_attn_scalar", "final_logit_softcapping"}
)  # held against llama.cpp's rules in `families.py`
_EXPERTS = frozenset({"num_experts_per_tok", "num_experts", "num_local_experts", "norm_topk_prob"})
_GELU = {"hidden_activation": _TANH}

FACTS: Mapping[str, ConfigFacts] = {
    "llama": listed(_LLAMA | _BIASES, **_SILU),
    "mistral": listed(_LLAMA | {"sliding_window"}, **_SILU),
    "mixtral": listed(_LLAMA | _EXPERTS | {"sliding_window"}, **_SILU),
    "qwen2": listed(_LLAMA | _WINDOW, **_SILU),
    "qwen3": listed(_LLAMA | _WINDOW | {"attention_bias"}, **_SILU),
    "qwen2_moe": listed(
        _LLAMA | _WINDOW | _EXPERTS | {"moe_intermediate_size", "shared_expert_intermediate_size", "qkv_bias"},
        mlp_only_layers=([], None), decoder_sparse_step=(1,), **_SILU,
    ),
    "qwen3_moe": listed(
        _LLAMA | _WINDOW | _EXPERTS | {"moe_intermediate_size", "attention_bias"},
        mlp_only_layers=([], None), decoder_sparse_step=(1,), **_SILU,
    ),
    "olmoe": listed(_LLAMA | _EXPERTS | {"attention_bias"}, clip_qkv=(None,), **_SILU),
    "gemma": ConfigFacts(_GEMMA, {"hidden_act": _TANH, **_BOTH}, frozenset({"hidden_activation"})),
    "gemma2": listed(_GEMMA | _CAPS | {"attn_logit_softcapping", "sliding_window", "layer_types"}, **_GELU, **_BOTH),
    "gemma3_text": ConfigFacts(
        _GEMMA | _CAPS | {"sliding_window", "layer_types"}, {**_GELU, **_BOTH}, frozenset({"attn_logit_softcapping"})
    ),
    "phi": listed(DECODER | ROPE | {"layer_norm_eps"}, qk_layernorm=(False,), hidden_act=_TANH),
    "phi3": listed(_LLAMA | {"sliding_window"}, **_SILU),
    "gpt2": listed(
        {"vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "layer_norm_epsilon", "tie_word_embeddings"},
        activation_function=_TANH, scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,),
    ),
}  # fmt: skip
