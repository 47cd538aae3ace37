"""What llama.cpp wants to know of each family: the name of its architecture, its metadata, and how it turns tensors.

A family is one entry of `FAMILIES`. Names of tensors come from the `gguf` package's own map. Facts: llama.cpp's
`conversion/*.py`, which write what `src/models/*.cpp` read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lowbit.interchange.exporters.gguf import rope
from lowbit.interchange.exporters.gguf.config_facts import FACTS

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
    biases       what llama.cpp reads a bias of, by the names in the file; None: of everything
    reader       who reads it back: what opens any GGUF file as a source (`whole`), or, where transformers knows no such
                 files, the other direction of the writer alone (`own`)
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
    biases: tuple[str, ...] | None = ()
    reader: Literal["whole", "own"] = "whole"

    def reads(self, name: str) -> bool:
        """Whether llama.cpp looks for the tensor `name`, where it is a bias; weights are all known."""
        leaf = name.removesuffix(".bias").rpartition(".")[2]
        return not name.endswith(".bias") or self.biases is None or leaf in self.biases


def _gemma2(writer: GGUFWriter, config: Any) -> None:
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def _gemma3(writer: GGUFWriter, config: Any) -> None:
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base_swa(rope.rope_of(config, "sliding_attention")["rope_theta"])


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
    return _shares(config, config.model_type == "qwen3_moe")


def _refuses_olmoe(config: Any) -> str | None:
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
    return _every(config, 6)


def _every(config: Any, period: int) -> str | None:
    """llama.cpp has the pattern of windows in its code: every `period`-th layer sees everything."""
    for i, kind in enumerate(config.layer_types):
        wanted = "full_attention" if (i + 1) % period == 0 else "sliding_attention"
        if kind != wanted:
            return f"llama.cpp takes layer {i} as {wanted}, and this config has {kind}"
    return None


_QKV = ("attn_q", "attn_k", "attn_v")
FAMILIES: tuple[Family, ...] = (
    Family(
        "llama", ("LlamaForCausalLM", "MistralForCausalLM"), describe=_llama, interleaved=("q_proj", "k_proj"),
        biases=(*_QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
    ),
    Family(
        "llama", ("MixtralForCausalLM",), describe=_mixtral, interleaved=("q_proj", "k_proj"), reader="own",
    ),
    Family("qwen2", ("Qwen2ForCausalLM",), head_size=False, biases=_QKV),
    Family(
        "qwen2moe", ("Qwen2MoeForCausalLM",), describe=_qwen_moe, head_size=False, biases=_QKV, refuses=_refuses_qwen_moe,
    ),
    Family("qwen3moe", ("Qwen3MoeForCausalLM",), describe=_qwen_moe, refuses=_refuses_qwen_moe),
    Family(
        "olmoe", ("OlmoeForCausalLM",), describe=lambda w, c: _experts(w, c.num_experts, c), head_size=False,
        refuses=_refuses_olmoe, reader="own",
    ),
    Family("qwen3", ("Qwen3ForCausalLM",)),
    Family("gemma", ("GemmaForCausalLM",), shifted=True, tied=True, reader="own"),
    Family(
        "gemma2", ("Gemma2ForCausalLM",), describe=_gemma2, shifted=True, tied=True, refuses=_refuses_gemma2,
    ),
    Family(
        "gemma3", ("Gemma3ForCausalLM",), describe=_gemma3, shifted=True, tied=True, refuses=_refuses_gemma3,
    ),
    Family(
        "phi2", ("PhiForCausalLM",), norm="layer", biases=None, head_size=False, partial=True, reader="own",
    ),
    Family("phi3", ("Phi3ForCausalLM",), describe=_phi3, head_size=False, partial=True),
    Family("gpt2", ("GPT2LMHeadModel",), norm="layer", biases=None, head_size=False),
)  # fmt: skip


def family_of(config: PretrainedConfig | None) -> Family | None:
    """The family of a config by its class name, or None."""
    names = tuple(config.architectures or ()) if config is not None else ()
    return next((f for f in FAMILIES if any(name in f.classes for name in names)), None)


def known_classes() -> str:
    """Every class that can be written, for messages."""
    return ", ".join(name for family in FAMILIES for name in family.classes)


def refusal(family: Family, config: Any) -> str | None:
    """Why llama.cpp would compute another model than this config's, or None."""
    who = f"llama.cpp's {family.architecture}"
    return (
        FACTS[config.model_type].refusal(config.to_dict(), who) or rope.refusal(config, who) or family.refuses(config)
    )


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
    rope.describe(writer, config, family.partial)
    family.describe(writer, config)


_WINDOWED = ("mistral", "mixtral", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")  # phi3's is read and not obeyed


def _context(config: Any) -> int:
    """The longest sequence that llama.cpp computes as transformers does: it has no window where the family has none."""
    longest = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    windowed = config.model_type in _WINDOWED and getattr(config, "use_sliding_window", True)
    return min(longest, int(window)) if window and windowed else longest


def _first(config: Any, *names: str) -> float:
    return float(next(value for name in names if (value := getattr(config, name, None)) is not None))
