"""`--as gptq`: the layout of AutoGPTQ and GPTQModel, which vLLM, transformers and ExLlama read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowbit.formats import QTensor
from lowbit.interchange.exporters.common.cache_types import VLLM
from lowbit.interchange.exporters.common.exponents import held
from lowbit.interchange.exporters.common.folder_exporter import (
    FolderExporter,
    float_modules,
    is_packed,
    module_of,
)
from lowbit.interchange.exporters.common.fused import experts_of, whole_of
from lowbit.interchange.exporters.common.integers import (
    Integers,
    group_count,
    group_size,
    is_symmetric,
    nearest_integers,
    undivided,
    why_not_integers,
)
from lowbit.interchange.exporters.common.published_experts import PublishedFolder
from lowbit.interchange.exporters.exporter import Problem, exporter
from lowbit.interchange.layouts.gptq import pack_gptq
from lowbit.interchange.tensors import Contents, Specs, TensorPlan
from lowbit.version import __version__

_BITS = (2, 3, 4, 8)
_GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)


@exporter
class Gptq(FolderExporter):
    """qweight int32 [in * bits / 32, out], qzeros int32 [groups, out * bits / 32], scales fp16 [groups, out], g_idx [in].

    Symmetric models say "gptq" (zero-points stored less one), others "gptq_v2" (as they are): with the older one a
    zero-point of 0 has no code of its own. Source: GPTQModel `nn_modules/qlinear`, vLLM `auto_gptq.py`.
    """

    name = "gptq"
    also = ("gptqmodel", "autogptq")
    summary = "GPTQ layout for GPTQModel, vLLM and transformers"
    tags = ("gptq",)
    loading = (
        "vllm serve {folder}\n\n"
        "# or in Python, with `pip install gptqmodel`:\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('{folder}')"
    )
    caches = VLLM
    reader = "GPTQ's readers"
    recipes: ClassVar[Mapping[str, tuple[str, str]]] = {
        "w8": ("search@int8:channel", "search@int8:channel"),
        "w3": ("search@int3:g32", "qronos@int3:g32"),
        "w2": ("search@int2:g16", "qronos@int2:g16"),
    }
    mixed = ("int2:g32", "int3:g32", "int4:g64", "int4:g32", "int8:g32")
    experts_note = (
        "for GPTQModel and vLLM: transformers does not load experts in this layout and runs the model without them"
    )
    tolerance = 2.0**-11  # scales are rounded to fp16

    def problem(self, layer: TensorPlan) -> Problem | None:
        fmt, (rows, width) = layer.format, layer.stored_shape
        assert fmt is not None
        nearest = nearest_integers(fmt, width)
        if layer.inputs is not None:
            return Problem(
                layer.name,
                f"has inputs {layer.inputs}, and GPTQ keeps inputs float; --as vllm can hold them",
                "the same recipe without a=",
            )
        if (reason := why_not_integers(fmt)) is not None:
            return Problem(layer.name, reason, nearest)
        if (reason := undivided(fmt, width)) is not None:
            return Problem(layer.name, reason, nearest, shape=True)
        if fmt.grid.bits not in _BITS:
            return Problem(layer.name, f"has {fmt.grid.bits} bits; GPTQ has 2, 3, 4 and 8", nearest)
        if group_size(fmt) not in _GROUPS:
            return Problem(layer.name, f"has groups of {group_size(fmt)} inputs, for which there is no kernel", nearest)
        if width * fmt.grid.bits % 32 or rows * fmt.grid.bits % 32:
            return Problem(layer.name, f"{rows} x {width} codes fill no whole words of 32 bits", "keep", shape=True)
        return None

    def problem_of_transposed(self, layer: TensorPlan) -> Problem | None:
        """vLLM alone reads such layers, and it has kernels for symmetric weights of 4 and 8 bits."""
        fmt = layer.format
        assert fmt is not None
        if is_symmetric(fmt) and fmt.grid.bits in (4, 8):
            return None
        reason = "is kept [in, out] by its module; of such layers vLLM alone reads symmetric ones of 4 or 8 bits"
        nearest = nearest_integers(fmt, layer.stored_shape[-1], asymmetric=False)
        return Problem(layer.name, reason, nearest)

    def spec(self, layer: TensorPlan) -> Specs:
        fmt, (rows, width) = layer.format, layer.stored_shape
        assert fmt is not None
        bits, groups = fmt.grid.bits, group_count(fmt, width)
        return {
            "qweight": (torch.int32, (width * bits // 32, rows)),
            "qzeros": (torch.int32, (groups, rows * bits // 32)),
            "scales": (torch.float16, (groups, rows)),
            "g_idx": (torch.int32, (width,)),
        }

    def pack(self, layer: TensorPlan, q: QTensor, model: PublishedFolder) -> dict[str, Tensor]:
        width, integers = q.shape[1], Integers.of(q)
        size = group_size(q.format)
        version = 1 if is_symmetric(q.format) else 2
        scales = half(integers.scales, layer.name)
        packed = pack_gptq(integers.codes, integers.zeros, scales, q.format.grid.bits, version=version)
        return packed | {"g_idx": (torch.arange(width) // (width if size == -1 else size)).to(torch.int32)}

    def problems(self, model: Contents) -> list[Problem]:
        found = super().problems(model)
        packed = [t for t in model.tensors.values() if is_packed(t)]
        if not found and len({_symmetric(t) for t in packed}) > 1:
            odd = next(t for t in packed if _symmetric(t))
            found.append(
                Problem(
                    odd.name,
                    "has no zero-points where other layers do; a GPTQ folder has them in all layers or in none",
                    _asym(packed),
                )
            )
        return found

    def section(self, model: Contents) -> dict[str, Any]:
        packed = [t for t in model.tensors.values() if is_packed(t)]
        kinds = [_kind(t) for t in packed]
        base = max(sorted(set(kinds)), key=kinds.count)
        symmetric = _symmetric(packed[0])
        dynamic: dict[str, dict[str, int]] = {}
        for layer, kind in zip(packed, kinds, strict=True):
            if kind != base:
                for pattern in _patterns(module_of(layer.name)):
                    dynamic[f"+:{pattern}"] = {"bits": kind[0], "group_size": kind[1]}
        layers = [m for m in float_modules(model) if m.rpartition(".")[2] != "lm_head"]
        for module in layers:
            for pattern in _patterns(module):
                dynamic[f"-:{pattern}"] = {}
        version = "gptq" if symmetric else "gptq_v2"
        section: dict[str, Any] = {
            "quant_method": "gptq", "bits": base[0], "group_size": base[1], "sym": symmetric, "desc_act": False,
            "lm_head": False, "checkpoint_format": version, "format": version, "pack_dtype": "int32",
            "meta": {"quantizer": [f"lowbit:{__version__}"]},
        }  # fmt: skip
        return section | ({"dynamic": dynamic} if dynamic else {})


def half(scales: Tensor, name: str) -> Tensor:
    """Scales as fp16, which readers of these layouts have for them. ExportError when one does not fit."""
    return held(scales, torch.float16, name)


def _kind(layer: TensorPlan) -> tuple[int, int]:
    assert layer.format is not None
    return layer.format.grid.bits, group_size(layer.format)


def _symmetric(layer: TensorPlan) -> bool:
    assert layer.format is not None
    return is_symmetric(layer.format)


def _asym(packed: list[TensorPlan]) -> str:
    return str(next(t.format for t in packed if not _symmetric(t)))


def _patterns(module: str) -> list[str]:
    """Regular expressions of a module and, where vLLM makes it part of a larger one, of that; all experts of a layer by one."""
    if (experts := experts_of(module)) or module.endswith(".experts"):
        return [rf"^{re.escape(experts or module)}(\..*)?$"]
    return [f"^{re.escape(name)}$" for name in dict.fromkeys((module, whole_of(module)))]
