"""What is measured: a model opened from whatever names it, and what is known of it before it runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
from lowbit.interchange.readers.lowbit_folder import LowbitFolder
from lowbit.interchange.readers.module import ModuleSource
from lowbit.interchange.tensors import TensorPlan
from lowbit.kv.folder import read_cache_format
from lowbit.measure.card import CardParts, Coverage
from lowbit.measure.size import count_parameters, disk_size, module_bytes
from lowbit.pipeline.api import Quantized
from lowbit.pipeline.loading import load
from lowbit.planning.cache_words import cache_facts, facts_of_folder
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
        return Subject(module, folder_parts(path), given or (lambda: load_tokenizer(path, str(path))), model)
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
        return folder_parts(path), given or (lambda: load_tokenizer(path, str(path)))
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
        notes=notes, embed_bits=plan.embed_bits_per_weight, cache=cache_facts(plan.kv, plan.config),
    )  # fmt: skip


def _kept(words: str, tensors: int, count: int, total: int) -> str:
    """'norms (61 tensors, 0.03 %)'."""
    share = 100 * count / max(1, total)
    small = "under 0.01 %" if 0 < share < 0.01 else f"{share:.2f} %"
    return f"{words} ({tensors} tensor{'' if tensors == 1 else 's'}, {small})"


def _inputs_note(counts: Mapping[str, int], ranges: Mapping[str, Any] | None) -> tuple[str, ...]:
    return (f"inputs: {inputs_text(counts, ranges)}",) if counts else ()


def folder_parts(folder: Path, stored: LowbitFolder | None = None) -> CardParts:
    """What a folder that lowbit wrote says of itself, for the card. stored: the same where it is open already; no weight is read."""
    stored = stored or LowbitFolder(folder)
    size = disk_size(folder)
    manifest = json.loads((folder / MANIFEST).read_text("utf-8")) if (folder / MANIFEST).is_file() else {}
    known = stored.inventory.params
    inside = [t for name, t in stored.contents.tensors.items() if name in known]
    quantized = sum(t.count for t in inside if t.format is not None)
    floats = [t for t in inside if t.format is None and known[t.name].keep != "buffer"]
    total = quantized + sum(t.count for t in floats)
    recipe = manifest.get("recipe", {})
    said = manifest["notes"] if isinstance(manifest.get("notes"), list) else []
    title = f"{recipe['name']} = {recipe['text']}" if recipe.get("name") else recipe.get("text", "unknown")
    counts = Counter(str(t.inputs) for t in inside if t.inputs is not None)
    return CardParts(
        str(folder), title, total, Coverage(quantized, total, _kept_in(floats, total)),
        bytes_after=size.total, weight_bytes=size.weights, linear_bits=manifest.get("linear_bits_per_weight"),
        notes=(*_inputs_note(dict(counts.most_common()), manifest.get("ranges")), *map(str, said)),
        calibrated="calibration" in manifest if manifest else None, embed_bits=_embed_bits(stored),
        cache=facts_of_folder(stored.config, read_cache_format(folder)),
    )  # fmt: skip


def _kept_in(floats: Sequence[TensorPlan], total: int) -> tuple[str, ...]:
    """What a packed model keeps in float, in plain words: vectors by what they are of, all else by being kept."""
    found: dict[str, tuple[int, int]] = {}
    for t in floats:
        words = kept_words(t.name, "vector") if len(t.shape) < 2 else "other tensors in float"
        tensors, count = found.get(words, (0, 0))
        found[words] = (tensors + 1, count + t.count)
    return tuple(_kept(words, n, count, total) for words, (n, count) in found.items())


def _embed_bits(stored: LowbitFolder) -> float | None:
    """Bits per weight of a packed input embedding; None where there is none."""
    tables = [t for t in stored.contents.tensors.values() if t.kind == "embedding" and t.format is not None]
    largest = max(tables, key=lambda t: t.count, default=None)
    return None if largest is None or largest.format is None else largest.format.bits_per_weight(largest.stored_shape)
