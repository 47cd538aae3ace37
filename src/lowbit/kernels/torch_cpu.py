"""Kernels that PyTorch already has for CPUs: weight-only int8 and int4 products.

They are private operators of PyTorch, so each is looked up, and declines when a version lacks it. In bfloat16
both beat a dense float32 product for one row; for many rows expanding the weight wins, which is what the
dispatcher finds out by measuring.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.formats import InputQuantizer, IntGrid, QTensor
from lowbit.kernels.kernel import Kernel

_TYPES = (torch.bfloat16, torch.float16, torch.float32)


def _wrong_place(op: str, dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"it runs on CPUs, the activations are on {device.type}"
    if not hasattr(torch, op):
        return f"this PyTorch ({torch.__version__}) has no {op}"
    return None if dtype in _TYPES else f"it takes bfloat16, float16 and float32, not {dtype}"


def _too_small(q: QTensor, dtype: torch.dtype) -> str | None:
    """These operators take scales in the type of the activations, where float16 would lose most bits of a small one."""
    scales = q.scales()
    if dtype is not torch.float16 or scales is None:
        return None
    limit, most = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    size = scales.abs()
    lost = bool(((size != 0) & (size < limit) | (size > most)).any())
    return f"it takes scales in float16, and some are below {limit:.1e} or above {most:.0f}" if lost else None


class TorchInt8(Kernel):
    """torch._weight_int8pack_mm: int8 codes, one scale a row, or groups (one call each)."""

    name = "torch-int8"
    MAX_GROUPS = 128
    STEP = 32  # PyTorch 2.13 with AVX-512 gives garbage or crashes where 16 does not divide the width; 32 is on the safe side

    def declines(self, q: QTensor, dtype: torch.dtype, device: torch.device) -> str | None:
        fmt = q.format
        if len(q.shape) != 2 or not isinstance(fmt.grid, IntGrid) or not fmt.grid.is_signed or fmt.offset is not None:
            return "it multiplies symmetric signed integers only"
        if fmt.grid.bits != 8 or fmt.block.rows != 1:
            return "it takes 8-bit codes with one scale a row or group"
        if fmt.block.counts(q.shape)[2] > self.MAX_GROUPS:
            return f"more than {self.MAX_GROUPS} groups a row cost more than they save"
        if q.shape[1] % self.STEP or (fmt.block.cols != -1 and fmt.block.cols % self.STEP):
            return f"it reads beyond the end of rows and groups that are not multiples of {self.STEP}"
        return _wrong_place("_weight_int8pack_mm", dtype, device) or _too_small(q, dtype)

    def prepack(
        self, q: QTensor, dtype: torch.dtype, quantizer: InputQuantizer | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        codes = (q.unpacked().to(torch.int16) + int(q.format.grid.lo)).to(torch.int8)
        scales = q.scales()[0].to(dtype)  # type: ignore[index]
        width = q.shape[1] if q.format.block.cols == -1 else q.format.block.cols
        return [(c.contiguous(), scales[:, i].contiguous()) for i, c in enumerate(codes.split(width, dim=1))]

    def linear(self, x: Tensor, packed: list[tuple[Tensor, Tensor]], bias: Tensor | None) -> Tensor:
        start, y = 0, None
        x = x.contiguous()
        for codes, scale in packed:
            part = torch._weight_int8pack_mm(x[:, start : start + codes.shape[1]].contiguous(), codes, scale)
            start += codes.shape[1]
            y = part if y is None else y.add_(part)
        if y is None:
            y = x.new_zeros(x.shape[0], 0)
        return y if bias is None else y.add_(bias)


class TorchInt4(Kernel):
    """torch._weight_int4pack_mm_for_cpu: 4-bit codes in groups of 32, 64, 128 or 256, any offset."""

    name = "torch-int4"

    def declines(self, q: QTensor, dtype: torch.dtype, device: torch.device) -> str | None:
        fmt = q.format
        if len(q.shape) != 2 or not isinstance(fmt.grid, IntGrid) or fmt.grid.bits != 4:
            return "it multiplies 4-bit integers only"
        if fmt.block.rows != 1 or fmt.block.cols not in (32, 64, 128, 256):
            return "it takes groups of 32, 64, 128 or 256 weights"
        if q.shape[1] % fmt.block.cols or q.shape[0] % 16:
            return "it takes whole groups and rows in multiples of 16"
        return _wrong_place("_weight_int4pack_mm_for_cpu", dtype, device) or _too_small(q, dtype)

    def prepack(
        self, q: QTensor, dtype: torch.dtype, quantizer: InputQuantizer | None = None
    ) -> tuple[Tensor, int, Tensor]:
        codes = torch._convert_weight_to_int4pack_for_cpu(q.unpacked().to(torch.int32), 2)
        scale = q.scales()[0]  # type: ignore[index]
        # The operator computes scale * (code - 8) + shift; ours is scale * (code + lo - offset) or + minimum.
        shift = scale * (q.format.grid.lo + 8)
        offset = q.offsets()
        if offset is not None:
            shift = shift + (offset[0] if q.format.offset_kind == "min" else -scale * offset[0])
        both = torch.stack([scale.T, shift.T], dim=-1).to(dtype).contiguous()
        return codes, q.format.block.cols, both

    def linear(self, x: Tensor, packed: tuple[Tensor, int, Tensor], bias: Tensor | None) -> Tensor:
        y = torch._weight_int4pack_mm_for_cpu(x.contiguous(), *packed)
        return y if bias is None else y.add_(bias)
