"""A weight as it will be stored, computed anew at every step, with gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowbit.errors import FormatError, WeightError
from lowbit.formats import QTensor, stores
from lowbit.formats.blocks import Block
from lowbit.formats.format import Store
from lowbit.formats.packing import pack
from lowbit.formats.qtensor import Stored, nearest_codes
from lowbit.interchange.tensors import TensorPlan
from lowbit.nn.parts import Parts
from lowbit.recipes.recipe import Recipe
from lowbit.training.learned_step import block_sizes, gain, rounded, scaled, step_of, unit
from lowbit.tuning.straight_through import straight_through
from lowbit.weights.finite import check_finite
from lowbit.weights.solve import solve

Scales = Literal["learned", "recomputed", "fixed"]


class WeightQuantizer(Parts):
    """What becomes of a weight; `quantize` gives what is stored of it, and calling it the values of that, with gradients."""

    def quantize(self, weight: Tensor) -> QTensor:
        """The weight, as its module has it, as it is stored. WeightError for values that are not finite."""
        raise NotImplementedError


class Recomputed(WeightQuantizer):
    """Scales found by the recipe's fit from the weight at hand, as `lowbit.quantize` does. Gradients go straight through."""

    def __init__(self, plan: TensorPlan, recipe: Recipe) -> None:
        super().__init__()
        self.plan, self.recipe = plan, recipe

    @torch.no_grad()
    def quantize(self, weight: Tensor) -> QTensor:
        q = solve(self.plan, weight.detach(), self.recipe, weight.device).qtensor()
        assert q is not None  # only planned weights have a quantizer
        return q if weight.device.type == "cpu" else q.to(weight.device)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight rounded, of its own shape and type."""
        rows = self.plan.as_rows(weight)
        return self.plan.as_rows(straight_through(rows, self.quantize(weight).dequantize(weight.dtype)))

    def extra_repr(self) -> str:
        return f"{self.plan.format}, scales recomputed"


class Kept(WeightQuantizer):
    """Scales, minima and learned levels that are tensors of the model: learned by its optimizer, or fixed.

    `range` float32, per block: a scale as a multiple of a power of two (`learned_step.unit`), about the end of its range.
    `minimum`, `levels`: in the units of weights. Zero-points (`zero`, level units) stay. A scale or minimum that is quantized
    itself has a quantizer of its own.
    """

    def __init__(self, q: QTensor, learned: bool, transposed: bool = False, name: str = "") -> None:
        super().__init__()
        fmt = q.format
        self.format, self.shape, self.transposed, self.name = fmt, tuple(q.shape), transposed, name
        self.learned = learned
        self.scale = self._of_store("scale", fmt.scale, q.scale)
        scales, offsets = q.scales(), q.offsets()
        if scales is not None:
            self._tensor("range", _centred(scales, fmt.scale) / unit(fmt), learned)
        self.offset = None
        if fmt.offset is not None and offsets is not None:
            self.offset = self._of_store("offset", fmt.offset.store, q.offset)
            minimum = fmt.offset.kind == "min"
            self._tensor("minimum" if minimum else "zero", offsets, learned and minimum)
        if q.levels is not None:
            self._tensor("levels", q.codebooks(), learned)

    def _tensor(self, name: str, values: Tensor, learned: bool) -> None:
        values = values.detach().to(torch.float32).clone()
        if learned:
            self.register_parameter(name, nn.Parameter(values))
        else:
            self.register_buffer(name, values)

    def _of_store(self, name: str, how: Store | None, stored: Stored | None) -> Kept | None:
        """The quantizer of scales or minima that are quantized themselves."""
        return Kept(stored, self.learned, name=f"{self.name}.{name}") if isinstance(stored, QTensor) else None

    @torch.no_grad()
    def quantize(self, weight: Tensor) -> QTensor:
        rows = (weight.transpose(-1, -2) if self.transposed else weight).detach()
        return self._quantize(rows, *self._values())

    def forward(self, weight: Tensor) -> Tensor:
        """The weight rounded, of its own shape and type."""
        rows = weight.transpose(-1, -2) if self.transposed else weight
        values = self._values()
        with torch.no_grad():
            q = self._quantize(rows.detach(), *values)
        given = [value if self.learned else None for value in values]
        dense = rounded(rows, q, *given)
        return dense.transpose(-1, -2) if self.transposed else dense

    def _values(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Scales, minima and levels as real values, functions of what is learned, as they are stored."""
        fmt, scale, minimum, levels = self.format, None, None, None
        if fmt.scale is not None:
            scale = step_of(self.range, fmt, self._gains())
            if not fmt.scale_signed:
                scale = scale.clamp_min(0)
            scale = self._as_stored(scale, fmt.scale, self.scale, fmt.exponent)
        if fmt.offset_kind == "min" and fmt.offset is not None:
            minimum = scaled(self.minimum, 1.0, self._gains())
            minimum = minimum.clamp_max(0) if fmt.spans_zero else minimum
            minimum = self._as_stored(minimum, fmt.offset.store, self.offset, fmt.exponent)
        if fmt.codebook is not None:
            levels = scaled(self.levels, 1.0, self._level_gains(fmt.codebook)).sort(-1).values
            levels = self._as_stored(levels, fmt.levels_store, None, fmt.exponent if fmt.scale is None else 0)
        return scale, minimum, levels

    def _gains(self) -> Tensor | float:
        found = gain(block_sizes(self.format.block, self.shape), self.format)
        return found.to(self.range.device) if isinstance(found, Tensor) else found

    def _level_gains(self, codebook: Block) -> Tensor | float:
        """One over the root of how many weights a level has on average, as LSQ has it for steps."""
        sizes = block_sizes(codebook, self.shape)
        found = (sizes / self.format.grid.cardinality) ** -0.5
        return found[..., None].to(self.levels.device) if isinstance(found, Tensor) else found

    def _as_stored(self, values: Tensor, how: Store, inner: Kept | None, exponent: int) -> Tensor:
        if inner is not None:
            if exponent:
                raise FormatError(f"{self.name}: a nested scale beside an exponent cannot be trained; use s=fp32")
            return inner(values.reshape(-1)).view(values.shape)
        with torch.no_grad():
            kept = self._checked(lambda: stores.rounded(stores.times_power(values, -exponent), str(how)))
            kept = stores.times_power(kept, exponent)
        return straight_through(values, kept)

    def _checked(self, of: Callable[[], Any]) -> Any:
        try:
            return of()
        except FormatError as problem:
            raise WeightError(f"tensor {self.name!r} does not fit {self.format}: {problem}") from None

    def _quantize(self, rows: Tensor, scale: Tensor | None, minimum: Tensor | None, levels: Tensor | None) -> QTensor:
        """`rows` [..., out, in] by scales, minima and levels as they are stored."""
        fmt, e = self.format, self.format.exponent
        rows = rows.to(torch.float32)
        check_finite(rows, self.name)
        q = QTensor(
            fmt, self.shape, rows,
            None if scale is None or fmt.scale is None else self._stored(scale, fmt.scale, self.scale, e),
            self._stored_offset(minimum),
            None if levels is None else stores.to_store(
                stores.times_power(levels, 0 if fmt.scale is not None else -e), fmt.levels_store
            ),
        )  # fmt: skip
        return replace(q, codes=pack(nearest_codes(rows, q), fmt.grid.cardinality))

    def _stored_offset(self, minimum: Tensor | None) -> Stored | None:
        offset = self.format.offset
        if offset is None:
            return None
        if minimum is not None:
            return self._stored(minimum, offset.store, self.offset, self.format.exponent)
        if offset.store == "grid":
            return pack(self.format.grid.encode(self.zero), self.format.grid.cardinality)
        return stores.to_store(self.zero, str(offset.store))

    def _stored(self, values: Tensor, how: Store, inner: Kept | None, exponent: int) -> Stored:
        if inner is not None:
            return inner.quantize(values.reshape(-1))
        return stores.to_store(stores.times_power(values, -exponent), str(how))

    def extra_repr(self) -> str:
        return f"{self.format}, scales {'learned' if self.learned else 'fixed'}"


def _centred(scales: Tensor, how: Store | None) -> Tensor:
    """Scales as they are; powers of two, which are rounded upwards, in the middle of what rounds to them."""
    return scales * 2.0**-0.5 if how == "e8m0" else scales


def weight_quantizer(q: QTensor, plan: TensorPlan, recipe: Recipe, scales: Scales) -> WeightQuantizer:
    """The quantizer of a planned weight that starts as `q`."""
    if scales == "recomputed":
        return Recomputed(plan, recipe)
    return Kept(q, scales == "learned", plan.transposed, plan.name)
