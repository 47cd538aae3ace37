"""Llama, and Mistral, which is Llama with a sliding window."""

from __future__ import annotations

from dataclasses import replace

from lowbit.families.config_facts import BIASES, LLAMA, ConfigFacts
from lowbit.families.family import Decoder, Family, Gguf

SILU = {"hidden_act": ("silu", "swish")}
QKV_BIASES = ("attn_q", "attn_k", "attn_v")
GGUF = Gguf(
    "llama",
    "LlamaForCausalLM",
    metadata=lambda config: {"vocab_size": config.vocab_size},
    interleaved=("q_proj", "k_proj"),
    scalings=("default", "linear", "yarn", "llama3"),
    fixed=SILU,
    biases=(*QKV_BIASES, "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
)

FAMILY = Family("llama", ConfigFacts(LLAMA | BIASES), decoder=Decoder(), gguf=GGUF)
MISTRAL = Family(
    "mistral",
    ConfigFacts(LLAMA | {"sliding_window"}),
    decoder=Decoder(given=("head_dim", "sliding_window")),
    gguf=replace(GGUF, model_class="MistralForCausalLM"),
)
