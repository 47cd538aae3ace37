"""pack-quantized: codes in words, for weights that are expanded (W4A16, W8A16) and W4A8; int-quantized: W8A8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.formats import Format, Inputs, QTensor
from lowbit.formats.grids import IntGrid
from lowbit.interchange.exporters.common.integers import (
    GROUPS,
    Integers,
    by_rows,
    group_count,
    group_size,
    is_symmetric,
    nearest_integers,
    undivided,
    why_not_integers,
)
from lowbit.interchange.exporters.compressed_tensors import activations
from lowbit.interchange.exporters.compressed_tensors.scheme import Refusal, Scheme, Spec, arguments, scale_dtype
from lowbit.interchange.layouts.compressed import pack_weight, pack_zero_points, signed_levels


class PackQuantized(Scheme):
    """4 or 8 bits in int32 words, a scale for a row or a group; inputs float, or int8 by token beside 4 bits.

    weight_packed int32 [out, in * bits / 32], weight_scale [out, groups], weight_shape int64 [2], and for an
    asymmetric grid weight_zero_point int32 [out * bits / 32, groups].
    """

    format_name = "pack-quantized"

    def claims(self, fmt: Format, inputs: Inputs | None) -> bool:
        rounded = inputs is not None and inputs.format is not None
        return isinstance(fmt.grid, IntGrid) and (fmt.grid.bits != 8 or not rounded)

    def refuses(self, fmt: Format, inputs: Inputs | None, shape: tuple[int, ...]) -> Refusal | None:
        rows, width = shape
        nearest = nearest_integers(fmt, width, asymmetric=inputs is None)
        reason = why_not_integers(fmt)
        if reason is not None:
            return Refusal(reason, nearest)
        if (reason := undivided(fmt, width)) is not None:
            return Refusal(reason, nearest, shape=True)
        if fmt.grid.bits not in (4, 8):
            return Refusal(f"it has {fmt.grid.bits} bits, and the kernels have 4 and 8", nearest)
        size = group_size(fmt)
        if size not in (-1, *GROUPS):
            return Refusal(
                f"its groups are of {size} inputs, and the kernels have {', '.join(map(str, GROUPS))}", nearest
            )
        if not is_symmetric(fmt) and (fmt.grid.bits == 8 or inputs is not None):
            return Refusal("it has zero-points, for which only 4-bit weights with float inputs have kernels", nearest)
        if width * fmt.grid.bits % 32 or (not is_symmetric(fmt) and rows * fmt.grid.bits % 32):
            return Refusal(
                f"{rows} x {width} codes of {fmt.grid.bits} bits fill no whole words of 32", "keep", shape=True
            )
        return activations.refuses_inputs(inputs, "int8", offsets=False, static=False)

    def weights(self, fmt: Format, shape: tuple[int, ...]) -> dict[str, Any]:
        size = group_size(fmt)
        if size == -1:
            return arguments(fmt.grid.bits, "int", "channel", is_symmetric(fmt))
        return arguments(fmt.grid.bits, "int", "group", is_symmetric(fmt), group_size=size)

    def spec(self, fmt: Format, shape: tuple[int, ...]) -> Spec:
        (rows, width), bits = shape, fmt.grid.bits
        spec: Spec = {
            "weight_packed": (torch.int32, (rows, width * bits // 32)),
            "weight_scale": (scale_dtype(fmt), (rows, group_count(fmt, width))),
            "weight_shape": (torch.int64, (2,)),
        }
        if not is_symmetric(fmt):
            spec["weight_zero_point"] = (torch.int32, (rows * bits // 32, group_count(fmt, width)))
        return spec

    def pack(self, q: QTensor) -> dict[str, Tensor]:
        stored, bits = Integers.of(q), q.format.grid.bits
        packed = {
            "weight_packed": pack_weight(stored.codes, bits),
            "weight_scale": stored.scales.to(scale_dtype(q.format)),
            "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
        }
        if not is_symmetric(q.format):
            packed["weight_zero_point"] = pack_zero_points(stored.zeros, bits)
        return packed

    def inputs(self, inputs: Inputs | None) -> dict[str, Any] | None:
        return activations.input_arguments(inputs)


class IntQuantized(Scheme):
    """8-bit levels as int8 beside inputs in int8: weight int8 [out, in], weight_scale float32 [out, 1] or [1]."""

    format_name = "int-quantized"

    def claims(self, fmt: Format, inputs: Inputs | None) -> bool:
        rounded = inputs is not None and inputs.format is not None
        return isinstance(fmt.grid, IntGrid) and fmt.grid.bits == 8 and rounded

    def refuses(self, fmt: Format, inputs: Inputs | None, shape: tuple[int, ...]) -> Refusal | None:
        nearest = "int8:tensor" if (fmt.block.rows, fmt.block.cols) == (-1, -1) else "int8:channel"
        reason = why_not_integers(fmt)
        if reason is None and group_size(fmt) != -1:
            reason = "its scales are for groups, and products of int8 have one scale a row"
        if reason is None and not is_symmetric(fmt):
            reason = "it has zero-points, and products of int8 have none for weights"
        if reason is not None:
            return Refusal(reason, nearest)
        return activations.refuses_inputs(inputs, "int8", offsets=True)

    def weights(self, fmt: Format, shape: tuple[int, ...]) -> dict[str, Any]:
        return arguments(8, "int", "tensor" if fmt.block.rows == -1 else "channel")

    def spec(self, fmt: Format, shape: tuple[int, ...]) -> Spec:
        scale = (1,) if fmt.block.rows == -1 else (shape[0], 1)
        return {"weight": (torch.int8, shape), "weight_scale": (torch.float32, scale)}

    def pack(self, q: QTensor) -> dict[str, Tensor]:
        scales = by_rows(q.scales(), 1 if q.format.block.rows == -1 else q.shape[0])
        levels = signed_levels(Integers.of(q).codes, 8)
        return {"weight": levels, "weight_scale": scales.reshape(self.spec(q.format, q.shape)["weight_scale"][1])}

    def inputs(self, inputs: Inputs | None) -> dict[str, Any] | None:
        return activations.input_arguments(inputs)

    def input_spec(self, inputs: Inputs | None) -> Spec:
        return activations.input_spec(inputs)

    def pack_inputs(self, inputs: Inputs | None, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return activations.pack_inputs(inputs, parts)


SCHEMES: tuple[Scheme, ...] = (IntQuantized(), PackQuantized())
