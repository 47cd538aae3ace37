"""llama.cpp's mixes by their names, as ordinary recipes: which block type each tensor gets.

The rules are llama-quantize's (`llama-quant.cpp`): tensors that matter most get more bits, `attn_v` and `ffn_down` in
some layers or all. Widths that a type cannot hold are another question (`types.py`, `narrow`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


def _some(i: int, n: int) -> bool:
    """The first and the last eighth of the layers, and of those between every third."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


Rule = Callable[[int, int], str]


@dataclass(frozen=True)
class Rules:
    """Type of everything but what follows: the `head` and a tied embedding, and `rules` the middle of the name in the
    file: (layer, layers) -> type."""

    base: str
    rules: Mapping[str, Rule] = field(default_factory=dict)
    head: str = "q6_k"


def _more(base: str, more: str) -> Rule:
    return lambda i, n: more if _some(i, n) else base


def _until(share: int, more: str, base: str) -> Rule:
    return lambda i, n: more if i < n // share else base


MIXES: dict[str, Rules] = {
    "q2_k": Rules("q2_k", {"attn_v": lambda i, n: "q4_k", "ffn_down": lambda i, n: "q3_k", "attn_output": lambda i, n: "q3_k"}),
    "q3_k_s": Rules("q3_k"),
    "q3_k_m": Rules("q3_k", {
        "attn_v": lambda i, n: "q5_k" if i < 2 else "q4_k", "attn_output": lambda i, n: "q4_k",
        "ffn_down": lambda i, n: "q5_k" if i < n // 16 else "q4_k" if _some(i, n) else "q3_k",
    }),
    "q3_k_l": Rules("q3_k", {key: lambda i, n: "q5_k" for key in ("attn_v", "attn_output", "ffn_down")}),
    "q4_k_s": Rules("q4_k", {"attn_v": lambda i, n: "q5_k" if i < 4 else "q4_k", "ffn_down": _until(8, "q5_k", "q4_k")}),
    "q4_k_m": Rules("q4_k", {key: _more("q4_k", "q6_k") for key in ("attn_v", "ffn_down")}),
    "q5_k_s": Rules("q5_k"),
    "q5_k_m": Rules("q5_k", {key: _more("q5_k", "q6_k") for key in ("attn_v", "ffn_down")}),
    "q6_k": Rules("q6_k"),
    "q4_0": Rules("q4_0", head="q8_0"), "q4_1": Rules("q4_1", head="q8_0"), "q5_0": Rules("q5_0", head="q8_0"),
    "q5_1": Rules("q5_1", head="q8_0"), "q8_0": Rules("q8_0", head="q8_0"), "iq4_nl": Rules("iq4_nl", head="q8_0"),
    "iq4_xs": Rules("iq4_xs"), "mxfp4": Rules("mxfp4", head="q8_0"),
}  # fmt: skip


def layer_types(mix: Rules, names: Mapping[str, str | None]) -> dict[str, str]:
    """Name in the model -> type, for the tensors that the mix gives another than its base; `names`: as in the file."""
    layers = 1 + max((_layer(n) for n in names.values() if n), default=-1)
    out = {}
    for name, there in names.items():
        parts = (there or "").split(".")
        kind = parts[2].removesuffix("_exps").removesuffix("_shexp") if parts[0] == "blk" else ""
        rule = mix.rules.get(kind) if parts[-1] == "weight" else None
        if rule is not None and (type_ := rule(_layer(there or ""), layers)) != mix.base:
            out[name] = type_
    return out


def _layer(name: str) -> int:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blk" else -1
