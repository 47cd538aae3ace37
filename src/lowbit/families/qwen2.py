"""Qwen2: Llama with biases of queries, keys and values."""

from __future__ import annotations

from lowbit.families.config_facts import LLAMA, WINDOWS, ConfigFacts
from lowbit.families.family import Decoder, Family, Gguf
from lowbit.families.llama import QKV_BIASES, SILU

FAMILY = Family(
    "qwen2",
    ConfigFacts(LLAMA | WINDOWS),
    decoder=Decoder(given=("layer_types",)),
    gguf=Gguf("qwen2", "Qwen2ForCausalLM", head_size=False, fixed=SILU, biases=QKV_BIASES),
)
