"""Qwen3: Llama with norms of queries and keys."""

from __future__ import annotations

from lowbit.families.config_facts import BIASES, LLAMA, WINDOWS, ConfigFacts
from lowbit.families.family import HEAD_NORMS, PRE_NORMS, Decoder, Family, Gguf
from lowbit.families.llama import SILU

FAMILY = Family(
    "qwen3",
    ConfigFacts(LLAMA | WINDOWS | BIASES),
    decoder=Decoder(norms={**PRE_NORMS, **HEAD_NORMS}, given=("head_dim", "layer_types")),
    gguf=Gguf("qwen3", "Qwen3ForCausalLM", fixed=SILU),
)
