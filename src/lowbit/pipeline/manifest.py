"""What config.json and lowbit.json say of a quantized model."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lowbit.calibration.data import Calibration
from lowbit.interchange.files.settings import read_json
from lowbit.interchange.hf import configs as older_readers
from lowbit.interchange.hf.loadable import check_loadable
from lowbit.interchange.hf.section import with_guard
from lowbit.interchange.readers.left_out import to_json
from lowbit.interchange.source import Source
from lowbit.interchange.tensors import TensorSpec
from lowbit.planning.plan import Plan
from lowbit.solvers.in_core import made_by
from lowbit.version import __version__
from lowbit.weights.solve import with_exponent


def quantization_config(plan: Plan, facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What config.json says of the quantized weights; all that a reader needs next to the files.

    `facts` by tensor name, as `solved_facts` has them: formats have the exponents that values asked for. Before the work
    there are none, and formats are the planned ones.
    """
    tensors = {
        t.name: {
            "format": str(with_exponent(t.format, facts.get(t.name, {}).get("exponent", 0))),
            "shape": list(t.stored_shape),
        }
        | ({"transposed": True} if t.transposed else {})
        | ({"inputs": str(t.inputs)} if t.inputs is not None else {})
        for t in plan.tensors
        if t.format is not None
    }
    return {
        "quant_method": "lowbit", "version": __version__, "recipe": str(plan.recipe),
        "tied": dict(plan.tied), "tensors": tensors,
    } | _cache(plan)  # fmt: skip


def _cache(plan: Plan) -> dict[str, str]:
    """The format of the KV cache; one with calibrated tables is written when there are some (`kv/folder.py`)."""
    found = plan.kv.format
    return {} if found is None or found.calibrated else {"kv": str(found)}


def write_config(plan: Plan, source: Source, folder: Path, facts: Mapping[str, Mapping[str, Any]]) -> None:
    """config.json: the source's own, with `quantization_config`, and refused where lowbit is not known. Nothing for a module that has no config."""
    if source.config is None:
        return
    config = copy.deepcopy(source.config)
    config.quantization_config = quantization_config(plan, facts)
    if not config.architectures:
        config.architectures = [source.inventory.model_class]
    older_readers.write_config(config, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(with_guard(read_json(path)), indent=2, sort_keys=True) + "\n", "utf-8")


def check_loads(plan: Plan, source: Source) -> None:
    """SourceError when the planned folder would not load as the model that it is made of."""
    if source.config is not None:
        stored = {n: TensorSpec(n, shape, dtype) for t in plan.tensors for n, (dtype, shape) in t.stored().items()}
        check_loadable(source.config, quantization_config(plan, {}), stored, frozenset(source.extra), source.label)


def origin(plan: Plan, source: Source, calibration: Calibration | None = None) -> dict[str, Any]:
    """Where every byte comes from, as the manifest says it: hash of the source, recipe, versions. No time, no path."""
    import safetensors
    import transformers

    return (
        {
            "lowbit": __version__,
            "solved_by": made_by(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
            "recipe": {"name": plan.recipe.called, "text": str(plan.recipe)},
            "source": source.identity(),
            "coverage": plan.coverage,
            "bits_per_weight": plan.bits_per_weight,
            "linear_bits_per_weight": plan.linear_bits_per_weight,
            "quantization": quantization_config(plan, {}),
            "notes": list(plan.notes),
            "left_out": to_json(source.left_out, source.left_files()),
        }
        | ({} if calibration is None else {"calibration": calibration.to_json()})
        | ({} if plan.survey is None else {"ranges": plan.survey.to_json()})
    )
