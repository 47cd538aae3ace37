"""Rotary positions: what each kind of scaling needs, and what its numbers may be.

`rope_parameters` (transformers 5) or `rope_scaling` with `rope_theta` beside it; one object, or one for each kind of layer.
Sources: Su et al. 2021 (theta), Peng et al. 2023 (YaRN), Ding et al. 2024 (LongRoPE), the config of Llama 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowbit.errors import SourceError
from lowbit.interchange.checks.rules import (
    FLAG,
    NULL,
    OBJECT,
    REMEDY,
    TEXT,
    Rule,
    check,
    is_number,
    list_of,
    need,
    number,
    refuse,
    whole,
)  # fmt: skip

_factor = number(0, 1e9, above=True)
_positions = number(1, 2**31 - 1)
THETA = number(1, 1e30, above=True) | NULL
_share = number(0, 64, above=True) | NULL  # a family takes 4: two axes of a picture in pairs

PARAMETERS: Mapping[str, Rule] = {
    "rope_type": TEXT | NULL, "type": TEXT | NULL, "rope_theta": THETA, "partial_rotary_factor": _share,
    "factor": _factor | NULL, "low_freq_factor": _factor | NULL, "high_freq_factor": _factor | NULL,
    "original_max_position_embeddings": _positions | NULL, "max_position_embeddings": _positions | NULL,
    "attention_factor": _factor | NULL, "beta_fast": _factor | NULL, "beta_slow": _factor | NULL,
    "mscale": number(0, 1e6) | NULL, "mscale_all_dim": number(0, 1e6) | NULL, "truncate": FLAG | NULL,
    "short_factor": list_of(_factor, 1, 1 << 16) | NULL, "long_factor": list_of(_factor, 1, 1 << 16) | NULL,
    "mrope_section": list_of(whole(0, 1 << 16)) | NULL,
}  # fmt: skip
NEEDED: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor"),
    "su": ("short_factor", "long_factor"),
}
BESIDE: Mapping[str, Rule] = {
    "rope_theta": THETA, "partial_rotary_factor": _share, "rotary_pct": _share, "rotary_emb_base": THETA,
    "rope_local_base_freq": THETA, "rope_parameters": OBJECT | NULL, "rope_scaling": OBJECT | NULL,
}  # fmt: skip


def check_rope(config: Mapping[str, Any], where: str, path: str, plain: bool) -> None:
    """SourceError for what no rotation can be made of. plain: of a decoder, whose kinds and widths are known."""
    check(BESIDE, config, where, path)
    if plain:
        _check_share(config, config, where, path)
    for field in ("rope_parameters", "rope_scaling"):
        given = config.get(field)
        if not given:
            continue
        check(PARAMETERS, given, where, f"{path}{field}.")
        parts = {key: part for key, part in given.items() if isinstance(part, Mapping)}
        kinds = set(config.get("layer_types") or ())
        by_kind = bool(parts) and (not plain or (bool(kinds) and not {"rope_type", "type", "factor"} & set(given)))
        if by_kind and plain and not kinds <= set(parts):
            missing = sorted(kinds - set(parts))[0]
            raise SourceError(f"{where}: {path}{field} has nothing for {missing}, which layer_types names; {REMEDY}")
        for key, part in parts.items():
            _check_part(config, part, where, f"{path}{field}.{key}.", plain)
        if not by_kind:
            _check_part(config, given, where, f"{path}{field}.", plain)


def _check_part(config: Mapping[str, Any], rope: Mapping[str, Any], where: str, path: str, plain: bool) -> None:
    check(PARAMETERS, rope, where, path)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if plain and kind not in NEEDED:
        refuse(where, f"{path}rope_type", kind, f"one of {', '.join(NEEDED)}")
    need(NEEDED.get(kind, ()), rope, where, path, f"rope_type {kind!r}")
    low, high = rope.get("low_freq_factor"), rope.get("high_freq_factor")
    if kind == "llama3" and not low < high:  # type: ignore[operator]
        refuse(where, f"{path}high_freq_factor", high, f"above low_freq_factor, which is {low}")
    if kind in ("longrope", "su"):
        _check_long(config, rope, where, path, plain)
    if plain:
        _check_share(config, rope, where, path)


def _check_long(config: Mapping[str, Any], rope: Mapping[str, Any], where: str, path: str, plain: bool) -> None:
    """The two lists of LongRoPE, a factor for each frequency."""
    short, long = rope["short_factor"], rope["long_factor"]
    if len(short) != len(long):
        refuse(where, f"{path}long_factor", long, f"as long as short_factor, which has {len(short)}")
    old = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    if old is not None and (not is_number(old) or old < 2):
        refuse(where, f"{path}original_max_position_embeddings", old, "a number from 2 up")
    wanted = _rotated_channels(config, rope) // 2
    if plain and wanted and len(short) != wanted:
        refuse(where, f"{path}short_factor", short, f"a list of {wanted}, one for each frequency of a head")


def _head_dim(config: Mapping[str, Any]) -> int:
    """Channels of a head; 0 where the config alone does not say."""
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    whole = type(width) is int and type(heads) is int and heads > 0
    return config.get("head_dim") or (width // heads if whole else 0)  # type: ignore[operator]


def _rotated_channels(config: Mapping[str, Any], rope: Mapping[str, Any]) -> int:
    """How many channels of a head are rotated; 0 where the config alone does not say."""
    share = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    return int(_head_dim(config) * share)


def _check_share(config: Mapping[str, Any], rope: Mapping[str, Any], where: str, path: str) -> None:
    """At most a whole head is rotated, and at least one pair of its channels."""
    share, rotated = rope.get("partial_rotary_factor"), _rotated_channels(config, rope)
    if share is not None and (share > 1 or (_head_dim(config) and (rotated < 2 or rotated % 2))):
        allowed = "a share of a head, above 0 up to 1, that is an even number of channels"
        refuse(where, f"{path}partial_rotary_factor", share, allowed)
