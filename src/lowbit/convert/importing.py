"""A quantized model of another program as a folder of lowbit, its integers kept.

Each weight whose levels, blocks and scales a format of lowbit has is written with the very same codes and scales: nothing
is rounded again, and the loss is 0, which is checked against the values of the source. The rest is kept as float, or
quantized anew where a format is given for it, and the report says what that cost.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import RecipeError, SourceError, WeightError
from lowbit.formats import Format
from lowbit.interchange.files.lock import locked
from lowbit.interchange.files.places import check_apart
from lowbit.interchange.files.safetensors_reader import bytes_of
from lowbit.interchange.opening import open_source
from lowbit.interchange.progress import Progress, heard
from lowbit.interchange.source import Source
from lowbit.interchange.tensors import TensorPlan
from lowbit.pipeline.api import Quantized
from lowbit.pipeline.driver import write_folder
from lowbit.pipeline.options import Options
from lowbit.planning.kv_cache import kv_cache
from lowbit.planning.plan import MAX_SHARD, Plan, notes_on
from lowbit.recipes.layer_globs import with_layers
from lowbit.recipes.recipe import KEEP, Recipe
from lowbit.weights.finite import check_finite, nonfinite
from lowbit.weights.solve import Solved, six_digits, solve


def import_model(
    model: str | Path,
    out: str | Path,
    *,
    rest: str | Format = KEEP,
    tokenizer: Any = None,
    progress: Progress | bool | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD,
) -> Quantized:
    """Write the quantized `model` (GPTQ, AWQ, compressed-tensors, bitsandbytes, FP8, MXFP4, GGUF) as a folder of lowbit.

    Codes and scales stay what they are wherever a format of lowbit has the same values; `report.layers` has an error
    of 0 for these. What no format holds is kept as float in the model's own type, or takes the format `rest`.
    RecipeError for a float model, SourceError for one that cannot be read.

    >>> lowbit.import_model(gptq, folder / "imported").report.layers[1].error
    0.0
    """
    check_apart(Path(model), Path(out))
    source = open_source(model, tokenizer=tokenizer)
    plan = import_plan(source, rest, max_shard_bytes)
    with locked(out):
        report = write_folder(
            plan, source, out, Options(overwrite=overwrite), solved=_results(plan, source, heard(progress))
        )
    return Quantized(plan, report, source, Path(out))


def import_plan(source: Source, rest: str | Format = KEEP, max_shard_bytes: int = MAX_SHARD) -> Plan:
    """What every tensor of a quantized source becomes; reads no codes. RecipeError for a float source."""
    other = None if rest == KEEP else Recipe.of(rest).format
    tensors = tuple(_tensor(source, name, other) for name in source.tensors)
    kept = [t.format for t in tensors if t.format is not None and t.format != other]
    if not kept and not any(source.stored_as(name) for name in source.tensors):
        raise RecipeError(
            f"{source.label} is a float model, so there is nothing to import; quantize it: lowbit quantize {source.label} w4"
        )
    counts: Counter[Format] = Counter()
    for t in tensors:
        if t.format is not None:
            counts[t.format] += t.count
    base = counts.most_common(1)[0][0] if counts else Recipe.of("int8:channel").format
    kinds = {t.name: t.kind for t in tensors if source.inventory.params[t.name].keep is None}
    recipe = with_layers(Recipe(base, embed=None), {t.name: t.format for t in tensors if t.name in kinds}, kinds, base)
    return Plan(
        source.label, replace(recipe, name=f"import of {source.storage}"), tensors, dict(source.inventory.tied),
        kv_cache(source.config), 4096, max_shard_bytes, source.disk_bytes(), notes=notes_on(source),
    )  # fmt: skip


def _tensor(source: Source, name: str, other: Format | None) -> TensorPlan:
    spec, param, stored = source.tensors[name], source.inventory.params[name], source.stored_as(name)
    fmt, keep, inputs, dtype = None, param.keep, None, spec.dtype
    if stored is None:
        keep, dtype = keep or "float in the source", source.float_type(name)
    elif stored.format is not None:
        fmt, keep, inputs = stored.format, None, stored.inputs if param.kind in ("linear", "conv1d") else None
    elif other is not None and keep is None:
        fmt = other
    else:
        keep, dtype = stored.why, model_type(source)
    return TensorPlan(name, spec.shape, param.kind, dtype, param.transposed, fmt, keep, inputs)


def model_type(source: Source) -> torch.dtype:
    """The type that the model's config names for its weights, float32 where it names none."""
    found = getattr(source.config, "dtype", None)
    return found if isinstance(found, torch.dtype) and found.is_floating_point else torch.float32


