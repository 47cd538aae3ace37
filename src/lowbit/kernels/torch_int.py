"""Products of integers on a CPU: 8-bit inputs times weights of up to 8 bits, summed in int32, scaled at the end.

The algebra is that of `integer.py`. The sums run in `torch._int_mm`, where oneDNN uses the dot products of four bytes
that CPUs since 2019 have (AVX512-VNNI, AVX-VNNI, and their like on ARM). For many rows that is several times faster
than float32. Scales that change along the width cut the product into one for each group.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from lowbit.formats import InputQuantizer, Inputs, IntGrid, QTensor, quantize_inputs
from lowbit.formats.blocks import Block
from lowbit.formats.inputs import outlier_columns
from lowbit.kernels.registry import Kernel

_TYPES = (torch.bfloat16, torch.float16, torch.float32)
_LONGEST = (2**31 - 1) // 128**2  # products of two int8 that an int32 holds


@dataclass(frozen=True)
class _Piece:
    """Columns start:stop, for which every scale is constant: scale and minimum of each row, and its sum of weights."""

    start: int
    stop: int
    codes: Tensor
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
    cut: dict[int, list[_Piece]] = field(default_factory=dict)

    def pieces(self, input_width: int) -> list[_Piece]:
        """The columns cut where a scale of the weight or of the inputs changes; made once."""
        if input_width not in self.cut:
            borders = _borders(self.codes.shape[1], self.width, input_width)
            self.cut[input_width] = [self._piece(start, stop) for start, stop in pairwise(borders)]
        return self.cut[input_width]

    def _piece(self, start: int, stop: int) -> _Piece:
        codes, at = self.codes[:, start:stop], start // self.width
        scale, minimum = self.scale[:, at], None if self.minimum is None else self.minimum[:, at]
        total = scale * codes.sum(1, dtype=torch.int32)
        total = total if minimum is None else total + (stop - start) * minimum
        return _Piece(start, stop, codes, scale.contiguous(), minimum, total)

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

    def prepack(self, q: QTensor, dtype: torch.dtype) -> _Codes:
        lo, rows = int(q.format.grid.lo), q.shape[0]
        shift = 128 if q.format.grid.hi > 127 else 0
        codes = (q.unpacked().to(torch.int16) + (lo - shift)).to(torch.int8)
        block = q.format.block
        row = torch.zeros(rows, dtype=torch.int64) if block.rows == -1 else torch.arange(rows) // block.rows
        scale, offset = q.scales()[0, row], q.offsets()  # type: ignore[index]
        minimum = scale * shift if shift else None
        if offset is not None:
            of_level_zero = offset[0, row] if q.format.offset_kind == "min" else -scale * offset[0, row]
            minimum = of_level_zero if minimum is None else of_level_zero + minimum
        return _Codes(codes, _block_width(block, q.shape[1]), scale, minimum)

    def linear(self, x: Tensor, packed: _Codes, bias: Tensor | None) -> Tensor:
        raise NotImplementedError("this kernel multiplies quantized inputs only, and said so by declining")

    def linear_of_quantized(self, x: Tensor, packed: _Codes, bias: Tensor | None, quantizer: InputQuantizer) -> Tensor:
        """With s_a, m_a scale and minimum of the inputs and s_b, m_b of the weight, for each group of columns:

        s_a (s_b sum q_a q_b + m_b sum q_a) + m_a (s_b sum q_b + n m_b), the last bracket known beforehand.
        """
        inputs, values = quantizer.inputs, quantizer.divide(x)
        codes, scale, minimum = _signed(*quantize_inputs(values, inputs, quantizer.scale, quantizer.offset))
        block = inputs.format.block  # type: ignore[union-attr]
        if block.rows not in (1, -1):
            row = torch.arange(x.shape[0]) // block.rows
            scale, minimum = scale[row], None if minimum is None else minimum[row]
        width = _block_width(block, x.shape[1])
        y: Tensor | None = None
        for piece in packed.pieces(width):
            at = piece.start // width
            q_a = codes[:, piece.start : piece.stop]
            part = torch._int_mm(q_a, piece.codes.t()).to(torch.float32).mul_(piece.scale)
            if piece.minimum is not None:
                part.addr_(q_a.sum(1, dtype=torch.int32).float(), piece.minimum)
            part.mul_(scale[:, at, None])
            if minimum is not None:
                part.addcmul_(minimum[:, at, None], piece.total)
            y = part if y is None else y.add_(part)
        assert y is not None  # empty weights are declined
        if inputs.outliers is not None:
            hot = outlier_columns(values, inputs.outliers).nonzero()[:, 0]
            if len(hot):
                y.addmm_(values.index_select(1, hot), packed.columns(hot).t())
        return (y if bias is None else y.add_(bias)).to(x.dtype)


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
