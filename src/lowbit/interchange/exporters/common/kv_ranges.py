"""How far keys and values of a model go, for programs that keep them in few bits: a scale for each layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# What a program may keep keys and values in -> the type of a stored number.
KINDS: dict[str, torch.dtype] = {"fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class KVRanges:
    """The largest |key| and |value| that each layer put into its cache, keys after rotation.

    kind    a name of `KINDS`
    text    where they were seen, in words
    layers  (of keys, of values) of layer 0, 1, ...; finite and not negative
    """

    kind: str
    text: str
    layers: tuple[tuple[float, float], ...]

    def scales(self, layer: int) -> tuple[float, float]:
        """(of keys, of values): x is stored as x / scale, and the largest x as the largest number of the type.

        A layer that never had anything but zeros gets 1, since readers take a scale of 0 for none.
        """
        largest = torch.finfo(KINDS[self.kind]).max
        keys, values = (peak / largest or 1.0 for peak in self.layers[layer])
        return keys, values


def stored(x: Tensor, kind: str, scale: float) -> Tensor:
    """float32, the shape of `x`: what a cache that keeps `kind` gives back of keys or values, cut at its largest number."""
    dtype = KINDS[kind]
    largest = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-largest, largest).to(dtype).float() * scale
