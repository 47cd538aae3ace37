"""What transformers keeps in float32 in a model that computes in float16 or bfloat16, where weights are packed.

A class lists patterns of names (`_keep_in_fp32_modules`), and what it loads under such a name becomes float32: the second layer of
T5's feed-forward, whose results leave the range of float16. A packed weight of that name computes in float32, and what is stored of
it keeps its types.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from lowbit.nn.swap import packed_weights

_LISTS = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")


def float32_rules(model: Any) -> Callable[[str], torch.dtype]:
    """Name of a parameter -> the type in which it is loaded. `model`: a transformers model in the type that was asked for."""
    dtype = model.dtype
    plan = {_pattern(glob): kept for glob, kept in model._get_dtype_plan(dtype).items()}

    def loaded_in(name: str) -> torch.dtype:
        return next((kept for pattern, kept in plan.items() if pattern.search(name)), dtype)

    return loaded_in


def spare_parts(model: Any) -> None:
    """Leave these lists, on this model, the names of float tensors only."""
    packed = tuple(f"{name}." for name, _ in packed_weights(model))
    floats = [name for name in model.state_dict() if not name.startswith(packed)]
    for listed in _LISTS:
        patterns = [_pattern(glob) for glob in getattr(model, listed, None) or ()]
        kept = [name for name in floats if any(pattern.search(name) for pattern in patterns)]
        if patterns:
            setattr(model, listed, {f"^{re.escape(name)}$" for name in kept})


def _pattern(glob: str) -> re.Pattern[str]:
    return re.compile(glob.replace("*", ".*"))
