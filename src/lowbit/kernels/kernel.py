"""One operation, many implementations: y = x W^T + b for a packed W.

A kernel says whether it can serve a weight (`declines` gives the reason when not) and prepacks it once. Where the inputs are
quantized too, a kernel of float inputs multiplies what they round to, which defines what is right; one that multiplies the
integers themselves overrides `linear_of_quantized`. Files never depend on a kernel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from lowbit.formats import InputQuantizer, Inputs, QTensor


class Kernel(ABC):
    """An implementation of the packed linear layer."""

    name: str
    any_type = False  # whether what `prepack` gives serves activations of every type

    @abstractmethod
    def declines(self, q: QTensor, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why this kernel cannot multiply activations of `dtype` with `q`, or None if it can."""

    @abstractmethod
    def prepack(self, q: QTensor, dtype: torch.dtype, quantizer: InputQuantizer | None = None) -> Any:
        """What the kernel wants to have of the weight, computed once, for inputs that `quantizer` rounds."""

    @abstractmethod
    def linear(self, x: Tensor, packed: Any, bias: Tensor | None) -> Tensor:
        """x [rows, in] -> [rows, out], in the type of `x`."""

    def declines_inputs(self, q: QTensor, inputs: Inputs | None) -> str | None:
        """Why this kernel cannot multiply with inputs stored as `inputs` (None: float), or None if it can."""
        return None

    def linear_of_quantized(self, x: Tensor, packed: Any, bias: Tensor | None, quantizer: InputQuantizer) -> Tensor:
        """As `linear`, with `x` quantized on the way."""
        return self.linear(quantizer.round(x), packed, bias)
