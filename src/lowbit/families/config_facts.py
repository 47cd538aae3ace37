"""What a reader or writer of a model does with every field of its config: the seam where nothing may be lost unsaid.

Who computes or writes a model by its config says, for each family, which fields it obeys (`read`) and which must have a
given value because it has that value in its own code (`fixed`). Fields that have no part in the logits are `NEUTRAL`, or
`neutral` for one family. A field in no list that is not what the class says by itself is refused by name. Tests hold
these lists against the config classes of the installed transformers, and its logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

# Of every transformers config: bookkeeping, outputs, training, tokens, caches, how a classifier is made of it.
NEUTRAL = frozenset({
    "transformers_version", "architectures", "model_type", "_name_or_path", "dtype", "torch_dtype", "problem_type", "id2label",
    "label2id", "num_labels", "return_dict", "output_hidden_states", "output_attentions", "use_cache", "use_return_dict",
    "chunk_size_feed_forward", "_attn_implementation", "attn_implementation", "_attn_implementation_autoset", "auto_map",
    "quantization_config", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "tokenizer_class", "prefix", "torchscript",
    "initializer_range", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "pretraining_tp",
    "task_specific_params", "finetuning_task", "is_decoder", "cross_attention_hidden_size",
    "output_router_logits", "router_aux_loss_coef", "router_jitter_noise",
    "reorder_and_upcast_attn", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
    "summary_first_dropout", "transformers_weights", "no_rope_layer_interval", "_sliding_window_pattern", "sliding_window_pattern",
})  # fmt: skip
# Sizes and what every decoder has.
DECODER = frozenset({
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "tie_word_embeddings",
})  # fmt: skip
# Positions, by the names of transformers 5 and of those before it.
ROPE = frozenset({
    "rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor",
    "original_max_position_embeddings",
})  # fmt: skip
LLAMA = DECODER | ROPE | {"hidden_act", "rms_norm_eps"}
WINDOWS = frozenset({"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"})
BIASES = frozenset({"attention_bias", "mlp_bias"})  # of tensors, each of which is used or refused
EXPERTS = frozenset(
    {"num_experts_per_tok", "num_experts", "num_local_experts", "norm_topk_prob", "moe_intermediate_size"}
)
NOT_ENCODER: Mapping[str, tuple[Any, ...]] = {"is_encoder_decoder": (False,), "add_cross_attention": (False,)}


@dataclass(frozen=True)
class ConfigFacts:
    """Of one family: `read` is obeyed whatever it says, `fixed` may have only these values, `neutral` has no influence."""

    read: frozenset[str]
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    neutral: frozenset[str] = frozenset()

    def __contains__(self, name: str) -> bool:
        return name in NEUTRAL or name in self.read or name in self.neutral or name in self._fixed

    @property
    def _fixed(self) -> Mapping[str, tuple[Any, ...]]:
        return {**NOT_ENCODER, **self.fixed}

    def fixing(self, fixed: Mapping[str, tuple[Any, ...]]) -> ConfigFacts:
        """The same for one who has these values in its own code, and reads no others."""
        return replace(self, read=self.read - fixed.keys(), fixed={**self.fixed, **fixed})

    def refusal(self, config: Mapping[str, Any], who: str) -> str | None:
        """Why `who` cannot have a model of this config, given as JSON, or None."""
        for name, values in self._fixed.items():
            value = config.get(name, values[0])
            if name not in self.read and not any(_same(value, v) for v in values):
                return f"{who} has {name}={values[0]!r} and no other value, and this config has {name}={value!r}"
        unknown = [name for name in config if name not in self]
        defaults = _defaults(str(config.get("model_type"))) if unknown else {}
        for name in unknown:  # what the class has not is nothing that transformers' model reads
            if name in defaults and not _same(config[name], defaults[name]):
                return f"{who} knows nothing of the field {name}, and this config has {name}={config[name]!r}"
        return None


def _same(a: Any, b: Any) -> bool:
    return bool(a == b) and (isinstance(a, bool) == isinstance(b, bool) or a is b)


def _defaults(model_type: str) -> Mapping[str, Any]:
    """The fields of the config class of a type, with what they are where nothing is said."""
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return {}
    made: dict[str, Any] = CONFIG_MAPPING[model_type]().to_dict()
    return made
