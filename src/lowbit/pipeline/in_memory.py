"""A module quantized in memory: the result is a copy that shares what was kept."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.blockwise.model_tuner import tune_solved
from lowbit.calibration.data import Calibration
from lowbit.engine.folder_cache import use_cache_format
from lowbit.interchange.files.undisturbed import temporary_folder
from lowbit.interchange.hf.running import fast_dtype
from lowbit.interchange.source import Source
from lowbit.nn.packed import PackedWeight
from lowbit.nn.swap import swap
from lowbit.pipeline.driver import solved_results
from lowbit.pipeline.manifest import quantization_config
from lowbit.pipeline.options import Options
from lowbit.planning.plan import Plan
from lowbit.weights.solve import Solved


def solve_in_memory(plan: Plan, source: Source, options: Options, text: Calibration | None) -> list[tuple[Solved, str]]:
    """All results of the plan, tuned where the recipe asks for it."""
    with temporary_folder() as folder:
        solved = list(solved_results(plan, source, options, text, folder))
    if text is None:
        return solved
    return tune_solved(plan, source, text, solved, fast_dtype(), options.progress)


def packed_copy(
    model: nn.Module, source: Source, plan: Plan, results: Sequence[Solved], facts: Mapping[str, Mapping[str, Any]]
) -> nn.Module:
    """A copy of `model` with packed weights. `facts` by tensor name, as `solved_facts` has them."""
    # The copy shares memory with the model, but not its Parameter objects: a cast of the copy would change these.
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    shared |= {id(b): b.detach() for b in model.buffers()}
    changed = bool(plan.recipe.transforms) or plan.recipe.tuner is not None
    if changed:  # a head may be untied, and kept tensors differ: nothing is shared
        made = copy.deepcopy(source.load_float(next(model.parameters()).dtype)).eval()
    else:
        made = copy.deepcopy(model, shared).eval()
    packed = {}
    for solved in results:
        name, q = solved.plan.name, solved.qtensor()
        if q is not None:
            q = q.to(next(model.parameters()).device)
            parts = {part: solved.stored[f"{name}.{part}"] for part in solved.plan.input_parts()}
            packed[name] = PackedWeight.of(
                q,
                transposed=solved.plan.transposed,
                dtype=solved.plan.dtype,
                inputs=solved.plan.inputs,
                input_parts=parts,
            )
        elif changed:
            _set(made, name, solved.stored[name])
    swap(made, packed, plan.tied)
    if source.config is not None:
        from lowbit.interchange.hf.quantizer import attach

        attach(made, quantization_config(plan, facts))
        found = plan.kv.format
        use_cache_format(made, None if found is None or found.calibrated else found)
    return made


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter or buffer of the model its values."""
    with torch.no_grad():
        dict(module.state_dict(keep_vars=True))[name].copy_(value)
