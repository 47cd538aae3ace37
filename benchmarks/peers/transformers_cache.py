"""transformers' quantized caches (QuantizedCache, its backends), as caches that lowbit's measurement reads through.

It runs in an environment that has lowbit and the backend: pip install optimum-quanto hqq. What is measured is what a backend's own
`_quantize` and `_dequantize` make of keys and values, with the newest tokens exact that its layer keeps so: those since the last time that
`residual_length` of them were full. That everything is quantized again each time is left out, which is in its favour.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.measure.kv.stored import StoredSide

GROUP, RESIDUAL = 64, 128  # transformers' own defaults


@dataclass(frozen=True)
class BackendCache:
    """backend: quanto, hqq or fp8; bits that it stores a number in."""

    backend: str
    bits: int

    @property
    def stored_bits(self) -> float:
        """Bits of a number with scale and zero point of 16 bits each for a group; fp8 has one scale for all."""
        return 8.0 if self.backend == "fp8" else self.bits + 32 / GROUP

    @property
    def residual(self) -> int:
        """Tokens that are kept exactly at most."""
        return 0 if self.backend == "fp8" else RESIDUAL - 1

    def average_bits(self, context: int) -> float:
        """Those and what is kept exactly, half of the most at a time."""
        return self.stored_bits + 16 * (self.residual / 2) / context

    def side(self, layer: int, which: str) -> StoredSide:
        """As of `lowbit.measure.kv.stored.Cache`."""
        if self.backend == "fp8":
            return StoredSide(self._fp8)
        return StoredSide(self._read, 0, lambda query: query // RESIDUAL * RESIDUAL)

    def _read(self, x: Tensor) -> Tensor:
        from transformers.cache_utils import HQQQuantizedLayer, QuantoQuantizedLayer

        if self.backend == "quanto":
            layer: Any = QuantoQuantizedLayer(nbits=self.bits, q_group_size=GROUP, residual_length=RESIDUAL)
            axis = 0
        else:
            layer = HQQQuantizedLayer(
                nbits=self.bits, axis_key=1, axis_value=1, q_group_size=GROUP, residual_length=RESIDUAL
            )
            layer.keys, axis = torch.empty(0, dtype=x.dtype), 1
        found: Tensor = layer._dequantize(layer._quantize(x[None].contiguous(), axis=axis))
        return found.reshape(x.shape).to(x.dtype)

    def _fp8(self, x: Tensor) -> Tensor:
        """One scale for the tensor from its largest magnitude, as Fp8QuantizedLayer takes it of the prompt."""
        scale = x.abs().max() / torch.finfo(torch.float8_e4m3fn).max
        return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale
