"""GPT-NeoX and Pythia. Whether its parts run side by side or not, each norm feeds the same linear."""

from __future__ import annotations

from lowbit.families.family import Between, Family, Graph

_LAYER = "gpt_neox.layers.{i}."
FAMILY = Family(
    "gpt_neox",
    norm="layer",
    graph=Graph(
        norms={
            f"{_LAYER}input_layernorm": (f"{_LAYER}attention.query_key_value",),
            f"{_LAYER}post_attention_layernorm": (f"{_LAYER}mlp.dense_h_to_4h",),
            "gpt_neox.final_layer_norm": ("lm_head",),
        },
        between=(
            Between(f"{_LAYER}attention.query_key_value", f"{_LAYER}attention.dense", "interleaved"),
            Between(f"{_LAYER}mlp.dense_h_to_4h", f"{_LAYER}mlp.dense_4h_to_h", relu="hidden_act"),
        ),
        writers=("gpt_neox.embed_in", f"{_LAYER}attention.dense", f"{_LAYER}mlp.dense_4h_to_h"),
    ),
)
