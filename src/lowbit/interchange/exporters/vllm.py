"""`--as vllm`: a folder in compressed-tensors, which vLLM, SGLang and transformers read."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from lowbit.formats import QTensor
from lowbit.interchange.exporters.common.cache_types import VLLM
from lowbit.interchange.exporters.common.folder_exporter import (
    FolderExporter,
    float_modules,
    is_packed,
    module_of,
)
from lowbit.interchange.exporters.common.fused import experts_of, whole_of
from lowbit.interchange.exporters.common.integers import nearest_block, nearest_integers
from lowbit.interchange.exporters.common.kv_ranges import KVRanges
from lowbit.interchange.exporters.common.published_experts import PublishedFolder, published
from lowbit.interchange.exporters.compressed_tensors import kv_cache
from lowbit.interchange.exporters.compressed_tensors.float_schemes import SCHEMES as FLOATS
from lowbit.interchange.exporters.compressed_tensors.integer_schemes import SCHEMES as INTEGERS
from lowbit.interchange.exporters.compressed_tensors.scheme import RESCALED, Scheme
from lowbit.interchange.exporters.exporter import Problem, exporter
from lowbit.interchange.tensors import Contents, Specs, TensorPlan

SCHEMES: tuple[Scheme, ...] = (*INTEGERS, *FLOATS)


@exporter
class Vllm(FolderExporter):
    """One config group for each way in which layers are stored; the format of the whole is theirs, or mixed-precision."""

    name = "vllm"
    also = ("sglang", "compressed-tensors")
    summary = "compressed-tensors folder for vLLM, SGLang and transformers"
    tags = ("compressed-tensors", "vllm")
    loading = (
        "vllm serve {folder}\n\n"
        "# or in Python, with `pip install compressed-tensors`:\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('{folder}')"
    )
    reader = "vLLM"
    caches = VLLM
    recipes: ClassVar[Mapping[str, tuple[str, str]]] = {
        "w8": ("search@int8:channel", "search@int8:channel"),
        "w8a8": ("search@int8:channel,a=int8:token", "search@int8:channel,a=int8:token"),
        "w4a8": ("search@int4:g32,a=int8:token", "qronos@int4:g32,a=int8:token"),
    }
    mixed = ("int4:g128", "int4:g64", "int4:g32", "int8:channel")
    kv = kv_cache.KINDS
    _ranges: KVRanges | None = None

    def check_kv(self, kind: str, model: Contents) -> list[Problem]:
        return kv_cache.problems(published(model).contents)

    def with_kv(self, ranges: KVRanges) -> Vllm:
        fresh = copy.copy(self)
        fresh._ranges = ranges
        return fresh

    def extra_tensors(self, model: Contents) -> dict[str, Tensor]:
        return {} if self._ranges is None else kv_cache.tensors(model, self._ranges)

    def problem(self, layer: TensorPlan) -> Problem | None:
        assert layer.format is not None
        scheme = _scheme(layer)
        width = layer.stored_shape[-1]
        if scheme is None:
            reason = f"compressed-tensors has no {layer.format}"
            return Problem(layer.name, reason, nearest_integers(layer.format, width))
        refusal = scheme.refuses(layer.format, layer.inputs, _matrix(layer))
        if refusal is None and experts_of(layer.name) is not None and not scheme.runs_experts:
            reason = f"is of experts, which vLLM does not run in {scheme.format_name} with float inputs"
            return Problem(layer.name, reason, f"int8:{nearest_block(layer.format, width)}")
        return None if refusal is None else Problem(layer.name, *refusal)

    def problem_of_transposed(self, layer: TensorPlan) -> Problem | None:
        """vLLM's GPT-2 transposes what is called `weight`, whoever stored it, and leaves packed words as they are."""
        if "weight" not in self.spec(layer):
            return None
        assert layer.format is not None
        reason = f"is kept [in, out] by its module, which vLLM takes {_known(layer).format_name} weights to be too"
        return Problem(layer.name, reason, f"int4:{nearest_block(layer.format, layer.stored_shape[-1])} without a=")

    def spec(self, layer: TensorPlan) -> Specs:
        assert layer.format is not None
        scheme = _known(layer)
        return scheme.spec(layer.format, _matrix(layer)) | scheme.input_spec(layer.inputs)

    def pack(self, layer: TensorPlan, q: QTensor, model: PublishedFolder) -> dict[str, Tensor]:
        scheme = _known(layer)
        if scheme.shares_scale:
            q = scheme.rescaled(q, [_quantized(model, name) for name in self._with(layer, model.contents)])
        return scheme.pack(q) | scheme.pack_inputs(layer.inputs, model.read_inputs(layer.name))

    def _with(self, layer: TensorPlan, model: Contents) -> list[str]:
        """The other weights of the layer that this one becomes part of, of experts those of the same one."""
        parts = next((p for p in self._fused(model) if layer in p), [])
        whole = whole_of(module_of(layer.name))
        return [p.name for p in parts if p is not layer and whole_of(module_of(p.name)) == whole]

    def allowed(self, layer: TensorPlan) -> float:
        if not is_packed(layer) and (layer.kind != "experts" or layer.format is None):
            return super().allowed(layer)
        scheme, module = _known(layer), module_of(layer.name)
        shares = scheme.shares_scale and is_packed(layer) and whole_of(module) != module
        return RESCALED if shares else scheme.changes

    def logits_allowed(self, model: Contents) -> float:
        shares = any(self.allowed(t) == RESCALED for t in model.tensors.values())
        return 0.3 if shares else super().logits_allowed(model)

    def notes(self, model: Contents) -> list[str]:
        notes = super().notes(model)
        shared = [module_of(t.name) for t in model.tensors.values() if self.allowed(t) == RESCALED]
        if shared:
            notes.append(
                f"{len(shared)} layers such as {shared[0]} have their scales rounded once more, to the one global scale "
                "of the layers that vLLM runs as one; mxfp4 has no such scale"
            )
        if self._ranges is not None:
            notes.append(f"keys and values in {self._ranges.kind}, scales from {self._ranges.text}")
        experts = {t.format for t in model.tensors.values() if t.kind == "experts"}
        if len(experts) > 1 or any(f is None or f.offset is not None for f in experts):
            notes.append(
                "for vLLM and SGLang: transformers takes the experts of all layers to be quantized in one format "
                "without zero-points, and does not load this folder"
            )
        return notes

    def section(self, model: Contents) -> dict[str, Any]:
        groups = _config_groups(model)
        formats = {group["format"] for group in groups}
        return {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None if self._ranges is None else kv_cache.scheme(),
            "ignore": list(map(_target, float_modules(model))),
            "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        }


def _config_groups(model: Contents) -> list[dict[str, Any]]:
    """Layers that are stored alike; all Linear as the exporter where there is one way, names where there are several."""
    groups: list[dict[str, Any]] = []
    for layer in filter(is_packed, model.tensors.values()):
        assert layer.format is not None
        scheme = _known(layer)
        group: dict[str, Any] = {
            "targets": [],
            "weights": scheme.weights(layer.format, _matrix(layer)),
            "input_activations": scheme.inputs(layer.inputs),
            "output_activations": None,
            "format": scheme.format_name,
        }
        known = next((g for g in groups if g | {"targets": []} == group), None)
        if known is None:
            groups.append(known := group)
        if (name := _target(module_of(layer.name))) not in known["targets"]:
            known["targets"].append(name)
    if len(groups) == 1:
        groups[0]["targets"] = ["Linear"]
    return groups


def _target(module: str) -> str:
    """What config.json calls a layer; all experts of one by a regular expression."""
    experts = experts_of(module) or (module if module.endswith(".experts") else None)
    return module if experts is None else rf"re:^{re.escape(experts)}\..*"


def _scheme(layer: TensorPlan) -> Scheme | None:
    assert layer.format is not None
    return next((s for s in SCHEMES if s.claims(layer.format, layer.inputs)), None)


def _quantized(model: PublishedFolder, name: str) -> QTensor:
    tensor = model.read(name)
    assert isinstance(tensor, QTensor)  # parts of one layer are stored alike
    return tensor


def _known(layer: TensorPlan) -> Scheme:
    scheme = _scheme(layer)
    assert scheme is not None  # `check` comes first
    return scheme


def _matrix(layer: TensorPlan) -> tuple[int, int]:
    rows, width = layer.stored_shape
    return rows, width
