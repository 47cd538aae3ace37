"""Phi-3: Llama with stacked projections, of whose heads a share may turn."""

from __future__ import annotations

from lowbit.families.config_facts import LLAMA, ConfigFacts
from lowbit.families.family import LAYER, Decoder, Family, Gguf
from lowbit.families.llama import SILU

FAMILY = Family(
    "phi3",
    ConfigFacts(LLAMA | {"sliding_window"}),
    partial_rotary=True,
    decoder=Decoder(
        qkv=(f"{LAYER}self_attn.qkv_proj",),
        gate_up=(f"{LAYER}mlp.gate_up_proj",),
        given=("original_max_position_embeddings", "sliding_window"),
    ),
    gguf=Gguf(
        "phi3",
        "Phi3ForCausalLM",
        metadata=lambda config: {
            "rope_scaling_orig_ctx_len": config.original_max_position_embeddings,
            "sliding_window": config.sliding_window or 0,  # which llama.cpp reads and does not obey
        },
        head_size=False,
        fixed=SILU,
    ),
)
