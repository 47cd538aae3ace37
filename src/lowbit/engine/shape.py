"""The numbers of a decoder, read from a config: widths, heads, scales, rotations, windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit.errors import EngineError
from lowbit.families import families, family_of
from lowbit.families.family import Config, Decoder, Experts, Family

_GATES = {
    "silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Rotation:
    """Rotary positions (Su et al. 2021): the first 2 * len(frequencies) channels of a head turn by position * frequency."""

    inverse_frequency: np.ndarray[Any, np.dtype[np.float32]]
    factor: float
    interleaved: bool = False


@dataclass(frozen=True, eq=False)
class Shape:
    """A decoder without its weights. rope: a rotation of `rotations` for each layer, -1 for none; window: 0 for none.

    mixtures: whether a layer has `experts` of which a token takes `top_k`, `normalized` where their shares are brought to a
    sum of 1, instead of one MLP; none where no layer has.
    short_positions: texts longer than this have other rotations, from their first token on; 0 where all have the same.
    """

    decoder: Decoder
    plus_one: bool
    layers: int
    width: int
    heads: int
    key_heads: int
    head_dim: int
    hidden: int
    vocabulary: int
    epsilon: float
    gate: str
    positions: int
    short_positions: int
    rotations: tuple[Rotation, ...]
    rope: tuple[int, ...]
    window: tuple[int, ...]
    attention_scale: float
    mixtures: tuple[bool, ...] = ()
    experts: int = 0
    top_k: int = 0
    expert_hidden: int = 0
    normalized: bool = True
    attention_soft_cap: float = 0.0
    logit_soft_cap: float = 0.0
    logit_scale: float = 1.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0

    def is_long(self, length: int) -> bool:
        """Whether a text of so many tokens has the rotations of long ones."""
        return bool(self.short_positions) and length > self.short_positions

    def products(self, tokens: int, logits: int) -> int:
        """Multiply-adds with weights when so many tokens are read and so many of them give logits."""
        heads = (2 * self.heads + 2 * self.key_heads) * self.head_dim * self.width
        mixed = sum(self.mixtures)
        hidden = (self.layers - mixed) * 3 * self.hidden + mixed * (self.experts + 3 * self.top_k * self.expert_hidden)
        return tokens * (self.layers * heads + hidden * self.width) + logits * self.vocabulary * self.width


def shape_of(config: Config, positions: int = 1) -> Shape:
    """The shape of a model by its config, as JSON. `positions`: how long sequences may get, for rotations that depend on it.

    EngineError with the reason for a model that the engine does not compute.
    """
    family, decoder = known(config)
    reason = (family.config and family.config.refusal(config, "it")) or _shared(config, family)
    if reason is not None:
        raise EngineError(f"the engine cannot run this {family.model_type} model: {reason}")
    layers, width, heads = (int(config[k]) for k in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    head_dim = int(config.get("head_dim") or width // heads)
    if head_dim % 16 or head_dim > 512:
        raise EngineError(f"heads of {head_dim} channels; the engine takes multiples of 16 up to 512")
    act = str(config.get("hidden_activation") or config.get("hidden_act"))
    if act not in _GATES:
        raise EngineError(f"the activation {act!r}; the engine has {', '.join(_GATES)}")
    longest = int(config.get("max_position_embeddings") or 2048)
    kinds = _kinds(config, layers)
    rotations, index = _rotations(config, family.partial_rotary, kinds, head_dim, positions)
    skipped = config.get("no_rope_layers")  # 1 where positions are used, as SmolLM3 has it
    return Shape(
        decoder=decoder,
        plus_one=family.plus_one,
        layers=layers,
        width=width,
        heads=heads,
        key_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        hidden=int(config["intermediate_size"]),
        vocabulary=int(config["vocab_size"]),
        epsilon=float(config["rms_norm_eps"]),
        gate=_GATES[act],
        positions=longest,
        short_positions=_short_positions(config),
        rotations=rotations,
        rope=tuple(-1 if skipped and not skipped[i] else index[kind] for i, kind in enumerate(kinds)),
        window=tuple(_window(config, kind) for kind in kinds),
        **_mixture(config, decoder.experts, layers),
        **{"attention_scale": head_dim**-0.5, **decoder.values(config)},
    )


def known(config: Config) -> tuple[Family, Decoder]:
    """The family of a model by its config, as JSON, and its decoder. EngineError for a family that the engine has none of."""
    kind = config.get("model_type")
    family = family_of(kind)
    if family is None or family.decoder is None:
        there = ", ".join(name for name, f in families().items() if f.decoder)
        raise EngineError(f"the engine does not know models of type {kind!r} (it knows {there})")
    return family, family.decoder


def _mixture(config: Config, experts: Experts | None, layers: int) -> dict[str, Any]:
    """The values of a shape that has experts."""
    if experts is None:
        return {}
    count, top_k = int(config.get("num_local_experts") or config["num_experts"]), int(config["num_experts_per_tok"])
    if top_k > count:
        raise EngineError(f"a token takes num_experts_per_tok={top_k} experts, and a layer has {count}")
    normalized = experts.normalized
    return {
        "mixtures": tuple(experts.has(config, i) for i in range(layers)),
        "experts": count,
        "top_k": top_k,
        "expert_hidden": int(config[experts.width]),
        "normalized": bool(config[normalized]) if isinstance(normalized, str) else normalized,
    }


def _shared(config: Config, family: Family) -> str | None:
    """Why a share of each head, that is to turn, cannot be had: only some families' models obey it, others break on it."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    share = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if (
        family.partial_rotary
        or share == 1.0
        or str(rope.get("rope_type") or rope.get("type") or "default") == "default"
    ):
        return None
    return f"partial_rotary_factor={share} with scaled positions, for which transformers' model has no code"


