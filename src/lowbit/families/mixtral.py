"""Mixtral: Llama whose every MLP is a mixture of experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lowbit.families.config_facts import EXPERTS, LLAMA, ConfigFacts
from lowbit.families.family import LAYER, Decoder, Experts, Family
from lowbit.families.llama import GGUF

_PUBLISHED = f"{LAYER}block_sparse_moe."


def metadata(config: Any) -> dict[str, Any]:
    """How many experts a layer has, and a token takes."""
    return {"expert_count": config.num_local_experts, "expert_used_count": config.num_experts_per_tok}


FAMILY = Family(
    "mixtral",
    ConfigFacts(LLAMA | EXPERTS | {"sliding_window"}),
    decoder=Decoder(
        experts=Experts(
            router=(*Experts().router, f"{_PUBLISHED}gate"),
            apart=(f"{_PUBLISHED}experts.{{e}}.w1", f"{_PUBLISHED}experts.{{e}}.w3", f"{_PUBLISHED}experts.{{e}}.w2"),
            width="intermediate_size",
        ),
        given=("head_dim", "num_experts_per_tok", "num_local_experts", "sliding_window"),
    ),
    gguf=replace(
        GGUF,
        model_class="MixtralForCausalLM",
        metadata=lambda config: {"vocab_size": config.vocab_size, **metadata(config)},
        biases=(),
        reader="own",
    ),
)
