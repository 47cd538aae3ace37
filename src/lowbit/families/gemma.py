"""Gemma, its norms 1 + weight; Gemma 2, with norms behind each part and soft caps; the text part of Gemma 3."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lowbit.families.config_facts import BIASES, LLAMA, WINDOWS, ConfigFacts
from lowbit.families.family import HEAD_NORMS, LAYER, PRE_NORMS, Config, Decoder, Family, Gguf

_TANH = (
    "gelu_pytorch_tanh",
    "gelu_new",
    "gelu",
)  # ggml has one GELU, by the hyperbolic tangent; `gelu` is within 1e-3 of it
_CAUSAL = {"use_bidirectional_attention": (False, None)}
_CAPS = frozenset({"hidden_activation", "query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping"})
_GIVEN = ("head_dim", "layer_types", "sliding_window", *sorted(_CAPS - {"hidden_activation"}))
_NORMS = {
    **PRE_NORMS,
    "mlp_norm": f"{LAYER}pre_feedforward_layernorm",
    "attention_post_norm": f"{LAYER}post_attention_layernorm",
    "mlp_post_norm": f"{LAYER}post_feedforward_layernorm",
}


# The embedding is multiplied by a scalar, which every transform commutes with.
def _gemma(config: Config) -> dict[str, Any]:
    return {"embedding_scale": math.sqrt(config["hidden_size"])}


def _gemma3(config: Config) -> dict[str, Any]:
    return {
        **_gemma(config),
        "attention_scale": config["query_pre_attn_scalar"] ** -0.5,
        "logit_soft_cap": config.get("final_logit_softcapping") or 0.0,
    }


def _gemma2(config: Config) -> dict[str, Any]:
    return {**_gemma3(config), "attention_soft_cap": config.get("attn_logit_softcapping") or 0.0}


def _gemma2_metadata(config: Any) -> dict[str, Any]:
    return {
        name: getattr(config, name) for name in ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window")
    }


def _gemma3_metadata(config: Any) -> dict[str, Any]:
    cap, rope = config.final_logit_softcapping, config.rope_parameters
    return {
        **({"final_logit_softcapping": cap} if cap else {}),
        "sliding_window": config.sliding_window,
        "rope_freq_base_swa": rope.get("sliding_attention", rope)["rope_theta"],
    }


def _refuses(period: int, large: int, capped: bool) -> Callable[[Any], str | None]:
    """llama.cpp has in its code that every `period`-th layer sees everything, and how the model of `large` layers scales."""

    def refuses(config: Any) -> str | None:
        if capped and not (config.attn_logit_softcapping and config.final_logit_softcapping):
            return "llama.cpp's gemma2 always caps logits, and this config does not"
        if config.query_pre_attn_scalar != config.head_dim and config.num_hidden_layers != large:
            return f"llama.cpp scales its attention by the head size, this config by {config.query_pre_attn_scalar}"
        for i, kind in enumerate(config.layer_types):
            wanted = "full_attention" if (i + 1) % period == 0 else "sliding_attention"
            if kind != wanted:
                return f"llama.cpp takes layer {i} as {wanted}, and this config has {kind}"
        return None

    return refuses


FAMILY = Family(
    "gemma",
    ConfigFacts(LLAMA | BIASES, _CAUSAL, neutral=frozenset({"hidden_activation"})),
    plus_one=True,
    decoder=Decoder(values=_gemma, given=("head_dim",)),
    gguf=Gguf("gemma", "GemmaForCausalLM", tied=True, fixed={"hidden_act": _TANH}, reader="own"),
)
GEMMA2 = Family(
    "gemma2",
    ConfigFacts(LLAMA | WINDOWS | BIASES | _CAPS, _CAUSAL),
    plus_one=True,
    decoder=Decoder(norms=_NORMS, values=_gemma2, given=_GIVEN),
    gguf=Gguf(
        "gemma2",
        "Gemma2ForCausalLM",
        metadata=_gemma2_metadata,
        tied=True,
        windows=True,
        fixed={"hidden_activation": _TANH},
        refuses=_refuses(2, 46, capped=True),
    ),
)
_UNUSED = frozenset({"attn_logit_softcapping"})  # it is in the config, and not in transformers' code
assert GEMMA2.gguf is not None
GEMMA3 = Family(
    "gemma3_text",
    ConfigFacts(LLAMA | WINDOWS | BIASES | _CAPS - _UNUSED, _CAUSAL, neutral=_UNUSED),
    plus_one=True,
    decoder=Decoder(norms={**_NORMS, **HEAD_NORMS}, values=_gemma3, given=_GIVEN),
    gguf=replace(
        GEMMA2.gguf,
        architecture="gemma3",
        model_class="Gemma3ForCausalLM",
        metadata=_gemma3_metadata,
        refuses=_refuses(6, 62, capped=False),
    ),
)
