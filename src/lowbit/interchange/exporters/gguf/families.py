"""What llama.cpp wants to know of each family: the name of its architecture, its metadata, and how it turns tensors.

A family is one entry of `FAMILIES`. Names of tensors come from the `gguf` package's own map. Facts: llama.cpp's
`conversion/*.py`, which write what `src/models/*.cpp` read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PretrainedConfig

Describe = Callable[["GGUFWriter", Any], None]


@dataclass(frozen=True)
class Family:
    """An architecture of llama.cpp and the classes of transformers that are it.

    describe     adds metadata beyond what all decoders have
    norm         which norms: `rms`, or `layer` with mean and bias
    interleaved  projections whose rows go in pairs (i, i + d/2) of each head, as llama.cpp rotates them
    shifted      norms are stored as 1 + w
    tied         the head is always the embedding
    head_size    the width of a head is written, because it need not be hidden size / heads
    partial      only a share of a head is rotated
    refuses      (config) -> why such a model is not what llama.cpp computes, or None
    reader       who reads it back: transformers' own reader (`whole`), the same with our config where that reader does
                 not know all of it (`weights`), or ours alone (`own`)
    """

    architecture: str
    classes: tuple[str, ...]
    norm: Literal["rms", "layer"] = "rms"
    describe: Describe = lambda writer, config: None
    interleaved: tuple[str, ...] = ()
    shifted: bool = False
    tied: bool = False
    head_size: bool = True
    partial: bool = False
    refuses: Callable[[Any], str | None] = lambda config: None
    reader: Literal["whole", "weights", "own"] = "whole"


def _gemma2(writer: GGUFWriter, config: Any) -> None:
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def _gemma3(writer: GGUFWriter, config: Any) -> None:
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base_swa(rope_of(config, "sliding_attention")["rope_theta"])


def _llama(writer: GGUFWriter, config: Any) -> None:
    writer.add_vocab_size(config.vocab_size)


def _phi3(writer: GGUFWriter, config: Any) -> None:
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    writer.add_sliding_window(config.sliding_window or 0)


def _mixtral(writer: GGUFWriter, config: Any) -> None:
    _llama(writer, config)
    _experts(writer, config.num_local_experts, config)


def _experts(writer: GGUFWriter, count: int, config: Any) -> None:
    writer.add_expert_count(count)
    writer.add_expert_used_count(config.num_experts_per_tok)


def _qwen_moe(writer: GGUFWriter, config: Any) -> None:
    _experts(writer, config.num_experts, config)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    shared = getattr(config, "shared_expert_intermediate_size", None)
    if shared:
        writer.add_expert_shared_feed_forward_length(shared)


def _refuses_qwen_moe(config: Any) -> str | None:
    renormalized = config.model_type == "qwen3_moe"
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        return "llama.cpp has experts in every layer of such a model, and this config has not"
    return _shares(config, renormalized)


def _refuses_olmoe(config: Any) -> str | None:
    if config.clip_qkv is not None:
        return "llama.cpp's olmoe clips no queries, keys and values, and this config does"
    if config.num_key_value_heads != config.num_attention_heads:
        return "llama.cpp's olmoe has as many heads of keys as of queries, and this config fewer"
    return _shares(config, False)


def _shares(config: Any, renormalized: bool) -> str | None:
    """Whether the shares of the chosen experts are brought to a sum of 1, which is in llama.cpp's code."""
    if bool(config.norm_topk_prob) != renormalized:
        return f"llama.cpp takes norm_topk_prob as {str(renormalized).lower()}, and this config has the other"
    return None


def _refuses_gemma2(config: Any) -> str | None:
    if not (config.attn_logit_softcapping and config.final_logit_softcapping):
        return "llama.cpp's gemma2 always caps logits, and this config does not"
    if config.query_pre_attn_scalar != config.head_dim and config.num_hidden_layers != 46:
        return f"llama.cpp scales its attention by the head size, this config by {config.query_pre_attn_scalar}"
    return _every(config, 2)


def _refuses_gemma3(config: Any) -> str | None:
    if config.query_pre_attn_scalar != config.head_dim and config.num_hidden_layers != 62:
        return f"llama.cpp scales its attention by the head size, this config by {config.query_pre_attn_scalar}"
    if getattr(config, "attn_logit_softcapping", None):
        return "llama.cpp's gemma3 has no cap on attention logits, and this config has"
    return _every(config, 6)


def _every(config: Any, period: int) -> str | None:
    """llama.cpp has the pattern of windows in its code: every `period`-th layer sees everything."""
    for i, kind in enumerate(config.layer_types):
        wanted = "full_attention" if (i + 1) % period == 0 else "sliding_attention"
        if kind != wanted:
            return f"llama.cpp takes layer {i} as {wanted}, and this config has {kind}"
    return None


def _refuses_gpt2(config: Any) -> str | None:
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights or config.add_cross_attention:
        return "llama.cpp's gpt2 scales attention by the head size alone and has no cross attention"
    return None


def _refuses_phi(config: Any) -> str | None:
    return "llama.cpp's phi2 has no norms of queries and keys" if config.qk_layernorm else None


