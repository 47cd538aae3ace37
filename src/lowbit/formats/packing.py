"""Dense packing: codes of any width in as few bytes as they need.

Codes form one little-endian stream: element i of a `bits`-wide tensor occupies the bits
[i * bits, (i + 1) * bits). No width wastes a bit; only the last byte may be part empty. Ternary
codes are packed five to a byte (3^5 = 243 <= 256, 1.6 bits each), as digits in base 3.

When every row fills whole bytes the result keeps the leading dimensions, so that a row or an
expert is a plain index into it; otherwise the stream is flat. The bytes are the same.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

# Codes unpacked at a time: bounds the int64 temporaries.
_CHUNK = 1 << 20


def unit(cardinality: int) -> tuple[int, int]:
    """(codes, bytes) of the smallest run of codes that fills whole bytes."""
    if cardinality == 3:
        return 5, 1
    bits = max(1, (cardinality - 1).bit_length())
    codes = 8 // math.gcd(8, bits)
    return codes, codes * bits // 8


def packed_bytes(count: int, cardinality: int) -> int:
    """Bytes that `count` codes take."""
    codes, size = unit(cardinality)
    whole, remainder = divmod(count, codes)
    return whole * size + math.ceil(remainder * size / codes)


def packed_shape(shape: tuple[int, ...], cardinality: int) -> tuple[int, ...]:
    """Shape of the packed bytes: rows kept when a row fills whole bytes, flat otherwise."""
    codes, size = unit(cardinality)
    if len(shape) > 1 and shape[-1] % codes == 0:
        return (*shape[:-1], shape[-1] // codes * size)
    return (packed_bytes(math.prod(shape), cardinality),)


def pack(codes: Tensor, cardinality: int) -> Tensor:
    """uint8 codes of any shape, each below `cardinality` -> uint8 bytes, see `packed_shape`."""
    shape = packed_shape(tuple(codes.shape), cardinality)
    per_unit, size = unit(cardinality)
    flat = codes.reshape(-1)
    if per_unit == 1:
        return flat.clone().view(shape)
    out = torch.empty(packed_bytes(flat.numel(), cardinality), dtype=torch.uint8, device=codes.device)
    step = _CHUNK // per_unit * per_unit
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        missing = -part.numel() % per_unit
        if missing:
            part = torch.cat([part, part.new_zeros(missing)])
        packed = _pack_units(part.view(-1, per_unit), cardinality, size).reshape(-1)
        at = start // per_unit * size
        out[at : at + packed.numel()] = packed[: out.numel() - at]
    return out.view(shape)


def unpack(packed: Tensor, shape: tuple[int, ...], cardinality: int) -> Tensor:
    """The uint8 codes of `shape` that were packed into `packed`."""
    per_unit, size = unit(cardinality)
    count = math.prod(shape)
    flat = packed.reshape(-1)
    if per_unit == 1:
        return flat.view(shape)
    out = torch.empty(-(-count // per_unit) * per_unit, dtype=torch.uint8, device=packed.device)
    missing = out.numel() // per_unit * size - flat.numel()
    if missing:
        flat = torch.cat([flat, flat.new_zeros(missing)])
    step = _CHUNK // per_unit
    units, result = flat.view(-1, size), out.view(-1, per_unit)
    for start in range(0, units.shape[0], step):
        _unpack_units(units[start : start + step], result[start : start + step], cardinality)
    return out[:count].view(shape)


def _base(cardinality: int) -> int:
    return 3 if cardinality == 3 else 1 << max(1, (cardinality - 1).bit_length())


def _pack_units(codes: Tensor, cardinality: int, size: int) -> Tensor:
    """[n, codes] -> [n, size] bytes: digits in base 2^bits (or 3), lowest first."""
    base = _base(cardinality)
    dtype = torch.uint8 if size == 1 else torch.int64
    value = codes[:, 0].to(dtype)
    for j in range(1, codes.shape[1]):
        value = value + codes[:, j].to(dtype) * base**j
    if size == 1:
        return value
    return torch.stack([(value >> (8 * k)) & 255 for k in range(size)], dim=1).to(torch.uint8)


def _unpack_units(units: Tensor, out: Tensor, cardinality: int) -> None:
    """[n, size] bytes -> [n, codes], written into `out`."""
    base = _base(cardinality)
    if units.shape[1] == 1 and base != 3 and sys.byteorder == "little":
        _spread(units[:, 0], out)
        return
    if units.shape[1] == 1:
        value = units[:, 0]
    else:
        value = units[:, 0].to(torch.int64)
        for k in range(1, units.shape[1]):
            value = value | (units[:, k].to(torch.int64) << (8 * k))
    for j in range(out.shape[1]):
        if base == 3:
            out[:, j] = value // 3**j % 3
        else:
            out[:, j] = (value >> (j * (base.bit_length() - 1))) & (base - 1)


def _spread(value: Tensor, out: Tensor) -> None:
    """One byte [n] -> 2, 4 or 8 codes [n, codes]: copies of it, each shifted to its own byte, in one wide integer."""
    count = out.shape[1]
    bits = 8 // count
    wide = {2: torch.int16, 4: torch.int32, 8: torch.int64}[count]
    value = value.to(wide)
    spread = value.clone()
    for j in range(1, count):
        spread |= value << (j * (8 - bits))
    # the low bits of every byte
    spread &= int.from_bytes(bytes([(1 << bits) - 1] * count), "little")
    out.copy_(spread.view(torch.uint8).view(out.shape))
