"""What is measured: a model opened from whatever names it, and what is known of it before it runs."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.errors import RecipeError
from lowbit.interchange.files.finished import MANIFEST
from lowbit.interchange.files.settings import is_ours
from lowbit.interchange.hf.loading import load_tokenizer
from lowbit.interchange.inventory import kept_words
from lowbit.interchange.opening import open_source
from lowbit.interchange.readers.module import ModuleSource
from lowbit.measure.card import CardParts, Coverage
from lowbit.measure.size import count_parameters, disk_size, module_bytes
from lowbit.nn.swap import packed_weights
from lowbit.pipeline.api import Quantized
from lowbit.pipeline.loading import load
from lowbit.planning.plan import Plan
from lowbit.recipes.activation_rules import inputs_text


@dataclass(frozen=True, eq=False)
class Subject:
    """A model in transformers, and what the card says of it.

    tokenizer: gives its tokenizer, None where it has none of its own. name: what it was loaded from here, so that its type may
    be changed and it can be opened again; None for a module that is the caller's.
    """

    module: nn.Module
    parts: CardParts
    tokenizer: Callable[[], Any] | None
    name: str | Path | None = None


def open_subject(model: str | Path | nn.Module | Quantized, tokenizer: Any, dtype: torch.dtype) -> Subject:
    """The model that `evaluate` was given. dtype: of what is loaded here. SourceError for what is no model."""
    given = None if tokenizer is None else lambda: tokenizer
    if isinstance(model, Quantized):
        parts, words = parts_of(model, tokenizer)
        if model.folder is None:
            return Subject(model.model, parts, words)
        return Subject(load(model.folder, dtype=dtype), parts, words, folder_of(model))
    if isinstance(model, nn.Module):
        parts = CardParts(type(model).__name__, "as it is", count_parameters(model), weight_bytes=module_bytes(model))
        return Subject(model, parts, given)
    path = Path(model)
    if is_ours(path):
        module = load(path, dtype=dtype)
        return Subject(module, folder_parts(path, module), given or (lambda: load_tokenizer(path, str(path))), model)
    source = open_source(model, tokenizer=tokenizer)
    module = source.load_float(dtype)
    parts = CardParts(source.label, source.storage, count_parameters(module), weight_bytes=source.disk_bytes())
    return Subject(module, parts, source.tokenizer, model)


def folder_of(model: Any) -> str | Path | None:
    """The folder of lowbit that a model was given as, or that was written of it; None where it was made of a module in memory."""
    if isinstance(model, Quantized):
        return None if isinstance(model.source, ModuleSource) else model.folder
    return model if isinstance(model, (str, Path)) and is_ours(Path(model)) else None


def parts_of(model: str | Path | Quantized, tokenizer: Any) -> tuple[CardParts, Callable[[], Any]]:
    """What the card says of what `quantize` returned or of a folder that lowbit wrote, and what gives its tokenizer."""
    given = None if tokenizer is None else lambda: tokenizer
    if not isinstance(model, Quantized):
        path = Path(model)
        return folder_parts(path, load(path)), given or (lambda: load_tokenizer(path, str(path)))
    parts = replace(plan_parts(model.plan), calibrated=model.report.calibration is not None)
    if model.folder is not None:
        parts = replace(parts, bytes_after=disk_size(model.folder).total)
    return parts, given or model.source.tokenizer


def type_of(module: nn.Module, wanted: torch.dtype | None) -> torch.dtype:
    """The type that a module computes in. RecipeError when another is `wanted`."""
    floats = (p.dtype for p in module.parameters() if p.is_floating_point())
    own: torch.dtype = next(floats, torch.float32)
    if wanted not in (None, own):
        raise RecipeError(f"this module computes in {own}, not {wanted}; cast it first, or leave dtype out")
    return own


def plan_parts(plan: Plan) -> CardParts:
    """What a plan knows for the card: sizes, coverage, what was kept and why."""
    quantized = sum(t.count for t in plan.tensors if t.format is not None)
    kept = tuple(_kept(words, n, count, plan.parameters) for words, (n, count) in plan.kept_words().items())
    ranges = None if plan.survey is None else plan.survey.to_json()
    notes = (*_inputs_note(plan.input_counts(), ranges), *plan.notes, *plan.about_source)
    return CardParts(
        plan.label, plan.recipe.title, plan.parameters, Coverage(quantized, plan.parameters, kept),
        bytes_before=plan.bytes_before, weight_bytes=plan.output_bytes, linear_bits=plan.linear_bits_per_weight,
        notes=notes, embed_bits=plan.embed_bits_per_weight,
    )  # fmt: skip


def _kept(words: str, tensors: int, count: int, total: int) -> str:
    """'norms (61 tensors, 0.03 %)'."""
    share = 100 * count / max(1, total)
    small = "under 0.01 %" if 0 < share < 0.01 else f"{share:.2f} %"
    return f"{words} ({tensors} tensor{'' if tensors == 1 else 's'}, {small})"


def _inputs_note(counts: Mapping[str, int], ranges: Mapping[str, Any] | None) -> tuple[str, ...]:
    return (f"inputs: {inputs_text(counts, ranges)}",) if counts else ()


def folder_parts(folder: Path, model: nn.Module) -> CardParts:
    """What a folder that lowbit wrote says of itself, for the card."""
    size = disk_size(folder)
    manifest = json.loads((folder / MANIFEST).read_text("utf-8")) if (folder / MANIFEST).is_file() else {}
    packed = dict(packed_weights(model))
    quantized = sum(math.prod(w.stored_shape) for w in packed.values())
    total = quantized + sum(p.numel() for p in model.parameters())
    recipe = manifest.get("recipe", {})
    said = manifest["notes"] if isinstance(manifest.get("notes"), list) else []
    title = f"{recipe['name']} = {recipe['text']}" if recipe.get("name") else recipe.get("text", "unknown")
    kept = _kept_in(model, total)
    counts = Counter(str(w.inputs) for w in packed.values() if w.inputs is not None)
    return CardParts(
        str(folder), title, total, Coverage(quantized, total, kept),
        bytes_after=size.total, weight_bytes=size.weights, linear_bits=manifest.get("linear_bits_per_weight"),
        notes=(*_inputs_note(dict(counts.most_common()), manifest.get("ranges")), *map(str, said)),
        calibrated="calibration" in manifest if manifest else None, embed_bits=_embed_bits(model, packed),
    )  # fmt: skip


def _kept_in(model: nn.Module, total: int) -> tuple[str, ...]:
    """What a packed model keeps in float, in plain words: vectors by what they are of, all else by being kept."""
    found: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0:  # by which a packed weight says its type and device
            continue
        words = kept_words(name, "vector") if parameter.dim() < 2 else "other tensors in float"
        tensors, count = found.get(words, (0, 0))
        found[words] = (tensors + 1, count + parameter.numel())
    return tuple(_kept(words, n, count, total) for words, (n, count) in found.items())


def _embed_bits(model: nn.Module, packed: Mapping[str, Any]) -> float | None:
    """Bits per weight of a packed input embedding; None where there is none."""
    try:
        table: Any = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # models of sounds have none, and towers several
        return None
    names = [f"{name}.weight" for name, module in model.named_modules() if table is not None and module is table]
    weights = [packed[name] for name in names if name in packed]
    return float(weights[0].format.bits_per_weight(weights[0].stored_shape)) if weights else None