def _short_positions(config: Config) -> int:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return _original(rope, config) if "long_factor" in rope else 0


def _original(rope: Mapping[str, Any], config: Config) -> int:
    old = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    return int(old or config["max_position_embeddings"])


def _kinds(config: Config, layers: int) -> list[str]:
    """full_attention or sliding_attention, for each layer."""
    given = config.get("layer_types")
    if given:
        return [str(k) for k in given]
    # Before layer types there was one window for all, which Qwen2 has a switch for.
    sliding = config.get("sliding_window") and config.get("use_sliding_window", True)
    return ["sliding_attention" if sliding else "full_attention"] * layers


def _window(config: Config, kind: str) -> int:
    if kind == "full_attention":
        return 0
    if kind != "sliding_attention":
        raise EngineError(f"layers of type {kind!r}; the engine has full and sliding attention")
    return int(config.get("sliding_window") or 0)


def _rotations(
    config: Config, partial: bool, kinds: list[str], head_dim: int, positions: int
) -> tuple[tuple[Rotation, ...], dict[str, int]]:
    """The distinct rotations, and which of them each kind of layer has."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    by_kind = {k: given[k] for k in set(kinds)} if given and all(k in given for k in set(kinds)) else {}
    rotations: list[Rotation] = []
    index: dict[str, int] = {}
    for kind in dict.fromkeys(kinds):
        index[kind] = len(rotations) if by_kind or not rotations else 0
        if index[kind] == len(rotations):
            rotations.append(_rotation(config, by_kind.get(kind) or given, partial, head_dim, positions))
    return tuple(rotations), index


def _rotation(config: Config, rope: Mapping[str, Any], partial: bool, head_dim: int, positions: int) -> Rotation:
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    share = float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)
    width = int(head_dim * share) if partial else head_dim
    frequency = 1.0 / theta ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    if kind not in _SCALINGS:
        raise EngineError(f"positions scaled by {kind!r}; the engine has {', '.join(_SCALINGS)}")
    scaled, factor = _SCALINGS[kind](frequency.astype(np.float32), rope, config, positions)
    return Rotation(np.ascontiguousarray(scaled, dtype=np.float32), factor)


def _default(frequency: Any, rope: Mapping[str, Any], config: Config, positions: int) -> tuple[Any, float]:
    return frequency, 1.0


def _linear(frequency: Any, rope: Mapping[str, Any], config: Config, positions: int) -> tuple[Any, float]:
    return frequency / np.float32(rope["factor"]), 1.0


def _llama3(frequency: Any, rope: Mapping[str, Any], config: Config, positions: int) -> tuple[Any, float]:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between interpolated."""
    factor, low, high = (float(rope[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    old = float(rope["original_max_position_embeddings"])
    length = 2 * np.pi / frequency
    smooth = (old / length - low) / (high - low)
    between = (1 - smooth) * frequency / factor + smooth * frequency
    scaled = np.where(length > old / low, frequency / factor, frequency)
    return np.where((length >= old / high) & (length <= old / low), between, scaled), 1.0


def _yarn(frequency: Any, rope: Mapping[str, Any], config: Config, positions: int) -> tuple[Any, float]:
    """YaRN (Peng et al. 2023, section 3): dimensions that rotate often are kept, slow ones stretched, a ramp between."""
    factor = float(rope["factor"])
    old = float(rope.get("original_max_position_embeddings") or config["max_position_embeddings"])
    theta, width = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0), 2 * len(frequency)

    def dimension(rotations: float) -> float:
        return width * np.log(old / (rotations * 2 * np.pi)) / (2 * np.log(theta))

    low, high = dimension(float(rope.get("beta_fast") or 32)), dimension(float(rope.get("beta_slow") or 1))
    if rope.get("truncate", True):
        low, high = np.floor(low), np.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = np.clip((np.arange(len(frequency)) - low) / max(high - low, 0.001), 0, 1)
    scaled = frequency / factor * ramp + frequency * (1 - ramp)

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * float(np.log(factor)) + 1.0

    given = rope.get("attention_factor")
    one, every = rope.get("mscale"), rope.get("mscale_all_dim")
    found = magnitude(one) / magnitude(every) if one and every else magnitude(1.0)
    return scaled, float(found if given is None else given)


def _longrope(frequency: Any, rope: Mapping[str, Any], config: Config, positions: int) -> tuple[Any, float]:
    """LongRoPE (Ding et al. 2024): a factor for each frequency, one set for short and one for long sequences."""
    old = _original(rope, config)
    stretch = np.asarray(rope["long_factor" if positions > old else "short_factor"], dtype=np.float32)
    factor = float(rope.get("factor") or config["max_position_embeddings"] / old)
    given = rope.get("attention_factor")
    grown = 1.0 if factor <= 1 else float(np.sqrt(1 + np.log(factor) / np.log(old)))
    return frequency / stretch, float(grown if given is None else given)


_SCALINGS = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
