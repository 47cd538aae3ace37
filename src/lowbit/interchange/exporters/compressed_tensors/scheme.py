"""One way to store a linear layer in compressed-tensors: its arguments in config.json and its tensors.

A scheme is one object of `SCHEMES` in a file of this package. Facts are those of the `compressed-tensors` package
(`quantization/quant_args.py`, `compressors/`) and of what vLLM accepts (`compressed_tensors.py`, its schemes and kernels).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowbit.formats import Format, Inputs, QTensor

Spec = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class Refusal(NamedTuple):
    """Why a scheme cannot hold a layer, and the text of what it holds: of a format, or of inputs as `a=...`.

    `shape`: it is the shape of the layer that is not for the format.
    """

    reason: str
    nearest: str
    shape: bool = False


# A float32 scale s that is stored as the divisor 1 / s comes back as 1 / (1 / s). Each division rounds by 2^-24, so that is s
# or its neighbour, 2^-23 away; where the mantissa of s is above the root of 2, divisors lie further apart than scales, and no
# divisor gives s exactly. Products of weights with it then round by 2^-24 once more on either side.
RECIPROCAL = 2.0**-22
# What rounding a scale to e4m3 once more changes of a weight, at most: half a unit in the last place of three bits.
RESCALED = 2.0**-4


class Scheme(ABC):
    """`format_name` as compressed-tensors calls it; `shares_scale`: layers that are run as one have one scale in common.

    `changes`: how far a weight may be when it is read back, |a - b| / |b|.
    `runs_experts`: vLLM has experts of these weights whose inputs stay float (`compressed_tensors_moe.py`).
    """

    format_name: str
    shares_scale = False
    runs_experts = True
    changes = 0.0

    @abstractmethod
    def claims(self, fmt: Format, inputs: Inputs | None) -> bool:
        """Whether this is the scheme for such a layer; `refuses` may still find something wrong with it."""

    @abstractmethod
    def refuses(self, fmt: Format, inputs: Inputs | None, shape: tuple[int, ...]) -> Refusal | None:
        """What is wrong with a layer [out, in] that this scheme claims, or None."""

    @abstractmethod
    def weights(self, fmt: Format, shape: tuple[int, ...]) -> dict[str, Any]:
        """The arguments of the weights in config.json."""

    @abstractmethod
    def spec(self, fmt: Format, shape: tuple[int, ...]) -> Spec:
        """What is stored of a weight: name after the module's -> (dtype, shape)."""

    @abstractmethod
    def pack(self, q: QTensor) -> dict[str, Tensor]:
        """The tensors that `spec` announces."""

    def rescaled(self, q: QTensor, others: list[QTensor]) -> QTensor:
        """The weight on the scale that it has in common with those it is run with (`shares_scale`)."""
        return q

    def inputs(self, inputs: Inputs | None) -> dict[str, Any] | None:
        """The arguments of the inputs in config.json, or None where they stay float."""
        return None

    def input_spec(self, inputs: Inputs | None) -> Spec:
        """What is stored of the inputs."""
        return {}

    def pack_inputs(self, inputs: Inputs | None, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that `input_spec` announces, of what lowbit stores of the inputs (`Inputs.parts`)."""
        return {}


def arguments(bits: int, kind: str, strategy: str, symmetric: bool = True, **more: Any) -> dict[str, Any]:
    """Quantization arguments as compressed-tensors writes them."""
    return {"num_bits": bits, "type": kind, "symmetric": symmetric, "strategy": strategy, "dynamic": False} | more


def scale_dtype(fmt: Format) -> torch.dtype:
    """How a scale is stored: its own float type; float32 where it has none, is quantized itself, or leaves the range of it
    but for the format's exponent."""
    if fmt.exponent:
        return torch.float32
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(str(fmt.scale), torch.float32)
