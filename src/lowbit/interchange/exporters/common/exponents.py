"""Scales whose format has an exponent, for readers that know none: as they are, in a type that holds them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowbit.errors import ExportError
from lowbit.formats import Format, QTensor, stores

_OFF = 2.0**-9  # how far a scale may be rounded, of its size: beside the steps of 8 bits that is little


def held(scales: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Scales of the weight `name` rounded to `dtype`. ExportError where one overflows, or is so small that rounding changes it
    by more than 0.2 %."""
    rounded = scales.to(dtype)
    kind = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, "fp32")
    if not bool(rounded.isfinite().all()):
        raise ExportError(f"{name} has a scale of {float(scales.abs().max()):.3g}, too large for {kind}; use --as vllm")
    off = (rounded.to(torch.float32) - scales).abs() > _OFF * scales.abs()
    if bool(off.any()):
        smallest = float(scales.abs()[off].min())
        raise ExportError(
            f"{name} has {int(off.sum()):,} scales such as {smallest:.3g}, too small for {kind}; use --as vllm, or keep this "
            f"tensor with a recipe ending in ,{name}=keep"
        )
    return rounded


def without_exponent(q: QTensor, name: str) -> QTensor:
    """The same weight `name` in its format without an exponent: scales, and minima, as they are. ExportError as in `held`."""
    exponent, fmt = q.format.exponent, q.format.plain
    if not exponent:
        return q

    def real(stored: Tensor | QTensor | None, how: object) -> Tensor | QTensor | None:
        if isinstance(stored, QTensor):
            assert isinstance(how, Format)
            return replace(stored, scale=real(stored.scale, how.scale))
        if stored is None or how not in stores.FLOAT_STORES:
            raise ExportError(f"{name} is {q.format}, whose exponent the program does not have; use --as vllm")
        return held(stores.times_power(stored, exponent), stored.dtype, name)

    offset = q.offset
    if fmt.offset is not None and fmt.offset.kind == "min":
        offset = real(q.offset, fmt.offset.store)
    return replace(q, format=fmt, scale=real(q.scale, fmt.scale), offset=offset)
