"""`--as awq`: the layout of AutoAWQ's "gemm" version, which vLLM and transformers read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowbit.formats import QTensor
from lowbit.interchange.exporters.common.cache_types import VLLM
from lowbit.interchange.exporters.common.folder_exporter import (
    FolderExporter,
    float_modules,
    is_packed,
)
from lowbit.interchange.exporters.common.integers import (
    GROUPS,
    Integers,
    group_count,
    group_size,
    nearest_block,
    undivided,
    why_not_integers,
)
from lowbit.interchange.exporters.common.published_experts import PublishedFolder
from lowbit.interchange.exporters.exporter import Becomes, Problem, as_written, exporter
from lowbit.interchange.exporters.gptq import half
from lowbit.interchange.layouts.awq import pack_awq
from lowbit.interchange.tensors import Contents, Specs, TensorPlan


@exporter
class Awq(FolderExporter):
    """qweight int32 [in, out / 8], qzeros int32 [groups, out / 8], scales fp16 [groups, out]; 4 bits, one group size.

    Symmetric weights have the zero-point 8 everywhere. Source: AutoAWQ's `WQLinear_GEMM`, vLLM `auto_awq.py`.
    """

    name = "awq"
    also = ("autoawq",)
    summary = "AWQ layout (gemm) for vLLM and transformers"
    tags = ("awq",)
    loading = (
        "vllm serve {folder}\n\n"
        "# or in Python, with `pip install gptqmodel`:\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('{folder}')"
    )
    caches = VLLM
    reader = "AWQ's readers"
    recipes: ClassVar[Mapping[str, tuple[str, str]]] = {"w4": ("search@uint4:g32:asym", "qronos@uint4:g32:asym")}
    experts_note = "for vLLM: transformers does not load experts in this layout and runs the model without them"
    tolerance = 2.0**-11  # scales are rounded to fp16

    def problem(self, layer: TensorPlan) -> Problem | None:
        fmt, (rows, width) = layer.format, layer.stored_shape
        assert fmt is not None
        nearest = f"uint4:{nearest_block(fmt, width)}:asym"
        if layer.inputs is not None:
            return Problem(
                layer.name,
                f"has inputs {layer.inputs}, and AWQ keeps inputs float; --as vllm can hold them",
                "the same recipe without a=",
            )
        if (reason := why_not_integers(fmt)) is not None:
            return Problem(layer.name, reason, nearest)
        if fmt.grid.bits != 4:
            return Problem(layer.name, f"has {fmt.grid.bits} bits, and AWQ has 4", nearest)
        if (reason := undivided(fmt, width)) is not None:
            return Problem(layer.name, reason, nearest, shape=True)
        if group_size(fmt) not in (-1, *GROUPS):
            return Problem(layer.name, f"has groups of {group_size(fmt)} inputs, for which there is no kernel", nearest)
        if rows % 8:
            return Problem(layer.name, f"{rows} outputs, which is not a multiple of eight", "keep", shape=True)
        return None

    def problems(self, model: Contents) -> list[Problem]:
        found = super().problems(model)
        packed = [t for t in model.tensors.values() if is_packed(t)]
        if not found:
            sizes = {t.name: _size(t) for t in packed}
            odd = next((n for n, size in sizes.items() if size != sizes[packed[0].name]), None)
            if odd is not None:
                reason = (
                    f"has groups of {sizes[odd]} where {packed[0].name} has {sizes[packed[0].name]}; AWQ has one size"
                )
                found.append(Problem(odd, reason, str(packed[0].format)))
        return found

    def becomes(self, model: Contents) -> Mapping[str, Becomes]:
        """One group size for all: the largest that every layer's own groups consist of, where they are not of one already."""
        found = dict(super().becomes(model))
        packed = [t for t in model.tensors.values() if is_packed(t)]
        if len({_size(as_written(t, found.get(t.name))) for t in packed}) > 1:
            fitting = [{group_size(f): f for f in self.layouts(t)} for t in packed]
            common = set.intersection(*map(set, fitting))
            if common:
                size = max(common)
                found |= {t.name: f[size] for t, f in zip(packed, fitting, strict=True) if _size(t) != size}
        return found

    def spec(self, layer: TensorPlan) -> Specs:
        fmt, (rows, width) = layer.format, layer.stored_shape
        assert fmt is not None
        groups = group_count(fmt, width)
        return {
            "qweight": (torch.int32, (width, rows // 8)),
            "qzeros": (torch.int32, (groups, rows // 8)),
            "scales": (torch.float16, (groups, rows)),
        }

    def pack(self, layer: TensorPlan, q: QTensor, model: PublishedFolder) -> dict[str, Tensor]:
        integers = Integers.of(q)
        return pack_awq(integers.codes, integers.zeros, half(integers.scales, layer.name))

    def section(self, model: Contents) -> dict[str, Any]:
        packed = next(t for t in model.tensors.values() if is_packed(t))
        return {
            "quant_method": "awq", "bits": 4, "group_size": _size(packed), "zero_point": True, "version": "gemm",
            "backend": "auto", "modules_to_not_convert": float_modules(model) or None,
        }  # fmt: skip


def _size(layer: TensorPlan) -> int:
    assert layer.format is not None
    return group_size(layer.format)
