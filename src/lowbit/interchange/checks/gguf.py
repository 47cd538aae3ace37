"""Metadata of a GGUF file: what lowbit and transformers' reader of them take for sizes, by the name behind the architecture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lowbit.errors import SourceError
from lowbit.interchange.checks.fields import MOST_LAYERS
from lowbit.interchange.checks.rules import FLAG, TEXT, Rule, check, number, whole
from lowbit.interchange.checks.tensors import layers_of

_AGAIN = "download it again"
# The header keeps short arrays of numbers as tuples and passes over all others, which are None.
_ARRAY = Rule("an array", lambda v: v is None or isinstance(v, tuple))
_size = whole(1, 1 << 24)
_EACH = Rule(
    "an array of a whole number for each layer",
    lambda v: isinstance(v, tuple) and all(type(n) is int and 0 <= n < 1 << 31 for n in v),
)
MODEL: Mapping[str, Rule] = {
    "block_count": whole(1, MOST_LAYERS), "context_length": whole(1, (1 << 31) - 1), "embedding_length": _size,
    "feed_forward_length": whole(0, 1 << 24) | _EACH, "attention.head_count": whole(0, 1 << 20) | _EACH,
    "attention.head_count_kv": whole(0, 1 << 20) | _EACH, "attention.key_length": _size,
    "attention.value_length": _size, "attention.layer_norm_rms_epsilon": number(0, 1, above=True),
    "attention.layer_norm_epsilon": number(0, 1), "attention.sliding_window": whole(0, (1 << 31) - 1) | _EACH,
    "attention.scale": number(0, 1e6, above=True), "attn_logit_softcapping": number(0, 1e9, above=True),
    "final_logit_softcapping": number(0, 1e9, above=True), "rope.freq_base": number(1, 1e30, above=True),
    "rope.dimension_count": _size, "rope.scaling.type": TEXT, "rope.scaling.factor": number(0, 1e9, above=True),
    "rope.scaling.original_context_length": whole(1, (1 << 31) - 1), "rope.scaling.finetuned": FLAG,
    "vocab_size": whole(1, 1 << 28), "expert_count": whole(0, 4096), "expert_used_count": whole(0, 4096),
    "expert_feed_forward_length": whole(0, 1 << 24), "leading_dense_block_count": whole(0, MOST_LAYERS),
    "logit_scale": number(-1e9, 1e9), "embedding_scale": number(-1e6, 1e6), "residual_scale": number(-1e6, 1e6),
    "ssm.conv_kernel": _size, "ssm.inner_size": _size, "ssm.state_size": _size, "ssm.time_step_rank": _size,
}  # fmt: skip
TOKENIZER: Mapping[str, Rule] = {
    "model": TEXT, "pre": TEXT, "tokens": _ARRAY, "merges": _ARRAY, "scores": _ARRAY, "token_type": _ARRAY,
    **{f"{name}_token_id": whole(0, (1 << 32) - 1) for name in ("bos", "eos", "unknown", "separator", "padding", "eot", "eom")},
    "add_bos_token": FLAG, "add_eos_token": FLAG, "add_space_prefix": FLAG,
}  # fmt: skip


# Other kinds of files in llama.cpp's format, by their `general.type`.
_NO_MODEL = {
    "adapter": "merge this LoRA adapter into its base with llama.cpp's llama-export-lora, then give the merged file",
    "mmproj": "this is the part of a model that reads pictures or sound; give the .gguf file of its language model",
    "imatrix": "this says how much weights matter; give the .gguf file of the model",
}


def check_gguf(architecture: str, metadata: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    """SourceError that names the first metadata of a file that make no model of its tensors."""
    what = metadata.get("general.type")
    if isinstance(what, str) and what in _NO_MODEL:
        raise SourceError(f"{where} holds no model: its general.type is {what!r}; {_NO_MODEL[what]}")
    for prefix, table in ((f"{architecture}.", MODEL), ("tokenizer.ggml.", TOKENIZER)):
        check(table, {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}, where, prefix)
    said, found = metadata.get(f"{architecture}.block_count"), layers_of(names)
    if said is not None and said > max(found, 0):
        raise SourceError(
            f"{where}: {architecture}.block_count is {said}, and the tensors have {found} layers; {_AGAIN}"
        )
    for key in (key for key in MODEL if said is not None and isinstance(metadata.get(f"{architecture}.{key}"), tuple)):
        if (count := len(metadata[f"{architecture}.{key}"])) != said:
            raise SourceError(
                f"{where}: {architecture}.{key} is a list of {count}, and there are {said} layers; {_AGAIN}"
            )
    heads, keys = (metadata.get(f"{architecture}.attention.head_count{end}") for end in ("", "_kv"))
    if isinstance(heads, int) and isinstance(keys, int) and keys and heads % keys:
        raise SourceError(
            f"{where}: {architecture}.attention.head_count_kv is {keys}, which does not divide head_count, {heads}; {_AGAIN}"
        )
