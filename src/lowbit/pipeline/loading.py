"""Loading what was written: packed models, plain modules, and dense copies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.errors import RecipeError, SourceError, nearest
from lowbit.formats import QTensor
from lowbit.formats.format import FARTHEST
from lowbit.interchange.checks.section import check_parts, read_section
from lowbit.interchange.files.finished import MANIFEST
from lowbit.interchange.files.safetensors_reader import read_tensor
from lowbit.interchange.files.settings import check_ours, read_json
from lowbit.interchange.files.weights import entries_of, remarks_on
from lowbit.interchange.source import say_remarks
from lowbit.nn.packed import PackedWeight
from lowbit.nn.swap import dequantize_, packed_weights, swap

KERNELS = ("auto", "expand", "dense")


def load(
    folder: str | Path,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    kernel: str = "auto",
    **options: Any,
) -> nn.Module:
    """Load a model that lowbit wrote, in evaluation mode, its weights packed, as the class that was quantized.

    As any other class that the float model loads as, `from_pretrained` of that class loads it.

    `dtype`: what computing is done in (None: what the source had). `kernel`: "auto" measures and takes the
    fastest, "expand" always expands the weight (the reference), "dense" expands once and keeps the dense weights:
    as fast and as large as the float model; for weights whose inputs are quantized that would be another model, and is an
    error. Other options go to `from_pretrained`.

    Given text, `generate` of a model that generates is that of `lowbit.Engine`; given tensors, that of transformers
    (see `engine.generate_method`). SourceError for a folder that lowbit did not write or that is damaged.

    >>> loaded = lowbit.load(quantized)
    >>> loaded(input_ids=torch.tensor([[1, 5, 9]])).logits.shape  # [batch, tokens, vocabulary]
    torch.Size([1, 3, 128])
    """
    if kernel not in KERNELS:
        raise RecipeError(f"unknown kernel choice {kernel!r}{nearest(kernel, KERNELS)} (known: {', '.join(KERNELS)})")
    path = Path(folder)
    check_ours(folder)
    if "device_map" in options and str(device) != "cpu":
        raise RecipeError("device and device_map exclude each other; give one of them")
    if dtype is not None:
        options["dtype"] = as_dtype(dtype)
    from lowbit.interchange.hf.packed_model import load_packed

    say_remarks(str(folder), remarks_on(path))
    model = load_packed(path, **options)
    model = model if "device_map" in options else model.to(device)
    if kernel == "dense":
        rounded = next(
            (n for n, w in packed_weights(model) if w.inputs is not None and w.inputs.format is not None), None
        )
        if rounded is not None:
            raise RecipeError(
                f"the inputs of {rounded!r} are quantized, which dense weights would leave out; use kernel='expand'"
            )
        model = dequantize(model)
    for _, weight in packed_weights(model):
        weight.dispatcher.only = None if kernel == "auto" else kernel
    if getattr(model, "can_generate", bool)():
        from lowbit.engine.generate_method import GenerateMethod

        model.generate = GenerateMethod(model, str(path))
    return model


def load_into(module: nn.Module, folder: str | Path) -> nn.Module:
    """Load what was saved of a plain module (one without a transformers config) into a module of the same shape.

    Its quantized parameters are replaced by packed weights, the kept ones get their values; the module is changed and
    returned. SourceError when folder and module do not fit.

    >>> plain = torch.nn.Sequential(torch.nn.Linear(64, 64))
    >>> _ = lowbit.quantize(plain, "int8:channel").save(folder / "plain")
    >>> lowbit.load_into(torch.nn.Sequential(torch.nn.Linear(64, 64)), folder / "plain")(torch.zeros(1, 64)).shape
    torch.Size([1, 64])
    """
    path = Path(folder)
    written = read_json(path / MANIFEST)
    section, facts = read_section(written.get("quantization"), str(path / MANIFEST)), written.get("tensors")
    stored = entries_of(path)
    check_parts(section, {name: (entry.dtype, entry.shape) for name, (_, entry) in stored.items()}, str(path))
    packed, owners = {}, {name + ".": entry for name, entry in section.tensors.items()}
    for name, entry in section.tensors.items():
        parts = {part: read_tensor(*stored[f"{name}.{part}"]) for part in entry.weight_parts()}
        extra = {part: read_tensor(*stored[f"{name}.{part}"]) for part in entry.input_parts()}
        fmt = replace(entry.format, exponent=_exponent(facts, name, path) or entry.format.exponent)
        q = QTensor.from_parts(fmt, entry.shape, parts)
        packed[name] = PackedWeight.of(q, transposed=entry.transposed, inputs=entry.inputs, input_parts=extra)
    kept = {key: read_tensor(*place) for key, place in stored.items() if not key.startswith(tuple(owners))}
    swap(module, packed, section.tied)
    found = module.load_state_dict(kept, strict=False)
    missing = [key for key in found.missing_keys if not key.startswith((*owners, *(a + "." for a in section.tied)))]
    if missing or found.unexpected_keys:
        raise SourceError(
            f"{folder} does not fit {type(module).__name__}: {(missing + found.unexpected_keys)[:5]} differ"
        )
    return module.eval()


def _exponent(facts: Any, name: str, where: Path) -> int:
    """The exponent that the values of a weight asked for, 0 where there is none. SourceError for what is none."""
    fact = facts.get(name) if isinstance(facts, dict) else None
    found = fact.get("exponent", 0) if isinstance(fact, dict) else 0
    if type(found) is not int or abs(found) > FARTHEST:
        raise SourceError(f"{where / MANIFEST}: the exponent of {name!r} is {found!r:.40}; copy the folder again")
    return found


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating-point type by name or as it is. RecipeError when there is none such."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16"}
    found = getattr(torch, names.get(dtype, dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise RecipeError(f"unknown dtype {dtype!r}; use float32, bfloat16 or float16")
    return found


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Turn the packed weights of a model back into dense parameters, in place, in `dtype` (None: the type it computes in).

    >>> lowbit.dequantize(lowbit.load(quantized)).lm_head.weight.dtype
    torch.float32
    """
    if getattr(model, "hf_quantizer", None) is not None:
        whole: nn.Module = model.dequantize(dtype=dtype or model.dtype)
        return whole
    return dequantize_(model, dtype)
