"""Phi-1 to Phi-2: attention and MLP run side by side and share one LayerNorm."""

from __future__ import annotations

from lowbit.families.config_facts import DECODER, ROPE, ConfigFacts
from lowbit.families.family import LAYER, Between, Family, Gguf, Graph

FAMILY = Family(
    "phi",
    ConfigFacts(DECODER | ROPE | {"layer_norm_eps", "hidden_act", "qk_layernorm"}),
    norm="layer",
    partial_rotary=True,
    graph=Graph(
        norms={
            f"{LAYER}input_layernorm": (*(f"{LAYER}self_attn.{x}_proj" for x in "qkv"), f"{LAYER}mlp.fc1"),
            "model.final_layernorm": ("lm_head",),
        },
        between=(
            Between(f"{LAYER}self_attn.v_proj", f"{LAYER}self_attn.dense", "values"),
            Between(f"{LAYER}mlp.fc1", f"{LAYER}mlp.fc2", relu="hidden_act"),
        ),
        writers=("model.embed_tokens", f"{LAYER}self_attn.dense", f"{LAYER}mlp.fc2"),
        inside=(f"{LAYER}self_attn.q_layernorm", f"{LAYER}self_attn.k_layernorm"),
    ),
    gguf=Gguf(
        "phi2",
        "PhiForCausalLM",
        head_size=False,
        fixed={"qk_layernorm": (False,), "hidden_act": ("gelu_pytorch_tanh", "gelu_new", "gelu")},  # ggml has one GELU
        biases=None,
        reader="own",
    ),
)
