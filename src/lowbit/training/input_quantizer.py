"""The inputs of a layer as they will be stored in few bits, with gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowbit.formats import Format, InputQuantizer, Inputs, stores
from lowbit.formats.blocks import reduce_blocks
from lowbit.formats.inputs import outlier_columns
from lowbit.nn.parts import Parts
from lowbit.training.learned_step import block_sizes, gain, residual, step_of, unit
from lowbit.tuning.straight_through import straight_through

Ranges = Literal["lsq", "pact", "fixed"]
_LEAST = 1e-30  # a scale of inputs stays above zero


class TrainedInputs(Parts):
    """What a layer's inputs become before the product. Calling it rounds them, with gradients.

    Of dynamic scales gradients go straight through. Where scales are static, `range` float32 [1, channel blocks] is the scale as a
    multiple of a power of two; it is learned (`lsq`, `pact`) or fixed, and what is clipped has no gradient.
    """

    def __init__(self, inputs: Inputs, width: int, parts: Mapping[str, Tensor], ranges: Ranges) -> None:
        """`width`: channels. `parts`: what is stored of the inputs (`Inputs.parts`)."""
        super().__init__()
        InputQuantizer.of(inputs, width, parts)  # FormatError for what does not fit
        self.inputs, self.width, self.ranges = inputs, width, ranges
        kept = {name.removeprefix("input_"): part.detach().clone() for name, part in parts.items()}
        if "scale" in kept and inputs.format is not None:
            end = kept.pop("scale") / unit(inputs.format)
            if ranges == "fixed":
                self.register_buffer("range", end)
            else:
                self.register_parameter("range", nn.Parameter(end))
        self.set_parts(kept)

    def quantizer(self) -> InputQuantizer:
        """What the inputs become, as it is stored."""
        with torch.no_grad():
            return self._quantizer(self._scale())

    def parts(self) -> dict[str, Tensor]:
        """What is stored beside the weight, as `Inputs.parts` names it."""
        found = self.quantizer()
        values = {"scale": found.scale, "offset": found.offset, "divisor": found.divisor}
        return {f"input_{name}": value.detach().clone() for name, value in values.items() if value is not None}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., channels] rounded, of its own shape and type."""
        scale = self._scale()
        with torch.no_grad():
            quantizer = self._quantizer(None if scale is None else scale.detach())
        if scale is not None:
            found: Tensor = _Static.apply(x, scale, quantizer, self.ranges == "pact")
            return found
        with torch.no_grad():
            kept = quantizer.round(x)
        divided = x if quantizer.divisor is None else quantizer.divide(x).to(x.dtype)
        return straight_through(divided, kept)

    def _scale(self) -> Tensor | None:
        fmt = self.inputs.format
        if fmt is None or not self.inputs.static:
            return None
        scale = step_of(self.range, fmt, self._gains(fmt)).clamp_min(_LEAST)
        store = str(fmt.scale)
        return scale if store == "fp32" else straight_through(scale, stores.rounded(scale.detach(), store))

    def _gains(self, fmt: Format) -> Tensor | float:
        """N is the channels that share a scale, without the tokens (Esser et al. 2020, section 2.2)."""
        found = gain(block_sizes(fmt.block, (1, self.width)), fmt)
        return found[0].to(self.range.device) if isinstance(found, Tensor) else found

    def _quantizer(self, scale: Tensor | None) -> InputQuantizer:
        return InputQuantizer(self.inputs, scale, getattr(self, "offset", None), getattr(self, "divisor", None))

    def extra_repr(self) -> str:
        return f"{self.inputs}, ranges {self.ranges}" if self.inputs.static else str(self.inputs)


class _Static(torch.autograd.Function):
    """Inputs by a stored scale. With `clipping` alone (PACT, Choi et al. 2018, equation 3, for both signs) the scale learns
    from what is clipped, and not from what is rounded (LSQ)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, quantizer: InputQuantizer, clipping: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.quantizer, ctx.clipping = quantizer, clipping
        return quantizer.round(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        quantizer: InputQuantizer = ctx.quantizer
        inputs, fmt = quantizer.inputs, quantizer.inputs.format
        assert fmt is not None and quantizer.scale is not None
        width = x.shape[-1]
        divided = quantizer.divide(x.detach()).reshape(-1, width)
        grad = gradients[0].to(torch.float32).reshape(-1, width)
        offset = None if quantizer.offset is None else quantizer.offset[None]
        change, inside = residual(divided, fmt, quantizer.scale[None], offset, minimum=False)
        if inputs.outliers is not None:  # columns that stay float
            hot = outlier_columns(divided, inputs.outliers)
            change, inside = change.masked_fill(hot, 0), inside | hot
        if ctx.clipping:
            change = change.masked_fill(inside, 0)
        (of_scale,) = reduce_blocks(lambda g, r: (g * r).sum(1), fmt.block, grad, change)
        of_x = grad * inside
        if quantizer.divisor is not None:
            of_x = of_x / quantizer.divisor
        assert of_scale is not None
        return of_x.view(x.shape).to(x.dtype), of_scale[0], None, None