def _results(plan: Plan, source: Source, progress: Progress | None) -> Iterator[tuple[Solved, str]]:
    at, total = 0, plan.bytes_before
    for tensor in plan.tensors:
        if progress:
            progress(tensor.name, at, total)
        weight = source.read(tensor.name)
        digest = hashlib.sha256(bytes_of(weight)).hexdigest()
        yield _taken(plan, tensor, source, weight), digest
        at += tensor.bytes_before
        if progress:
            progress(tensor.name, at, total)


def _taken(plan: Plan, tensor: TensorPlan, source: Source, weight: Tensor) -> Solved:
    """One tensor as the folder keeps it, with what that cost."""
    stored = source.stored_as(tensor.name)
    if tensor.format is None:
        return cast(tensor, weight, "" if stored is None else f"kept as float: {stored.why}")
    if stored is None or stored.format is None or stored.read is None:
        return replace(solve(tensor, weight, plan.recipe), note=f"quantized anew: {stored.why if stored else ''}")
    q = stored.read()
    if q.format != tensor.format or q.shape != tensor.stored_shape:
        raise SourceError(
            f"{source.label}: {tensor.name!r} is {q.format} {list(q.shape)}, which is not what its headers said"
        )
    parts = {
        f"{tensor.name}.{part}": value for part, value in (q.parts() | _inputs(tensor, stored.input_parts)).items()
    }
    dense = weight.transpose(-1, -2) if tensor.transposed else weight
    check_finite(dense, tensor.name, "written")
    return Solved(tensor, parts, _relative(q.dequantize(), _divided(parts, tensor, dense)), note=stored.note)


def _inputs(tensor: TensorPlan, parts: Any) -> dict[str, Tensor]:
    return {} if tensor.inputs is None else {k: v for k, v in parts().items() if k in tensor.input_parts()}


def _divided(parts: dict[str, Tensor], tensor: TensorPlan, dense: Tensor) -> Tensor:
    """The weight for inputs that are divided first, as a folder of lowbit may have them."""
    divisor = parts.get(f"{tensor.name}.input_divisor")
    return dense if divisor is None else dense * divisor


def cast(tensor: TensorPlan, weight: Tensor, note: str = "") -> Solved:
    """A float tensor in the type of the plan. WeightError when its values do not fit that type."""
    check_finite(weight, tensor.name, "written")
    made = weight.to(tensor.dtype)
    if nonfinite(made):
        peak = float(weight.abs().max())
        raise WeightError(
            f"tensor {tensor.name!r} has values up to {peak:.3g}, too large for {str(tensor.dtype).removeprefix('torch.')}; "
            "write it in bfloat16 or float32"
        )
    return Solved(tensor, {tensor.name: made}, _relative(made, weight), note=note)


def _relative(made: Tensor, true: Tensor) -> float:
    """|made - true| / |true|, exactly 0 where they are equal."""
    if torch.equal(made, true):
        return 0.0
    norm = float(torch.linalg.vector_norm(true.double()))
    return six_digits(float(torch.linalg.vector_norm(made.double() - true.double())) / norm) if norm else 0.0
