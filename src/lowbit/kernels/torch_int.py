"""Products of integers on a CPU: 8-bit inputs times weights of up to 8 bits, summed in int32, scaled at the end.

The algebra is that of `integer.py`. The sums run in `torch._int_mm`, where oneDNN uses the dot products of four bytes
that CPUs since 2019 have (AVX512-VNNI, AVX-VNNI, and their like on ARM). For many rows that is several times faster
than float32. Scales that change along the width cut the product into one for each group.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise, repeat

import torch
from torch import Tensor

from lowbit.formats import InputQuantizer, Inputs, IntGrid, QTensor, quantize_inputs
from lowbit.formats.blocks import Block
from lowbit.formats.inputs import outlier_columns
from lowbit.formats.nearest import inverse
from lowbit.kernels.kernel import Kernel

_TYPES = (torch.bfloat16, torch.float16, torch.float32)
_CHUNK = 1 << 17  # sums that are scaled piece by piece at a time: half a megabyte stays in the cache
_LONGEST = (2**31 - 1) // 128**2  # products of two int8 that an int32 holds


@dataclass(frozen=True)
class _Cut:
    """Columns cut into P pieces for which every scale is constant; [P, out] float32: what belongs to each piece.

    spans: (start, stop) of each. group: the column block of the inputs that it lies in. scale, minimum: of the weight.
    total: the sum of its values.
    """

    spans: list[tuple[int, int]]
    group: list[int]
    scale: Tensor
    minimum: Tensor | None
    total: Tensor


@dataclass
class _Codes:
    """A weight as int8 [out, in], with w = scale * code + minimum for each row and group, float32 [out, groups]."""

    codes: Tensor
    width: int
    scale: Tensor
    minimum: Tensor | None
    cuts: dict[int, _Cut] = field(default_factory=dict)

    def cut(self, input_width: int) -> _Cut:
        """The columns cut where a scale of the weight, or of inputs in blocks of `input_width`, changes; made once."""
        if input_width not in self.cuts:
            spans = list(pairwise(_borders(self.codes.shape[1], self.width, input_width)))
            starts = torch.tensor([start for start, _ in spans])
            sums = torch.stack([self.codes[:, start:stop].sum(1, dtype=torch.int32) for start, stop in spans])
            scale, minimum = self.scale.T[starts // self.width], None
            total = scale * sums
            if self.minimum is not None:
                minimum = self.minimum.T[starts // self.width]
                total += torch.tensor([[stop - start] for start, stop in spans]) * minimum
            self.cuts[input_width] = _Cut(spans, (starts // input_width).tolist(), scale, minimum, total)
        return self.cuts[input_width]

    def columns(self, index: Tensor) -> Tensor:
        """These columns of the weight, float32 [out, len(index)]."""
        dense, at = self.codes.index_select(1, index).float(), index // self.width
        dense *= self.scale.index_select(1, at)
        return dense if self.minimum is None else dense.add_(self.minimum.index_select(1, at))


def _borders(width: int, *blocks: int) -> list[int]:
    """0, every multiple of a block width or of the longest sum below `width`, `width`."""
    return sorted({at for block in (*blocks, _LONGEST) for at in range(0, width, block)} | {width})


def _block_width(block: Block, width: int) -> int:
    return width if block.cols == -1 else block.cols


class TorchInt(Kernel):
    """torch._int_mm: inputs quantized on the way, both operands int8, any block and offset of either."""

    name = "torch-int"
    MAX_PIECES = 64

    def declines_inputs(self, q: QTensor, inputs: Inputs | None) -> str | None:
        if inputs is None or inputs.format is None:
            return "it multiplies integers, and the inputs stay float"
        if not isinstance(inputs.format.grid, IntGrid):
            return f"it multiplies integers, and inputs on {inputs.format.grid} are none"
        if len(q.shape) == 2 and q.shape[1]:
            widths = [_block_width(block, q.shape[1]) for block in (q.format.block, inputs.format.block)]
            if len(_borders(q.shape[1], *widths)) - 1 > self.MAX_PIECES:
                return f"scales that change more than {self.MAX_PIECES} times a row cost more than integers save"
        return None

    def declines(self, q: QTensor, dtype: torch.dtype, device: torch.device) -> str | None:
        if len(q.shape) != 2 or not isinstance(q.format.grid, IntGrid):
            return "it multiplies matrices of integers only"
        if 0 in q.shape:
            return "it takes no empty weights"
        if device.type != "cpu":
            return f"it runs on CPUs, the activations are on {device.type}"
        return _inexact() if dtype in _TYPES else f"it takes bfloat16, float16 and float32, not {dtype}"

    def prepack(self, q: QTensor, dtype: torch.dtype, quantizer: InputQuantizer | None = None) -> _Codes:
        """Codes are levels with the zero-point taken off as far as int8 goes, so that little or no minimum is left."""
        grid, block, rows = q.format.grid, q.format.block, q.shape[0]
        row = torch.zeros(rows, dtype=torch.int64) if block.rows == -1 else torch.arange(rows) // block.rows
        scale, offset = q.scales()[0, row], q.offsets()  # type: ignore[index]
        kept = torch.zeros_like(scale) if offset is None else offset[0, row]
        zero = -kept * inverse(scale) if q.format.offset_kind == "min" else kept
        shift = zero.round().clamp_(grid.hi - 127, grid.lo + 128)
        minimum = scale * shift + kept if q.format.offset_kind == "min" else scale * (shift - kept)
        width = _block_width(block, q.shape[1])
        codes = grid.decode(q.unpacked()).sub_(shift.repeat_interleave(width, 1)[:, : q.shape[1]]).to(torch.int8)
        return _Codes(codes, width, scale, minimum if bool(minimum.any()) else None)

    def linear(self, x: Tensor, packed: _Codes, bias: Tensor | None) -> Tensor:
        raise NotImplementedError("this kernel multiplies quantized inputs only, and said so by declining")

    def linear_of_quantized(self, x: Tensor, packed: _Codes, bias: Tensor | None, quantizer: InputQuantizer) -> Tensor:
        """With scale and minimum s_a, m_a of the inputs and s_b, m_b of the weight, summed over pieces of n columns:

        s_a s_b (sum q_a q_b)  +  s_a (sum q_a) m_b  +  m_a (s_b sum q_b + n m_b)

        The first term is the integer product of each piece; the others are thin float products over all pieces.
        """
        inputs, values = quantizer.inputs, quantizer.divide(x)
        codes, scale, minimum = _signed(*quantize_inputs(values, inputs, quantizer.scale, quantizer.offset))
        block = inputs.format.block  # type: ignore[union-attr]
        if block.rows not in (1, -1):
            row = torch.arange(x.shape[0]) // block.rows
            scale, minimum = scale[row], None if minimum is None else minimum[row]
        cut = packed.cut(_block_width(block, x.shape[1]))
        step = max(32, _CHUNK // packed.codes.shape[0]) if len(cut.spans) > 1 else x.shape[0]
        scales = scale.split(step) if len(scale) > 1 else repeat(scale)
        parts = [_scaled_products(q_a, packed, cut, s_a) for q_a, s_a in zip(codes.split(step), scales)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts)
        if cut.minimum is not None:
            sums = torch.stack([codes[:, start:stop].sum(1, dtype=torch.int32) for start, stop in cut.spans], 1)
            y.addmm_(sums * scale[:, cut.group], cut.minimum)
        if minimum is not None:
            y.add_(minimum[:, cut.group] @ cut.total)
        if inputs.outliers is not None:
            hot = outlier_columns(values, inputs.outliers).nonzero()[:, 0]
            if len(hot):
                y.addmm_(values.index_select(1, hot), packed.columns(hot).t())
        return (y if bias is None else y.add_(bias)).to(x.dtype)


def _scaled_products(a: Tensor, packed: _Codes, cut: _Cut, scale: Tensor) -> Tensor:
    """Sum over pieces of s_a s_b (a b'), float32 [rows, out]; a scale that is the same in all is applied to the sum."""
    by_column, by_group = scale.shape[1] > 1, packed.scale.shape[1] > 1
    y: Tensor | None = None
    for i, (start, stop) in enumerate(cut.spans):
        part = torch._int_mm(a[:, start:stop], packed.codes[:, start:stop].t()).to(torch.float32)
        s_a, s_b = scale[:, cut.group[i], None], cut.scale[i]
        if by_column and by_group:
            part.mul_(s_a)
        last = s_b if by_group else s_a if by_column else None
        if y is None:
            y = part if last is None else part.mul_(last)
        else:
            y = y.add_(part) if last is None else y.addcmul_(part, last)
    assert y is not None  # empty weights are declined
    if not by_group:
        y.mul_(cut.scale[0])
    return y if by_column else y.mul_(scale)


def _signed(levels: Tensor, scale: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Levels as int8, with scale and minimum: x = scale * code + minimum. Unsigned levels are moved down by 128."""
    if levels.dtype == torch.int8:
        return levels, scale, None if offset is None else -scale * offset
    codes = (levels ^ 128).view(torch.int8)
    return codes, scale, scale * 128 if offset is None else scale * (128 - offset)


@lru_cache(maxsize=1)
def _inexact() -> str | None:
    """Why torch._int_mm is of no use here. Without VNNI, oneDNN adds pairs of products in 16 bits, which overflow."""
    if not hasattr(torch, "_int_mm"):
        return f"this PyTorch ({torch.__version__}) has no _int_mm"
    for rows in (1, 33):
        for value in (-128, 127):
            a, b = (torch.full((n, 64), v, dtype=torch.int8) for n, v in ((rows, value), (48, -128)))
            try:
                found = torch._int_mm(a, b.t())
            except RuntimeError as error:
                return f"torch._int_mm does not work here: {str(error).splitlines()[0]}"
            if not bool((found == value * -128 * 64).all()):
                return "the integer products of this CPU overflow"
    return None
