"""How a scale or an offset is kept: a plain type, rounded with care.

`fp32`, `fp16` and `bf16` round to nearest; a value that would vanish keeps the smallest magnitude of the
type, and one that would overflow is an error. `e8m0` (OCP MX 1.0, section 5.4.1: a power of two,
2^-127 to 2^127) rounds up, so that nothing clips; `e4m3` rounds to nearest (OCP FP8).
A scale that is itself quantized is a nested format and lives in `qtensor`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import FormatError, nearest

_FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "e4m3": 1, "e8m0": 1, "int32": 4}
SCALE_STORES = ("fp32", "fp16", "bf16", "e8m0", "e4m3")
FLOAT_STORES = ("fp32", "fp16", "bf16")


def check_store(name: str, allowed: tuple[str, ...], what: str) -> None:
    """FormatError unless `name` is one of `allowed`."""
    if name not in allowed:
        raise FormatError(f"{what} cannot be stored as {name!r} ({', '.join(allowed)}){nearest(name, allowed)}")


def store_bytes(name: str) -> int:
    """Bytes of one stored value."""
    return _BYTES[name]


def stored_dtype(name: str) -> torch.dtype:
    """The tensor type on disk: fp8 scales are kept as their bytes (uint8), exponents too."""
    if name == "int32":
        return torch.int32
    return _FLOATS[name] if name in FLOAT_STORES else torch.uint8


def is_signed(name: str) -> bool:
    """Whether a negative value can be stored; only exponents cannot."""
    return name != "e8m0"


def to_store(values: Tensor, name: str) -> Tensor:
    """float32 values -> what is stored. FormatError when a value is too large for the type."""
    if name == "e8m0":
        # frexp: v = m * 2^e with 0.5 <= m < 1, so the next power of two up is 2^e (2^(e-1) when m = 0.5).
        mantissa, exponent = torch.frexp(values.clamp_min(2.0**-127))
        return (exponent - (mantissa == 0.5).to(exponent.dtype) + 127).clamp_(0, 254).to(torch.uint8)
    if name == "int32":
        return values.round().clamp_(-(2.0**31), 2.0**31 - 128).to(torch.int32)
    dtype = _FLOATS[name]
    info = torch.finfo(dtype)
    peak = float(values.abs().max()) if values.numel() else 0.0
    if peak > info.max:
        raise FormatError(f"a scale or offset of {peak:.3g} does not fit {name} (largest {info.max:.3g}); use fp32")
    stored = values.to(dtype)
    if dtype != torch.float32:
        tiny = info.smallest_normal * info.eps
        stored = torch.where((stored.float() == 0) & (values != 0), values.sign() * tiny, values).to(dtype)
    return stored.view(torch.uint8) if name == "e4m3" else stored


def from_store(stored: Tensor, name: str) -> Tensor:
    """What is stored -> float32."""
    if name == "e8m0":
        return torch.exp2(stored.to(torch.float32) - 127)
    if name == "e4m3":
        return stored.view(torch.float8_e4m3fn).to(torch.float32)
    return stored.to(torch.float32)


def times_power(values: Tensor, exponent: int) -> Tensor:
    """values * 2^exponent as float32, exact where that is a normal number; in two steps, as 2^exponent itself may be none."""
    half = exponent // 2
    return values.to(torch.float32) * 2.0**half * 2.0 ** (exponent - half)


def span(name: str) -> tuple[float, float]:
    """The smallest scale that a store keeps to 7 bits or to all it has, and the largest. Of stores that hold more: between
    which float32 sums of cubes of weights (what fits compare) neither vanish nor overflow."""
    if name not in ("fp16", "e4m3"):
        return 2.0**-50, 2.0**24
    info = torch.finfo(_FLOATS[name])
    return info.smallest_normal * min(1.0, info.eps * 2.0**7), info.max


def rounded(values: Tensor, name: str) -> Tensor:
    """The float32 values that would be read back."""
    return from_store(to_store(values, name), name)
