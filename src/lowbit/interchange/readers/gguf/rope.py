"""Positions of a GGUF file as transformers' `rope_parameters`.

llama.cpp has one base, one factor with a kind (linear, yarn, longrope), and tensors that divide each frequency. What it
computes from them is in `llama-context.cpp` (the magnitude of yarn) and `ggml_rope_ext` (frequencies).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import SourceError

Rope = dict[str, Any]
FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
FACTOR_TENSORS = (FREQS, LONG, SHORT)
_YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
_NEUTRAL = {"yarn_ext_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_log_multiplier": 0.0, "alpha": 0.0}
KEYS = (
    "rope.freq_base", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor",
    "rope.scaling.original_context_length", "rope.scaling.finetuned",
    *(f"rope.scaling.{k}" for k in (*_YARN, *_NEUTRAL)),
)  # fmt: skip


def rope_parameters(facts: Mapping[str, Any], factors: Mapping[str, Tensor], context: int, where: str) -> Rope:
    """What the metadata `facts` (keys without the architecture) and the tensors of `FACTOR_TENSORS` say of positions.

    SourceError for what transformers has no words for.
    """
    said = {key.removeprefix("rope.scaling."): value for key, value in facts.items() if key.startswith("rope.scaling.")}
    factor = float(said.get("factor") or facts.get("rope.scale_linear") or 1.0)
    kind = str(said.get("type") or "linear")
    rope: Rope = {"rope_theta": float(facts.get("rope.freq_base", 10000.0))}
    for name, number in (("rope.freq_base", rope["rope_theta"]), ("rope.scaling.factor", factor)):
        if not (math.isfinite(number) and number > 0):
            raise _unknown(where, name, number)
    for key, value in _NEUTRAL.items():
        if float(said.get(key, value)) not in (value, -1.0):  # -1: not set
            raise _unknown(where, f"rope.scaling.{key}", said[key])
    divisors = {name: _positive(tensor, name, where) for name, tensor in factors.items()}
    if kind == "longrope" or {LONG, SHORT} & set(divisors):
        return rope | _longrope(said, divisors, where)
    if kind == "none":
        factor = 1.0
    elif kind not in ("linear", "yarn"):
        raise _unknown(where, "rope.scaling.type", kind)
    freqs = divisors.get(FREQS)
    magnitude = float(said.get("attn_factor") or 1.0)
    if freqs is not None and bool((freqs != 1).any()):
        if kind == "yarn" and factor != 1:
            raise _unknown(where, FREQS, "together with yarn")
        return rope | scaling_of(freqs * factor, rope["rope_theta"], context, magnitude)
    if kind == "yarn" and factor != 1:
        rope |= {"rope_type": "yarn", "factor": factor,
                 "original_max_position_embeddings": int(said.get("original_context_length") or context)}  # fmt: skip
        if magnitude != 1:
            rope["attention_factor"] = yarn_magnitude(factor) * magnitude
        return rope | {_YARN[key]: float(said[key]) for key in _YARN if key in said and float(said[key]) > 0}
    if magnitude != 1:
        raise _unknown(where, "rope.scaling.attn_factor", magnitude)
    return rope | ({"rope_type": "default"} if factor == 1 else {"rope_type": "linear", "factor": factor})


def yarn_magnitude(factor: float) -> float:
    """What llama.cpp and transformers multiply rotated channels by where nothing else is said."""
    return 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0


def scaling_of(divisors: Tensor, theta: float, context: int, magnitude: float = 1.0) -> Rope:
    """The rope type whose frequencies are theta^(-2i/d) / divisors: llama3's where these are its, else longrope's.

    Llama 3's divisors are 1, then 1 / ((1 - s) / F + s) with s = (C u - low) / (high - low) and u = theta^(-2i/d) / 2 pi,
    then F. (C, low, high) and (k C, k low, k high) are the same function, so `low` is taken as 1. Two points of the ramp
    give C and high; with fewer the published values are tried. What does not come out to 1e-5 is carried as it is, by
    longrope with the same factors for short and long texts.
    """
    for tried in _llama3_guesses(divisors, theta) if magnitude == 1 else ():
        found = llama3_divisors(tried, 2 * len(divisors), theta)
        if bool(((found - divisors).abs() <= 1e-5 * divisors).all()):
            return tried
    every = [float(x) for x in divisors]
    return {"rope_type": "longrope", "short_factor": every, "long_factor": every, "attention_factor": magnitude,
            "original_max_position_embeddings": context}  # fmt: skip


def llama3_divisors(rope: Mapping[str, Any], size: int, theta: float) -> Tensor:
    """float32 [size / 2], what each frequency of Llama 3.1 is divided by (`_compute_llama3_parameters` of transformers)."""
    low, high, factor = (float(rope[key]) for key in ("low_freq_factor", "high_freq_factor", "factor"))
    turns = float(rope["original_max_position_embeddings"]) * _turns(size // 2, theta)  # C / wavelength
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def _turns(count: int, theta: float) -> Tensor:
    """float64 [count]: how many times each frequency turns in one position."""
    return theta ** -(torch.arange(count, dtype=torch.float64) / count) / (2 * math.pi)


def _llama3_guesses(divisors: Tensor, theta: float) -> list[Rope]:
    values, turns = divisors.double(), _turns(len(divisors), theta)
    factor = float(values.max())
    nearest = round(factor, 3)
    factor = nearest if abs(factor - nearest) < 1e-5 * factor else factor
    if factor <= 1:
        return []
    ramp = (values > 1 + 1e-6) & (values < factor * (1 - 1e-6))
    smooth = (1 / values - 1 / factor) / (1 - 1 / factor)
    ends: list[tuple[float, float]] = []  # C and high
    if int(ramp.sum()) > 1:
        u, s = turns[ramp], smooth[ramp]
        slope = float((s[0] - s[-1]) / (u[0] - u[-1]))
        start = float(s[0] - slope * u[0])
        if slope > 0 and start < 0:
            high = 1 - 1 / start
            exact = (slope * (high - 1), high)
            ends = [(float(round(exact[0])), round(high, 3)), (float(round(exact[0])), high)]
    lengths = [float(2**n) for n in range(5, 21)]
    ends += [(length, 4.0) for length in lengths]
    return [
        {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": high,
         "original_max_position_embeddings": int(length)}
        for length, high in ends if length >= 1 and high > 1
    ]  # fmt: skip


def _longrope(said: Mapping[str, Any], divisors: Mapping[str, Tensor], where: str) -> Rope:
    if set(divisors) != {LONG, SHORT} or "original_context_length" not in said:
        raise SourceError(
            f"{where}: it has longrope positions, and not all of {LONG}, {SHORT} and rope.scaling.original_context_length; "
            "download it again"
        )
    return {
        "rope_type": "longrope",
        "short_factor": [float(x) for x in divisors[SHORT]],
        "long_factor": [float(x) for x in divisors[LONG]],
        "attention_factor": float(said.get("attn_factor") or 1.0),
        "original_max_position_embeddings": int(said["original_context_length"]),
    }


def _positive(tensor: Tensor, name: str, where: str) -> Tensor:
    flat = tensor.reshape(-1).float()
    if not bool((flat.isfinite() & (flat > 0)).all()):
        raise SourceError(f"{where}: {name} divides frequencies, and not all of it is above zero; download it again")
    return flat


def _unknown(where: str, key: str, value: Any) -> SourceError:
    return SourceError(
        f"{where}: {key} is {value}, positions that transformers' models cannot have; use the model's original folder"
    )