FAMILIES: tuple[Family, ...] = (
    Family(
        "llama", ("LlamaForCausalLM", "MistralForCausalLM"), describe=_llama, interleaved=("q_proj", "k_proj"),
    ),
    Family(
        "llama", ("MixtralForCausalLM",), describe=_mixtral, interleaved=("q_proj", "k_proj"), reader="own",
    ),
    Family("qwen2", ("Qwen2ForCausalLM",), head_size=False),
    Family(
        "qwen2moe", ("Qwen2MoeForCausalLM",), describe=_qwen_moe, head_size=False, refuses=_refuses_qwen_moe,
        reader="weights",
    ),
    Family("qwen3moe", ("Qwen3MoeForCausalLM",), describe=_qwen_moe, refuses=_refuses_qwen_moe, reader="weights"),
    Family(
        "olmoe", ("OlmoeForCausalLM",), describe=lambda w, c: _experts(w, c.num_experts, c), head_size=False,
        refuses=_refuses_olmoe, reader="own",
    ),
    Family("qwen3", ("Qwen3ForCausalLM",), reader="weights"),
    Family("gemma", ("GemmaForCausalLM",), shifted=True, tied=True, reader="own"),
    Family(
        "gemma2", ("Gemma2ForCausalLM",), describe=_gemma2, shifted=True, tied=True, refuses=_refuses_gemma2,
        reader="weights",
    ),
    Family(
        "gemma3", ("Gemma3ForCausalLM",), describe=_gemma3, shifted=True, tied=True, refuses=_refuses_gemma3,
        reader="weights",
    ),
    Family(
        "phi2", ("PhiForCausalLM",), norm="layer", head_size=False, partial=True, refuses=_refuses_phi, reader="own",
    ),
    Family("phi3", ("Phi3ForCausalLM",), describe=_phi3, head_size=False, partial=True, reader="weights"),
    Family("gpt2", ("GPT2LMHeadModel",), norm="layer", head_size=False, refuses=_refuses_gpt2, reader="weights"),
)  # fmt: skip


def family_of(config: PretrainedConfig | None) -> Family | None:
    """The family of a config by its class name, or None."""
    names = tuple(config.architectures or ()) if config is not None else ()
    return next((f for f in FAMILIES if any(name in f.classes for name in names)), None)


def known_classes() -> str:
    """Every class that can be written, for messages."""
    return ", ".join(name for family in FAMILIES for name in family.classes)


def rope_of(config: Any, layers: str = "full_attention") -> dict[str, Any]:
    """The rotary settings of a config, of one kind of layers where these differ; empty where there are none."""
    found = getattr(config, "rope_parameters", None) or {}
    return dict(found.get(layers, found))


def refusal(family: Family, config: Any) -> str | None:
    """Why llama.cpp would compute another model than this config's, or None."""
    kind = rope_of(config).get("rope_type", "default")
    if kind not in ("default", "linear", "yarn", "llama3"):
        return f"positions of the kind {kind!r} are not written yet"
    activation = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
    wanted = {
        **dict.fromkeys(("llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "olmoe", "phi3"), ("silu",)),
    }.get(family.architecture, ("gelu_new", "gelu_pytorch_tanh", "gelu"))  # fmt: skip
    if family.architecture.startswith("gemma"):
        activation = getattr(config, "hidden_activation", None) or activation
    if activation not in wanted:
        return f"llama.cpp's {family.architecture} has the activation {wanted[0]}, and this config {activation}"
    return family.refuses(config)


def describe(family: Family, writer: GGUFWriter, whole: PretrainedConfig) -> None:
    """Add the metadata of the model to the file."""
    config: Any = whole.get_text_config()
    heads, hidden = config.num_attention_heads, config.hidden_size
    size = getattr(config, "head_dim", None) or hidden // heads
    writer.add_context_length(_context(config))
    writer.add_embedding_length(hidden)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or config.n_inner or 4 * hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    if family.norm == "rms":
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(_first(config, "layer_norm_epsilon", "layer_norm_eps"))
    if family.head_size:
        writer.add_key_length(size)
        writer.add_value_length(size)
    rope = rope_of(config)
    if rope:
        share = float(rope.get("partial_rotary_factor", 1.0)) if family.partial else 1.0
        writer.add_rope_dimension_count(int(share * size))
        writer.add_rope_freq_base(float(rope["rope_theta"]))
        _scaling(writer, rope)
    family.describe(writer, config)


_WINDOWED = ("mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")


def _context(config: Any) -> int:
    """The longest sequence that llama.cpp computes as transformers does: it has no window where the family has none."""
    longest = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    windowed = config.model_type in _WINDOWED and getattr(config, "use_sliding_window", True)
    return min(longest, int(window)) if window and windowed else longest


def _scaling(writer: GGUFWriter, rope: dict[str, Any]) -> None:
    from gguf import RopeScalingType

    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))


def rope_factors(config: Any) -> Tensor | None:
    """float32 [d / 2], what llama.cpp divides the frequencies of Llama 3.1 by (`rope_freqs.weight`); None for others.

    With wavelength l = 2 pi theta^(2i/d) and C the original context: 1 where l < C / high, `factor` where l > C / low,
    and in between 1 / ((1 - s) / factor + s), s = (C / l - low) / (high - low). Source: transformers'
    `_compute_llama3_parameters`.
    """
    rope = rope_of(config)
    if rope.get("rope_type") != "llama3":
        return None
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    low, high, factor = (float(rope[key]) for key in ("low_freq_factor", "high_freq_factor", "factor"))
    context = float(rope["original_max_position_embeddings"])
    power = torch.arange(0, size, 2, dtype=torch.float64) / size
    turns = context / (2 * math.pi * float(rope["rope_theta"]) ** power)  # C / l
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def _first(config: Any, *names: str) -> float:
    return float(next(value for name in names if (value := getattr(config, name, None)) is not None))
