"""What is known of each family of models: about ten lines of facts each, found by `config.model_type`.

Names are those of modules in transformers 5, without `.weight`; `{i}` is the number of a layer, `*` matches
within one part of a name, of `a|b` the first that the model (or the layer) has counts, and `a?` may be absent. A wrong fact does not pass the
tests, which compare float64 logits of a tiny random model before and after every transform.

To add a family: write its `Family` here and its tiny config in the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Layout = Literal["same", "values", "stacked", "interleaved", "second-half"]


@dataclass(frozen=True)
class Between:
    """Channel c of the consumer's input is made by one row of the producer, with nothing but scaling in between.

    layout   which row: see `lowbit.transforms.layouts`
    relu     the config entry that must say "relu", where an activation function stands in between: of the usual
             ones only ReLU has f(x / s) = f(x) / s for every s > 0
    """

    producer: str
    consumer: str
    layout: Layout = "same"
    relu: str | None = None


@dataclass(frozen=True)
class Family:
    """Facts of a family.

    norms       norm -> the linears that read its output, and nothing else does
    between     producer -> consumer pairs through which a scale may pass
    writers     what adds to the residual stream: embeddings (by rows) and linears (by their outputs)
    kind        "rms": x / rms(x) * weight; "layer": LayerNorm, which subtracts the mean and may add a bias
    plus_one    the norm multiplies by 1 + weight
    post_norms  norms between a writer and the residual stream
    inside      tensors that no transform needs to know: norms of queries and keys, attention biases
    refuses     config -> why a model of this type is not what the facts say, or None
    """

    types: tuple[str, ...]
    norms: Mapping[str, tuple[str, ...]]
    between: tuple[Between, ...]
    writers: tuple[str, ...]
    kind: Literal["rms", "layer"] = "rms"
    plus_one: bool = False
    post_norms: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    refuses: Callable[[Any], str | None] = lambda config: None


def _opt(config: Any) -> str | None:
    if not config.do_layer_norm_before:
        return "with do_layer_norm_before=False its norms stand on the residual stream itself, not before the linears"
    return None


_LAYER = "model.layers.{i}."
_ATTENTION = tuple(f"{_LAYER}self_attn.{x}_proj" for x in "qkv")
_MLP = (f"{_LAYER}mlp.gate_proj", f"{_LAYER}mlp.up_proj")
_VALUES = Between(f"{_LAYER}self_attn.v_proj", f"{_LAYER}self_attn.o_proj", "values")
_UP = Between(f"{_LAYER}mlp.up_proj", f"{_LAYER}mlp.down_proj")

LLAMA = Family(
    types=("llama", "mistral", "qwen2", "qwen3", "smollm3"),
    norms={
        f"{_LAYER}input_layernorm": _ATTENTION,
        f"{_LAYER}post_attention_layernorm": _MLP,
        "model.norm": ("lm_head",),
    },
    between=(_VALUES, _UP),
    writers=("model.embed_tokens", f"{_LAYER}self_attn.o_proj", f"{_LAYER}mlp.down_proj"),
    inside=(f"{_LAYER}self_attn.q_norm", f"{_LAYER}self_attn.k_norm"),
)
# The embedding is also multiplied by sqrt(hidden size): a scalar, which every transform here commutes with.
GEMMA = replace(LLAMA, types=("gemma",), plus_one=True, inside=())
GEMMA2 = replace(
    GEMMA,
    types=("gemma2", "gemma3_text"),
    norms={
        f"{_LAYER}input_layernorm": _ATTENTION,
        f"{_LAYER}pre_feedforward_layernorm": _MLP,
        "model.norm": ("lm_head",),
    },
    post_norms=(f"{_LAYER}post_attention_layernorm", f"{_LAYER}post_feedforward_layernorm"),
    inside=LLAMA.inside,
)
PHI3 = replace(
    LLAMA,
    types=("phi3",),
    norms={
        f"{_LAYER}input_layernorm": (f"{_LAYER}self_attn.qkv_proj",),
        f"{_LAYER}post_attention_layernorm": (f"{_LAYER}mlp.gate_up_proj",),
        "model.norm": ("lm_head",),
    },
    between=(
        Between(f"{_LAYER}self_attn.qkv_proj", f"{_LAYER}self_attn.o_proj", "stacked"),
        Between(f"{_LAYER}mlp.gate_up_proj", f"{_LAYER}mlp.down_proj", "second-half"),
    ),
    inside=(),
)
# A scale cannot pass inside an expert: every expert would need its own. The router reads the norm as experts do.
MOE = replace(
    LLAMA,
    types=("mixtral", "qwen3_moe"),
    norms={
        f"{_LAYER}input_layernorm": _ATTENTION,
        f"{_LAYER}post_attention_layernorm": (
            f"{_LAYER}mlp.gate|{_LAYER}mlp.gate_proj",
            f"{_LAYER}mlp.experts.gate_up_proj|{_LAYER}mlp.up_proj",
        ),
        "model.norm": ("lm_head",),
    },
    between=(_VALUES, _UP),
    writers=(*LLAMA.writers[:2], f"{_LAYER}mlp.experts.down_proj", f"{_LAYER}mlp.down_proj?"),
)
PHI = Family(
    types=("phi",),
    norms={  # attention and MLP run side by side and share one norm
        f"{_LAYER}input_layernorm": (*_ATTENTION, f"{_LAYER}mlp.fc1"),
        "model.final_layernorm": ("lm_head",),
    },
    between=(
        Between(f"{_LAYER}self_attn.v_proj", f"{_LAYER}self_attn.dense", "values"),
        Between(f"{_LAYER}mlp.fc1", f"{_LAYER}mlp.fc2", relu="hidden_act"),
    ),
    writers=("model.embed_tokens", f"{_LAYER}self_attn.dense", f"{_LAYER}mlp.fc2"),
    kind="layer",
    inside=(f"{_LAYER}self_attn.q_layernorm", f"{_LAYER}self_attn.k_layernorm"),
)
_BLOCK = "transformer.h.{i}."
GPT2 = Family(
    types=("gpt2",),
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
    kind="layer",
)
_DECODER = "model.decoder.layers.{i}."
OPT = Family(
    types=("opt",),
    norms={
        f"{_DECODER}self_attn_layer_norm": tuple(f"{_DECODER}self_attn.{x}_proj" for x in "qkv"),
        f"{_DECODER}final_layer_norm": (f"{_DECODER}fc1",),
        "model.decoder.final_layer_norm": ("model.decoder.project_out|lm_head",),
    },
    between=(
        Between(f"{_DECODER}self_attn.v_proj", f"{_DECODER}self_attn.out_proj", "values"),
        Between(f"{_DECODER}fc1", f"{_DECODER}fc2", relu="activation_function"),
    ),
    writers=(
        "model.decoder.project_in|model.decoder.embed_tokens", "model.decoder.embed_positions",
        f"{_DECODER}self_attn.out_proj", f"{_DECODER}fc2",
    ),
    kind="layer",
    inside=("model.decoder.embed_tokens", "lm_head"),  # off the stream where project_in and project_out stand between
    refuses=_opt,
)  # fmt: skip
_NEOX = "gpt_neox.layers.{i}."
GPT_NEOX = Family(
    types=("gpt_neox",),  # parallel or not, each norm feeds the same linear
    norms={
        f"{_NEOX}input_layernorm": (f"{_NEOX}attention.query_key_value",),
        f"{_NEOX}post_attention_layernorm": (f"{_NEOX}mlp.dense_h_to_4h",),
        "gpt_neox.final_layer_norm": ("lm_head",),
    },
    between=(
        Between(f"{_NEOX}attention.query_key_value", f"{_NEOX}attention.dense", "interleaved"),
        Between(f"{_NEOX}mlp.dense_h_to_4h", f"{_NEOX}mlp.dense_4h_to_h", relu="hidden_act"),
    ),
    writers=("gpt_neox.embed_in", f"{_NEOX}attention.dense", f"{_NEOX}mlp.dense_4h_to_h"),
    kind="layer",
)
_ENC, _DEC = "encoder.block.{i}.layer.", "decoder.block.{i}.layer."
T5 = Family(
    types=("t5",),
    norms={
        **{f"{b}0.layer_norm": tuple(f"{b}0.SelfAttention.{x}" for x in "qkv") for b in (_ENC, _DEC)},
        f"{_DEC}1.layer_norm": (f"{_DEC}1.EncDecAttention.q",),
        f"{_ENC}1.layer_norm": (f"{_ENC}1.DenseReluDense.wi*",),
        f"{_DEC}2.layer_norm": (f"{_DEC}2.DenseReluDense.wi*",),
        # Every layer of the decoder reads the encoder's output.
        "encoder.final_layer_norm": (f"{_DEC}1.EncDecAttention.k", f"{_DEC}1.EncDecAttention.v"),
        "decoder.final_layer_norm": ("lm_head",),
    },
    between=(
        *(Between(f"{a}.v", f"{a}.o", "values")
          for a in (f"{_ENC}0.SelfAttention", f"{_DEC}0.SelfAttention", f"{_DEC}1.EncDecAttention")),
        *(Between(f"{f}.wi", f"{f}.wo", relu="dense_act_fn")
          for f in (f"{_ENC}1.DenseReluDense", f"{_DEC}2.DenseReluDense")),
        *(Between(f"{f}.wi_1", f"{f}.wo") for f in (f"{_ENC}1.DenseReluDense", f"{_DEC}2.DenseReluDense")),
    ),
    writers=(
        "shared", f"{_ENC}0.SelfAttention.o", f"{_DEC}0.SelfAttention.o", f"{_DEC}1.EncDecAttention.o",
        f"{_ENC}1.DenseReluDense.wo", f"{_DEC}2.DenseReluDense.wo",
    ),
    inside=(f"{_ENC}0.SelfAttention.relative_attention_bias", f"{_DEC}0.SelfAttention.relative_attention_bias"),
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    model_type: family
    for family in (LLAMA, GEMMA, GEMMA2, PHI3, MOE, PHI, GPT2, OPT, GPT_NEOX, T5)
    for model_type in family.types
}
