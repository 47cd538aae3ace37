"""In which type the products of a run over calibration text are computed; `fast_dtype` says which this machine is fast at."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def products_in(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Enter it around a forward of float32 weights, also more than once: products in bfloat16, everything else in float32;
    for float32 it does nothing."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast("cpu", dtype, cache_enabled=False)
