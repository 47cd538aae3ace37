"""OLMo 2: norms behind each part and none before, norms of queries and keys over all heads; OLMo 3: windows too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lowbit.families.config_facts import LLAMA, ConfigFacts
from lowbit.families.family import HEAD_NORMS, LAYER, Decoder, Family, Gguf
from lowbit.families.llama import SILU

_DECODER = Decoder(
    norms={
        "attention_post_norm": f"{LAYER}post_attention_layernorm",
        "mlp_post_norm": f"{LAYER}post_feedforward_layernorm",
        **HEAD_NORMS,
    },
    norms_of_all_heads=True,
)


def _refuses(config: Any) -> str | None:
    heads, size = config.num_attention_heads, getattr(config, "head_dim", None)
    if size and size * heads != config.hidden_size:
        return f"llama.cpp's olmo2 has heads of hidden_size / num_attention_heads, and this config of {size}"
    return None


FAMILY = Family(
    "olmo2",
    ConfigFacts(LLAMA | {"attention_bias"}),
    decoder=_DECODER,
    gguf=Gguf(
        "olmo2", "Olmo2ForCausalLM", fixed={**SILU, "tie_word_embeddings": (False,)}, refuses=_refuses, reader="own"
    ),
)
OLMO3 = Family(
    "olmo3",
    ConfigFacts(LLAMA | {"attention_bias", "sliding_window", "layer_types"}),
    decoder=replace(_DECODER, given=("sliding_window", "layer_types")),
)
