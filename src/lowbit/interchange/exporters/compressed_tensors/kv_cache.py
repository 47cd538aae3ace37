"""`kv_cache_scheme`: keys and values in fp8, a scale of each in every attention layer.

Names and arguments are those that vLLM reads (`CompressedTensorsKVCacheMethod`, `maybe_remap_kv_scale_name`) and
compressed-tensors makes room for (`initialize_attn_qparams`): `k_scale` and `v_scale` [1] of the attention module.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from lowbit.interchange.exporters.common.kv_ranges import KVRanges
from lowbit.interchange.exporters.compressed_tensors.scheme import arguments
from lowbit.interchange.exporters.exporter import Problem
from lowbit.interchange.tensors import Contents

KINDS = ("fp8",)
_ATTENTION = re.compile(r"^(.*\blayers\.(\d+)\.self_attn)\.(?:k_proj|qkv_proj)\.weight$")
_KEEP_KEYS = ("full_attention", "sliding_attention", "chunked_attention")
_NEAREST = "this export without --kv"


def scheme() -> dict[str, Any]:
    """`kv_cache_scheme` of config.json."""
    return arguments(8, "float", "tensor")


def problems(model: Contents) -> list[Problem]:
    """Why scales of keys and values have no place in `model`, under its published names; empty when they have."""
    reason = _reason(model)
    return [] if reason is None else [Problem("", f"{reason}, so its KV cache cannot get scales", _NEAREST)]


def _reason(model: Contents) -> str | None:
    config = model.config
    if config is None:
        return "is a plain module without a config"
    if getattr(config, "is_encoder_decoder", False):
        return "has an encoder beside its decoder"
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        return "keeps a latent vector in place of keys and values (kv_lora_rank)"
    if getattr(text, "num_kv_shared_layers", None):
        return "has layers that use the keys and values of others (num_kv_shared_layers)"
    kinds = getattr(text, "layer_types", None) or ()
    others = sorted({kind for kind in kinds if kind not in _KEEP_KEYS})
    if others:
        return f"has layers that keep other things than keys and values ({', '.join(others)})"
    layers = int(getattr(text, "num_hidden_layers", 0))
    found = attentions(model)
    if not layers or sorted(found) != list(range(layers)):
        return f"has a self_attn with k_proj, where readers look for scales, in {len(found)} of its {layers} layers"
    return None


def attentions(model: Contents) -> dict[int, str]:
    """Number of a layer -> published name of its attention module."""
    matches = filter(None, map(_ATTENTION.match, model.tensors))
    return {int(match[2]): match[1] for match in matches}


def tensors(model: Contents, ranges: KVRanges) -> dict[str, Tensor]:
    """float32 [1] each, in the order of the layers."""
    found = {}
    for layer, module in sorted(attentions(model).items()):
        for name, scale in zip(("k_scale", "v_scale"), ranges.scales(layer), strict=True):
            found[f"{module}.{name}"] = torch.tensor([scale], dtype=torch.float32)
    return found
