"""Positions of a model as llama.cpp has them: one base, a kind and factor of scaling, and what divides each frequency.

llama.cpp's yarn (`ggml_rope_yarn_corr_dims`, `llama-context.cpp`) has the bounds 32 and 1, rounds the ends of its ramp, and
multiplies by 0.1 ln(factor) + 1 times `rope.scaling.attn_factor`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lowbit.interchange.readers.gguf.rope import llama3_divisors, yarn_magnitude

if TYPE_CHECKING:
    from gguf import GGUFWriter


def rope_of(config: Any, layers: str = "full_attention") -> dict[str, Any]:
    """The rotary settings of a config, of one kind of layers where these differ; empty where there are none."""
    found = getattr(config, "rope_parameters", None) or {}
    return dict(found.get(layers, found))


def refusal(config: Any, who: str, kinds: Collection[str], partial: bool) -> str | None:
    """Why llama.cpp would rotate queries and keys otherwise than transformers does, or None.

    kinds: of scaling that the family has there. partial: it rotates only a share of each head.
    """
    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    if kind not in kinds:
        return f"positions of the kind {kind!r} are not written for {who} (there are {', '.join(kinds)})"
    if kind == "yarn":
        for key, value in (("beta_fast", 32), ("beta_slow", 1), ("truncate", True)):
            if (rope.get(key) if rope.get(key) is not None else value) != value:
                return f"{who} has {key}={value} in yarn and no other, and this config {key}={rope[key]}"
    local = rope_of(config, "sliding_attention")
    if local != rope and local.get("rope_type", "default") != "default":
        return f"{who} scales no positions of layers with a window, and this config has {local['rope_type']!r} there"
    share = float(rope.get("partial_rotary_factor") or 1.0)
    if share != 1.0 and kind != "default" and not partial:
        return f"this config has partial_rotary_factor={share} with scaled positions, of which transformers' model knows nothing"
    return None


def describe(writer: GGUFWriter, config: Any, partial: bool) -> None:
    """Add what the metadata say of positions. partial: the family rotates only a share of each head."""
    rope = rope_of(config)
    if not rope:
        return
    share = float(rope.get("partial_rotary_factor") or 1.0) if partial else 1.0
    writer.add_rope_dimension_count(int(share * _head_size(config)))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        _scaled(writer, rope, kind, config)


def _scaled(writer: GGUFWriter, rope: dict[str, Any], kind: str, config: Any) -> None:
    from gguf import RopeScalingType

    writer.add_rope_scaling_type(RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN)
    original = float(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
    factor = float(rope["factor"] if rope.get("factor") is not None else config.max_position_embeddings / original)
    writer.add_rope_scaling_factor(factor)
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(original))
        magnitude = _magnitude(rope, factor) / yarn_magnitude(factor)
        if magnitude != 1:
            writer.add_rope_scaling_attn_factors(magnitude)


def _magnitude(rope: dict[str, Any], factor: float) -> float:
    """What transformers multiplies rotated channels by (`_compute_yarn_parameters`)."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    one, every = rope.get("mscale"), rope.get("mscale_all_dim")
    grown = yarn_magnitude(factor) - 1  # 0.1 ln(factor)
    return (grown * one + 1) / (grown * every + 1) if one and every else grown + 1


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_factors(config: Any) -> Tensor | None:
    """float32 [d / 2], what llama.cpp divides the frequencies of Llama 3.1 by (`rope_freqs.weight`); None for others."""
    rope = rope_of(config)
    if rope.get("rope_type") != "llama3":
        return None
    return llama3_divisors(rope, _head_size(config), float(rope["rope_theta"]))
