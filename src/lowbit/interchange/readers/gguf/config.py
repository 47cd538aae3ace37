"""The config of a GGUF file: what transformers' reader makes of it, and all that this reader leaves out.

Every key of the metadata that speaks of the model is in one of the tables below, or in transformers' own; any other is
refused by name, because it would be lost. Facts: what llama.cpp's `src/llama-model.cpp` and `src/models/*.cpp` read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lowbit.errors import SourceError
from lowbit.interchange.hf.calls import one_line
from lowbit.interchange.hf.gguf import config_keys
from lowbit.interchange.readers.gguf import rope as gguf_rope
from lowbit.interchange.readers.gguf.header import GgufHeader

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Of training, of files, of pooling behind the logits.
_HARMLESS = frozenset({
    "vocab_size", "tensor_data_layout", "pooling_type", "rope.scaling.finetuned", "decoder_start_token_id",
    "attention.group_norm_epsilon", "attention.group_norm_groups",
})  # fmt: skip
# Key -> the only value that these models can have.
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,), "attention.max_alibi_bias": (0.0,), "attention.clamp_kqv": (0.0,), "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0), "embedding_scale": (0.0, 1.0), "attention.layer_norm_epsilon": (),
    "expert_weights_scale": (0.0, 1.0), "expert_gating_func": (0, 1), "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1), "leading_dense_block_count": (0,), "nextn_predict_layers": (0,),
    "use_parallel_residual": (True,), "swin_norm": (False,), "attention.use_norm": (False,),
}  # fmt: skip
_PARTIAL = frozenset({"phi3", "stablelm", "nemotron", "phi", "minimax_m2"})  # `partial_rotary_factor` is obeyed


@dataclass
class _Reading:
    """facts: metadata without the architecture's name in front. changes: fields of the config."""

    where: str
    config: Any
    facts: Mapping[str, Any]
    tensors: frozenset[str]
    factors: Mapping[str, Tensor]
    changes: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str) -> Any:
        return self.changes.get(name, getattr(self.config, name, None))

    @property
    def head_size(self) -> int:
        return int(self.get("head_dim") or self.config.hidden_size // self.config.num_attention_heads)

    def refuse(self, key: str, value: Any, why: str = "is not known here and would be lost") -> SourceError:
        return SourceError(
            f"{self.where}: its {key}={value!r} {why}; use the model's original safetensors folder, or tell lowbit's authors"
        )


def completed(
    config: PretrainedConfig, header: GgufHeader, values: Callable[[str], Tensor], where: str
) -> tuple[PretrainedConfig, frozenset[str]]:
    """(the config with all that the file says, the tensors of the file that went into it).

    config: transformers' reading. values: name of a tensor -> float32. SourceError names what cannot be held.
    """
    prefix = header.architecture + "."
    facts = {key.removeprefix(prefix): v for key, v in header.metadata.items() if key.startswith(prefix)}
    names = [name for name in gguf_rope.FACTOR_TENSORS if name in header.tensors]
    known = config_keys(config.model_type, header.architecture)
    if known is None:
        return config, frozenset()
    reading = _Reading(where, config, facts, frozenset(header.tensors), {name: values(name) for name in names})
    try:
        for key, value in facts.items():
            _read_key(reading, known, key, value)
        for finish in (_rope, _window, _biases, _tokens, _FINISH.get(config.model_type, lambda reading: None)):
            finish(reading)
    except (TypeError, ValueError, ArithmeticError) as error:  # a word for a number, and their like
        raise SourceError(f"{where}: its metadata make no model ({one_line(error)}); download it again") from error
    return _changed(reading), frozenset(names)


def _read_key(reading: _Reading, known: frozenset[str], key: str, value: Any) -> None:
    """Take one fact of the metadata, or refuse it."""
    if key in _KEYS:
        _KEYS[key](reading, value)
    elif key in _FIXED and value in _FIXED[key]:
        pass
    elif not any(key in keys for keys in (known, _HARMLESS, gguf_rope.KEYS, _LATER)):
        raise reading.refuse(key, "an array" if value is None else value)


def _head_size(reading: _Reading, value: Any) -> None:
    if hasattr(reading.config, "head_dim"):
        reading.changes["head_dim"] = value
    elif value != reading.head_size and not hasattr(reading.config, "d_kv"):
        raise reading.refuse("attention.key_length", value, f"is not the {reading.head_size} that its class has")


def _value_size(reading: _Reading, value: Any) -> None:
    if value != reading.facts.get("attention.key_length", value):
        raise reading.refuse("attention.value_length", value, "differs from the length of keys")


def _one_of(name: str) -> Callable[[_Reading, Any], None]:
    """The value of a field that the class must have."""

    def take(reading: _Reading, value: Any) -> None:
        if not hasattr(reading.config, name):
            raise reading.refuse(name, value)
        reading.changes[name] = value

    return take


def _experts(reading: _Reading, value: Any) -> None:
    if value and not any(hasattr(reading.config, name) for name in ("num_experts", "num_local_experts")):
        raise reading.refuse("expert_count", value, f"is of a mixture, which {type(reading.config).__name__} is not")


def _attention_scale(reading: _Reading, value: Any) -> None:
    if value and not math.isclose(value, reading.head_size**-0.5, rel_tol=1e-5):
        raise reading.refuse("attention.scale", value)


def _key_heads(reading: _Reading, value: Any) -> None:
    if not hasattr(reading.config, "num_key_value_heads") and value != reading.facts.get("attention.head_count"):
        raise reading.refuse("attention.head_count_kv", value, "differs from the number of heads")


def _same_as(key: str, other: str) -> Callable[[_Reading, Any], None]:
    """Of layers with a window: these models have one size for all."""

    def take(reading: _Reading, value: Any) -> None:
        if value != reading.facts.get(other, reading.head_size):
            raise reading.refuse(key, value, "is not that of the other layers")

    return take


_KEYS: Mapping[str, Callable[[_Reading, Any], None]] = {
    "attention.head_count_kv": _key_heads,
    "attention.key_length": _head_size,
    "attention.value_length": _value_size,
    **{
        key: _same_as(key, key.removesuffix("_swa"))
        for key in ("rope.dimension_count_swa", "attention.key_length_swa", "attention.value_length_swa")
    },
    "attention.scale": _attention_scale,
    "attn_logit_softcapping": _one_of("attn_logit_softcapping"),
    "final_logit_softcapping": _one_of("final_logit_softcapping"),
    "expert_count": _experts,
    "expert_used_count": lambda reading, value: None,  # transformers' where there are experts
    "expert_feed_forward_length": _one_of("moe_intermediate_size"),
    "expert_shared_feed_forward_length": _one_of("shared_expert_intermediate_size"),
    "expert_weights_norm": _one_of("norm_topk_prob"),
}
# Keys that the steps below look at.
_LATER = frozenset({
    "rope.dimension_count", "rope.freq_base_swa", "attention.sliding_window", "attention.sliding_window_pattern",
})  # fmt: skip


def _rope(reading: _Reading) -> None:
    """Positions, and how much of a head turns."""
    config, facts = reading.config, reading.facts
    if not hasattr(config, "rope_parameters"):
        odd = [key for key in facts if key.startswith("rope.scaling.")] + list(reading.factors)
        if odd:
            raise reading.refuse(
                odd[0], facts.get(odd[0]), f"is of rotary positions, which {config.model_type} has not"
            )
        return
    if config.model_type == "gpt_oss" and "rope.scaling.type" not in facts:
        return
    context = int(config.max_position_embeddings)
    rope = gguf_rope.rope_parameters(facts, reading.factors, context, reading.where)
    count = facts.get("rope.dimension_count")
    if count is not None and count != reading.head_size and "head_dim" not in {*reading.changes, *facts}:
        if config.model_type not in _PARTIAL or not 0 < count <= reading.head_size:
            raise reading.refuse("rope.dimension_count", count, f"is not the {reading.head_size} channels of a head")
        rope["partial_rotary_factor"] = count / reading.head_size
    if hasattr(config, "original_max_position_embeddings"):
        reading.changes["original_max_position_embeddings"] = rope.get("original_max_position_embeddings", context)
    kinds = set(getattr(config, "layer_types", None) or ()) & set(getattr(config, "rope_parameters", None) or ())
    local = facts.get("rope.freq_base_swa")
    if config.model_type == "gemma3_text":
        slid = {"rope_type": "default", "rope_theta": float(local or 10000.0)}
        reading.changes["rope_parameters"] = {"full_attention": rope, "sliding_attention": slid}
    elif kinds or (local is not None and local != rope["rope_theta"]):
        raise reading.refuse("rope.freq_base_swa", local)
    else:
        truncated = {"truncate": False} if config.model_type == "gpt_oss" and rope.get("rope_type") == "yarn" else {}
        reading.changes["rope_parameters"] = rope | truncated


def _window(reading: _Reading) -> None:
    """A sliding window, or none: what the class's own default says is never taken."""
    config, kind = reading.config, reading.config.model_type
    window = int(reading.facts.get("attention.sliding_window") or 0)
    context = int(getattr(config, "max_position_embeddings", 0) or 0)
    if "attention.sliding_window_pattern" in reading.facts:
        reading.changes["layer_types"] = _layer_types(reading)
    if kind in ("gemma2", "gemma3_text"):
        if "attention.sliding_window" not in reading.facts:  # llama.cpp: 4096 for the one, none for the other
            if kind == "gemma2":
                reading.changes["sliding_window"] = 4096
            else:
                reading.changes["layer_types"] = ["full_attention"] * config.num_hidden_layers
    elif kind in ("phi3", "mistral"):
        reading.changes["sliding_window"] = window or None
    elif kind == "gpt_oss" or window == 0 or window >= context:
        pass
    elif kind == "llama":
        reading.changes |= {"model_type": "mistral", "sliding_window": window}
    else:
        raise reading.refuse("attention.sliding_window", window, f"would be lost: lowbit reads none of {kind}")


def _layer_types(reading: _Reading) -> list[str]:
    """llama.cpp: every n-th layer sees everything, or one flag for each layer that is windowed."""
    pattern, layers = reading.facts["attention.sliding_window_pattern"], reading.config.num_hidden_layers
    if not hasattr(reading.config, "layer_types") or pattern is None:
        raise reading.refuse("attention.sliding_window_pattern", pattern)
    if isinstance(pattern, int):
        windowed = [pattern > 0 and (i + 1) % pattern != 0 for i in range(layers)]
    elif len(pattern) == layers:
        windowed = [bool(w) for w in pattern]
    else:
        raise reading.refuse("attention.sliding_window_pattern", f"{len(pattern)} values", f"is for {layers} layers")
    return ["sliding_attention" if w else "full_attention" for w in windowed]


def _biases(reading: _Reading) -> None:
    """Biases are there where their tensors are."""
    for name, leaves in (
        ("attention_bias", ("attn_q", "attn_k", "attn_v", "attn_output", "attn_qkv")),
        ("mlp_bias", ("ffn_gate", "ffn_up", "ffn_down")),
        ("qkv_bias", ("attn_q", "attn_k", "attn_v")),
    ):
        if hasattr(reading.config, name):
            reading.changes[name] = any(f"blk.0.{leaf}.bias" in reading.tensors for leaf in leaves)


def _tokens(reading: _Reading) -> None:
    """A special token of the class's own that the vocabulary has not is none."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = reading.get(name)
        if isinstance(token, int) and token >= reading.config.vocab_size:
            reading.changes[name] = None


def _gemma(large: int) -> Callable[[_Reading], None]:
    """Gemma 2 and 3: llama.cpp scales attention by the head size, the model of `large` layers by hidden size / heads."""

    def take(reading: _Reading) -> None:
        config = reading.config
        is_large = config.num_hidden_layers == large
        per_head = config.hidden_size // config.num_attention_heads
        reading.changes["query_pre_attn_scalar"] = per_head if is_large else reading.head_size

    return take


def _gpt2(reading: _Reading) -> None:
    facts = reading.facts
    reading.changes["n_positions"] = facts.get("context_length", reading.config.n_positions)
    reading.changes["n_inner"] = facts.get("feed_forward_length")


_FINISH: Mapping[str, Callable[[_Reading], None]] = {"gemma2": _gemma(46), "gemma3_text": _gemma(62), "gpt2": _gpt2}


def _changed(reading: _Reading) -> PretrainedConfig:
    """A config of the class with the changes, checked by that class."""
    from transformers import AutoConfig

    before: dict[str, Any] = reading.config.to_dict()
    if "layer_types" in before and "layer_types" not in reading.changes and "model_type" in reading.changes:
        del before["layer_types"]
    try:
        return AutoConfig.for_model(**before | reading.changes)
    except Exception as error:  # transformers raises many kinds for a bad config
        raise SourceError(
            f"{reading.where}: its metadata make no config that transformers can use ({one_line(error)}); use the model's "
            "original safetensors folder"
        ) from error
