"""float-quantized and mxfp8-quantized: FP8 weights; nvfp4-pack-quantized and mxfp4-pack-quantized: two e2m1 to a byte."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowbit.formats import Format, Inputs, QTensor, parse_format
from lowbit.formats.packing import pack
from lowbit.formats.qtensor import encode, nearest_codes
from lowbit.interchange.exporters.compressed_tensors import activations
from lowbit.interchange.exporters.compressed_tensors.scheme import RECIPROCAL, Refusal, Scheme, Spec, arguments

_BLOCK = (128, 128)
_NVFP4, _MXFP4, _MXFP8 = (parse_format(name) for name in ("nvfp4", "mxfp4", "mxfp8"))


class FloatQuantized(Scheme):
    """weight float8_e4m3fn [out, in]; weight_scale float32 [out, 1], [1], or one for each block of 128 x 128."""

    format_name = "float-quantized"
    runs_experts = False

    def claims(self, fmt: Format, inputs: Inputs | None) -> bool:
        return fmt.grid.name in ("e4m3", "e5m2") and fmt != _MXFP8

    def refuses(self, fmt: Format, inputs: Inputs | None, shape: tuple[int, ...]) -> Refusal | None:
        strategy = self._strategy(fmt)
        if fmt.grid.name == "e5m2":
            return Refusal("its levels are e5m2, and the kernels have e4m3", "e4m3:channel")
        if strategy is None:
            return Refusal(f"its scales are for blocks of {fmt.block}", "e4m3:channel")
        if strategy == "128x128":
            if any(size % side for size, side in zip(shape, _BLOCK, strict=True)):
                return Refusal(f"blocks of 128 x 128 do not divide {shape[0]} x {shape[1]}", "e4m3:channel", shape=True)
            if inputs is not None and str(inputs) == "e4m3:g128":
                return None
            if inputs is not None:
                return Refusal(f"its inputs are {inputs}; beside blocks of weights they go by groups", "a=fp8:g128")
        return activations.refuses_inputs(inputs, "e4m3", offsets=False)

    @staticmethod
    def _strategy(fmt: Format) -> str | None:
        block = (fmt.block.rows, fmt.block.cols)
        return {(1, -1): "channel", (-1, -1): "tensor", _BLOCK: "128x128"}.get(block)

    def weights(self, fmt: Format, shape: tuple[int, ...]) -> dict[str, Any]:
        strategy = self._strategy(fmt)
        if strategy == "128x128":
            return arguments(8, "float", "block", block_structure=list(_BLOCK))
        return arguments(8, "float", str(strategy))

    def spec(self, fmt: Format, shape: tuple[int, ...]) -> Spec:
        rows, groups = fmt.block.counts(shape)[1:]
        scale = (1,) if self._strategy(fmt) == "tensor" else (rows, groups)
        return {"weight": (torch.float8_e4m3fn, shape), "weight_scale": (torch.float32, scale)}

    def pack(self, q: QTensor) -> dict[str, Tensor]:
        scales = q.scales()
        assert scales is not None
        return {
            "weight": q.unpacked().view(torch.float8_e4m3fn),
            "weight_scale": scales.reshape(self.spec(q.format, q.shape)["weight_scale"][1]),
        }

    def inputs(self, inputs: Inputs | None) -> dict[str, Any] | None:
        if inputs is not None and str(inputs) == "e4m3:g128":
            return arguments(8, "float", "group", group_size=128, dynamic=True)
        return activations.input_arguments(inputs)

    def input_spec(self, inputs: Inputs | None) -> Spec:
        return activations.input_spec(inputs)

    def pack_inputs(self, inputs: Inputs | None, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return activations.pack_inputs(inputs, parts)


class _Microscaled(Scheme):
    """Small float levels, a scale for each `group` inputs; the inputs stay float."""

    wanted: Format
    group: int
    bits: int

    def claims(self, fmt: Format, inputs: Inputs | None) -> bool:
        return fmt == self.wanted

    def refuses(self, fmt: Format, inputs: Inputs | None, shape: tuple[int, ...]) -> Refusal | None:
        if shape[1] % self.group:
            return Refusal(f"groups of {self.group} do not divide its {shape[1]} inputs", "e4m3:channel", shape=True)
        if inputs is not None:
            return Refusal(f"its inputs are {inputs}, and beside {fmt} they stay float", "the same recipe without a=")
        return None

    def weights(self, fmt: Format, shape: tuple[int, ...]) -> dict[str, Any]:
        return arguments(self.bits, "float", "group", group_size=self.group, scale_dtype="torch.uint8")


class Mxfp4(_Microscaled):
    """weight_packed uint8 [out, in / 2], weight_scale uint8 [out, in / 32], a biased power of two (OCP MX 1.0)."""

    format_name = "mxfp4-pack-quantized"
    wanted, group, bits = _MXFP4, 32, 4

    def spec(self, fmt: Format, shape: tuple[int, ...]) -> Spec:
        rows, width = shape
        return {
            "weight_packed": (torch.uint8, (rows, width // 2)),
            "weight_scale": (torch.uint8, (rows, width // self.group)),
        }

    def pack(self, q: QTensor) -> dict[str, Tensor]:
        assert isinstance(q.scale, Tensor)
        return {"weight_packed": q.codes, "weight_scale": q.scale[0].contiguous()}


class Mxfp8(_Microscaled):
    """weight float8_e4m3fn [out, in], weight_scale uint8 [out, in / 32]."""

    format_name = "mxfp8-quantized"
    wanted, group, bits = _MXFP8, 32, 8

    def spec(self, fmt: Format, shape: tuple[int, ...]) -> Spec:
        rows, width = shape
        return {
            "weight": (torch.float8_e4m3fn, shape),
            "weight_scale": (torch.uint8, (rows, width // self.group)),
        }

    def pack(self, q: QTensor) -> dict[str, Tensor]:
        assert isinstance(q.scale, Tensor)
        return {"weight": q.unpacked().view(torch.float8_e4m3fn), "weight_scale": q.scale[0].contiguous()}


class Nvfp4(_Microscaled):
    """weight_packed uint8 [out, in / 2], weight_scale e4m3 [out, in / 16], weight_global_scale float32 [1], a divisor."""

    format_name = "nvfp4-pack-quantized"
    wanted, group, bits = _NVFP4, 16, 4
    shares_scale = True
    changes = RECIPROCAL

    def rescaled(self, q: QTensor, others: list[QTensor]) -> QTensor:
        """On the largest global scale of all: local scales rounded to e4m3 once more, codes nearest to what they were."""
        assert isinstance(q.scale, QTensor)
        common = max(float(_global(each)) for each in (q, *others))
        if common == float(_global(q)):
            return q
        scale = encode(q.scale.dequantize(), q.scale.format, torch.full((1, 1, 1), common))
        fresh = replace(q, scale=scale)
        return replace(fresh, codes=pack(nearest_codes(q.dequantize(), fresh), q.format.grid.cardinality))

    def weights(self, fmt: Format, shape: tuple[int, ...]) -> dict[str, Any]:
        return arguments(4, "float", "tensor_group", group_size=self.group)

    def spec(self, fmt: Format, shape: tuple[int, ...]) -> Spec:
        rows, width = shape
        return {
            "weight_packed": (torch.uint8, (rows, width // 2)),
            "weight_scale": (torch.float8_e4m3fn, (rows, width // self.group)),
            "weight_global_scale": (torch.float32, (1,)),
        }

    def pack(self, q: QTensor) -> dict[str, Tensor]:
        assert isinstance(q.scale, QTensor)
        rows, groups = q.shape[0], q.shape[1] // self.group
        local = q.scale.unpacked().view(rows, groups)
        # A negative scale is a negative group: kernels read the scale without its sign.
        flip = (local & 0x80).repeat_interleave(self.group // 2, 1)
        return {
            "weight_packed": q.codes.view(rows, -1) ^ (flip | flip >> 4),
            "weight_scale": (local & 0x7F).view(torch.float8_e4m3fn),
            "weight_global_scale": 1 / _global(q),
        }


def _global(q: QTensor) -> Tensor:
    """The float32 [1] scale of the scales."""
    assert isinstance(q.scale, QTensor)
    scales = q.scale.scales()
    assert scales is not None
    return scales.reshape(1)


SCHEMES: tuple[Scheme, ...] = (FloatQuantized(), Mxfp4(), Nvfp4(), Mxfp8())
