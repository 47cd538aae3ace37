"""Mixtral: Llama whose every MLP is a mixture of experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lowbit.families.config_facts import EXPERTS, LLAMA, ConfigFacts
from lowbit.families.family import LAYER, Decoder, Family
from lowbit.families.llama import GGUF

# A scale cannot pass inside an expert: every expert would need its own. The router reads the norm as experts do.
_PLAIN = Decoder().graph
GRAPH = replace(
    _PLAIN,
    norms={
        **_PLAIN.norms,
        f"{LAYER}post_attention_layernorm": (
            f"{LAYER}mlp.gate|{LAYER}mlp.gate_proj",
            f"{LAYER}mlp.experts.gate_up_proj|{LAYER}mlp.up_proj",
        ),
    },
    writers=(*_PLAIN.writers[:2], f"{LAYER}mlp.experts.down_proj", f"{LAYER}mlp.down_proj?"),
)


def _metadata(config: Any) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
    }


FAMILY = Family(
    "mixtral",
    ConfigFacts(LLAMA | EXPERTS | {"sliding_window"}),
    graph=GRAPH,
    gguf=replace(GGUF, model_class="MixtralForCausalLM", metadata=_metadata, biases=(), reader="own"),
)
