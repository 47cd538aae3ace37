"""The reference kernel: expand the weight, multiply. It accepts everything and defines what is right."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.formats import InputQuantizer, QTensor
from lowbit.kernels.kernel import Kernel


class Expand(Kernel):
    """Dequantize in float32, round to the type of the activations, multiply dense; the weight stays packed."""

    name = "expand"

    def declines(self, q: QTensor, dtype: torch.dtype, device: torch.device) -> str | None:
        return None

    def prepack(self, q: QTensor, dtype: torch.dtype, quantizer: InputQuantizer | None = None) -> QTensor:
        return q

    def linear(self, x: Tensor, packed: QTensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, packed.dequantize(x.dtype), bias)
