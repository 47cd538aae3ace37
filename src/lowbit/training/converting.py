"""convert: the packed model of a trained one, with the codes and scales that it was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import RecipeError
from lowbit.formats import QTensor
from lowbit.interchange.files.safetensors_reader import bytes_of
from lowbit.interchange.readers.module import ModuleSource
from lowbit.interchange.tensors import TensorPlan
from lowbit.pipeline.api import Quantized
from lowbit.pipeline.in_memory import packed_copy
from lowbit.pipeline.report import make_report, solved_facts
from lowbit.planning.plan import BY_RECIPE, Plan, make_plan
from lowbit.training.attaching import Attached, quantizers, require_prepared, stripped, weight_of
from lowbit.weights.solve import Solved, six_digits


@torch.no_grad()
def convert(
    model: nn.Module, out: str | Path | None = None, *, tokenizer: Any = None, overwrite: bool = False
) -> Quantized:
    """The packed model of one that `lowbit.prepare_qat` gave, and with `out` its folder.

    Codes and scales are those that the model computes with now: with the reference kernel
    (`lowbit.load(out, kernel="expand")`) its outputs in float32 are the same to the last bit. The fast kernels round inputs to 15 bits or add in another order,
    as they do for every quantized model. The trained model is not changed and shares no memory with the result. `tokenizer` goes into the folder; without it,
    that of the folder or name that was prepared.
    `model` may be inside a wrapper. RecipeError for a model that was not prepared.

    >>> student = lowbit.prepare_qat(model, "int4:g32")
    >>> packed = lowbit.convert(student, folder / "trained")
    >>> packed.model(input_ids=torch.tensor([[1, 5, 9]])).logits.shape
    torch.Size([1, 3, 128])
    """
    inner, attached = require_prepared(model)
    stored: dict[str, tuple[QTensor, dict[str, Tensor], float]] = {}
    for name, quantizer, inputs in quantizers(inner):
        weight = weight_of(inner, name)
        q = quantizer.quantize(weight)
        stored[name] = q.to("cpu"), {} if inputs is None else inputs.parts(), _error(attached.plans[name], weight, q)
    source = ModuleSource(_float_copy(inner), tokenizer if tokenizer is not None else attached.words.tokenizer())
    plan = _planned(source, attached, stored)
    solved = [(_solved(t, source, stored, attached), _digest(source, t.name)) for t in plan.tensors]
    facts = {s.plan.name: solved_facts(s) for s, _ in solved}
    result = Quantized(plan, make_report(plan, facts), source)
    result._model = packed_copy(source._module, source, plan, [s for s, _ in solved], facts)
    result._solved = solved
    if out is not None:
        result.save(out, overwrite=overwrite)
    return result


def _float_copy(model: nn.Module) -> nn.Module:
    """The trained model without quantizers, on the CPU, with a config that names the type that it computes in."""
    made = stripped(model).cpu()
    config: Any = getattr(made, "config", None)
    if config is not None and hasattr(config, "dtype"):
        config.dtype = next((p.dtype for p in made.parameters() if p.is_floating_point()), None)
    return made


def _planned(source: ModuleSource, attached: Attached, stored: Mapping[str, tuple[QTensor, Any, float]]) -> Plan:
    """The plan of the recipe, with the formats that the quantizers have."""
    plan = make_plan(source, attached.recipe)
    missing = sorted(set(stored) - {t.name for t in plan.tensors})
    if missing:
        raise RecipeError(f"the model has no tensor {missing[0]!r} any more; prepare it after it was changed")

    def as_trained(t: TensorPlan) -> TensorPlan:
        if t.name not in stored:
            return replace(t, format=None, inputs=None, keep=t.keep or BY_RECIPE)
        return replace(t, format=stored[t.name][0].format.plain, inputs=attached.plans[t.name].inputs, keep=None)

    return replace(plan, tensors=tuple(as_trained(t) for t in plan.tensors))


def _solved(t: TensorPlan, source: ModuleSource, stored: Mapping[str, Any], attached: Attached) -> Solved:
    if t.name not in stored:
        return Solved(t, {t.name: source.read(t.name)}, 0.0)
    q, inputs, error = stored[t.name]
    parts = {f"{t.name}.{part}": value.cpu().contiguous() for part, value in {**q.parts(), **inputs}.items()}
    return Solved(t, parts, error, tuned={"method": "qat", "how": attached.how}, exponent=q.format.exponent)


def _error(t: TensorPlan, weight: Tensor, q: QTensor) -> float:
    """|w - w_q| / |w| of the trained weight."""
    rows = t.as_rows(weight).to(torch.float32)
    size = float(torch.linalg.vector_norm(rows))
    return six_digits(float(torch.linalg.vector_norm(rows - q.dequantize())) / size) if size else 0.0


def _digest(source: ModuleSource, name: str) -> str:
    import hashlib

    return hashlib.sha256(bytes_of(source.read(name))).hexdigest()
