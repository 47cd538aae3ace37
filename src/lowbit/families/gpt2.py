"""GPT-2: weights [in, out], learned positions, one stacked projection of queries, keys and values."""

from __future__ import annotations

from lowbit.families.config_facts import ConfigFacts
from lowbit.families.family import Between, Family, Gguf, Graph

_BLOCK = "transformer.h.{i}."
FAMILY = Family(
    "gpt2",
    ConfigFacts(frozenset({
        "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "layer_norm_epsilon", "tie_word_embeddings",
    })),
    norm="layer",
    graph=Graph(
        norms={
            f"{_BLOCK}ln_1": (f"{_BLOCK}attn.c_attn",),
            f"{_BLOCK}ln_2": (f"{_BLOCK}mlp.c_fc",),
            "transformer.ln_f": ("lm_head",),
        },
        between=(
            Between(f"{_BLOCK}attn.c_attn", f"{_BLOCK}attn.c_proj", "stacked"),
            Between(f"{_BLOCK}mlp.c_fc", f"{_BLOCK}mlp.c_proj", relu="activation_function"),
        ),
        writers=("transformer.wte", "transformer.wpe", f"{_BLOCK}attn.c_proj", f"{_BLOCK}mlp.c_proj"),
    ),
    gguf=Gguf(
        "gpt2",
        "GPT2LMHeadModel",
        head_size=False,
        fixed={
            "activation_function": ("gelu_pytorch_tanh", "gelu_new", "gelu"),  # ggml has one GELU
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
        },
        biases=None,
    ),
)  # fmt: skip
