"""Our own kernels: weights of up to 8 bits, multiplied as integers by the C++ core.

Activations that stay float are written in two digits of 8 bits, x ~= s (128 q0 + q1): a relative error of 2^-15 of the
largest of the 16 to 128 columns that share a scale, less than bfloat16 has. Quantized ones are multiplied as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.formats import InputQuantizer, Inputs, IntGrid, QTensor
from lowbit.kernels.core import core, why_absent
from lowbit.kernels.kernel import Kernel
from lowbit.kernels.layout import codes_of, pack, residual_of, why_not
from lowbit.kernels.thread_pool import multiplier

_TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_LONGEST = 128  # columns of activations that share a scale


@dataclass(frozen=True, eq=False)
class _Form:
    """A weight [rows, cols] as the core holds it, a `Factor`, for inputs of one kind."""

    factor: Any
    rows: int
    cols: int
    inputs: Inputs | None
    values: dict[torch.dtype, Any]  # names of types in the core


class Packed(Kernel):
    """The kernels of `lowbit._core`. `isa`: a set of instructions by name, "" for the best."""

    name = "packed"
    any_type = True

    def __init__(self, isa: str = "") -> None:
        self.isa = isa

    def declines(self, q: QTensor, dtype: torch.dtype, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"it runs on CPUs, the activations are on {device.type}"
        if dtype not in _TYPES:
            return f"it takes bfloat16, float16 and float32, not {dtype}"
        return why_not(q) or why_absent()

    def declines_inputs(self, q: QTensor, inputs: Inputs | None) -> str | None:
        if inputs is None or inputs.format is None:
            return None
        fmt, width = inputs.format, q.shape[-1]
        if inputs.outliers is not None:
            return "columns of outliers would need a second product"
        if not isinstance(fmt.grid, IntGrid) or not fmt.grid.is_signed or fmt.grid.bits != 8:
            return f"it multiplies inputs of 8 bits with a sign, and {fmt.grid} is another grid"
        if fmt.offset is not None or fmt.scale != "fp32":
            return "it takes symmetric inputs with scales in float32"
        if fmt.block.rows not in (1, -1) or (fmt.block.rows == -1) != inputs.static:
            return "a scale belongs to one token, or is stored and the same for all"
        if fmt.block.cols == -1 or fmt.block.cols >= width:
            return (
                "its codes reach -128, which these inputs leave out" if inputs.static and fmt.grid.lo != -128 else None
            )
        return (
            "stored scales that change along the width are not served"
            if inputs.static
            else _why_no_segment(q, fmt.block.cols)
        )

    def prepack(self, q: QTensor, dtype: torch.dtype, quantizer: InputQuantizer | None = None) -> _Form:
        module: Any = core()
        inputs = None if quantizer is None else quantizer.inputs
        fmt = None if inputs is None else inputs.format
        per_token = fmt is not None and (fmt.block.cols == -1 or fmt.block.cols >= q.shape[1])
        segment = 0 if fmt is None or per_token else fmt.block.cols
        static_scale, divisor = 0.0, None
        if quantizer is not None and quantizer.scale is not None:
            # 0 would mean a scale for each token; one that is 0 makes all inputs 0, as the least one does.
            static_scale = max(float(quantizer.scale.item()), 1e-38)
        if quantizer is not None and quantizer.divisor is not None:
            divisor = quantizer.divisor.detach().contiguous().numpy()
        codes = codes_of(q)
        residual = residual_of(q, codes)
        activations = module.ActivationSpec(
            bits=15 if fmt is None else 8, per_token=per_token, static_scale=static_scale, divisor=divisor
        )
        factor = module.Factor(
            pack(module, [codes], segment=segment), activations,
            residual=None if residual is None else pack(module, [residual], segment=segment),
        )  # fmt: skip
        values = {dtype: getattr(module.Value, name) for dtype, name in _TYPES.items()}
        return _Form(factor, q.shape[0], q.shape[1], inputs, values)

    def linear(self, x: Tensor, packed: _Form, bias: Tensor | None) -> Tensor:
        if packed.inputs is not None:
            raise ValueError(
                f"the weight was packed for {packed.inputs} inputs, and these are float; prepack it for them"
            )
        return self._product(x, packed, bias)

    def linear_of_quantized(self, x: Tensor, packed: _Form, bias: Tensor | None, quantizer: InputQuantizer) -> Tensor:
        if packed.inputs is not quantizer.inputs and packed.inputs != quantizer.inputs:
            raise ValueError(
                f"the weight was packed for {packed.inputs} inputs, not {quantizer.inputs}; prepack it for them"
            )
        return self._product(x, packed, bias)

    def _product(self, x: Tensor, packed: _Form, bias: Tensor | None) -> Tensor:
        count, cols = x.shape
        if cols != packed.cols:
            raise ValueError(f"inputs of width {cols} for a weight with {packed.cols} columns")
        x = x.contiguous()
        y = torch.empty(count, packed.rows, dtype=x.dtype)
        at = 0
        if bias is not None:
            if bias.shape != (packed.rows,):
                raise ValueError(f"a bias of shape {tuple(bias.shape)} for a weight with {packed.rows} rows")
            bias = bias.to(x.dtype).contiguous()
            at = bias.data_ptr()
        multiplier(self.isa).linear_at(packed.factor, x.data_ptr(), count, y.data_ptr(), packed.values[x.dtype], at)
        return y


def _why_no_segment(q: QTensor, width: int) -> str | None:
    """Why activations of `width` columns cannot share a scale beside this weight."""
    if width % 16 or width > _LONGEST:
        return f"inputs share a scale in groups of 16 to {_LONGEST} columns, in steps of 16, or over the row; not in {width}"
    group = q.format.block.cols
    if group in (-1, q.shape[-1]) or group % width == 0:
        return None
    return f"groups of {width} inputs do not divide groups of {group} weights"
