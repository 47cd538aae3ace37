"""Plan: a recipe applied to one model's config and headers, before a weight is read.

What every tensor becomes, the exact bytes of the files, the peak memory, and the KV cache.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from lowbit.display import Displayed
from lowbit.errors import RecipeError
from lowbit.families import decoder_of
from lowbit.formats import Inputs
from lowbit.interchange.files.safetensors_writer import Shard, index_bytes, shards_of
from lowbit.interchange.inventory import Inventory, kept_words
from lowbit.interchange.source import Source
from lowbit.interchange.tensors import MULTIPLIED, TensorPlan, TensorSpec
from lowbit.kernels.core import core
from lowbit.kv import CacheFormat
from lowbit.planning.advice import advice
from lowbit.planning.cache_fit import cache_notes, fitted_cache
from lowbit.planning.kv_cache import KVCache, kv_cache
from lowbit.planning.measuring import card_bytes, text_bytes
from lowbit.planning.memory import calibrated_working_bytes
from lowbit.planning.tensor import SLAB, by_rows, has_inputs, solved_in_core
from lowbit.planning.used import check_used
from lowbit.recipes.activation_rules import Survey
from lowbit.recipes.recipe import Recipe
from lowbit.recipes.rewriting import divided_inputs

MAX_SHARD = 5_000_000_000
READ_AHEAD, WRITE_BEHIND = 64 << 20, 32 << 20  # bytes of tensors that are read, or not yet written, while one is solved
# What Python, PyTorch and transformers take before the first tensor is read, roughly; built for CUDA, PyTorch brings its libraries.
_BASE_BYTES, _CUDA_BASE_BYTES = 380_000_000, 1_000_000_000
# Of each parameter while the whole model is tuned: float32, dense in use, its gradient, codes, and what a step of 512
# tokens keeps for the backward pass. Measured on a model of 135 million parameters.
_TUNING_BYTES = 18
QUANTIZED_SOURCE = "the source is itself quantized"
BY_RECIPE = "kept by the recipe"


@dataclass(frozen=True, repr=False)
class Plan(Displayed):
    """What a recipe makes of a model. Sizes are bytes; `output_bytes` is exact.

    `bytes_before`: the tensors as they are read; `source_bytes`: the files they are read from, which may be quantized.
    `notes`: what of the source is not read or has no place in the model, a sentence each.
    `survey`: which layers of a static recipe are not static, and why; None where no text was looked at. `config`: the
    transformers config of the model, None where it has none.
    """

    label: str
    recipe: Recipe
    tensors: tuple[TensorPlan, ...]
    tied: dict[str, str]
    kv: KVCache
    context: int
    max_shard_bytes: int = MAX_SHARD
    source_bytes: int | None = None
    survey: Survey | None = None
    notes: tuple[str, ...] = ()
    config: Any = field(default=None, repr=False, compare=False)

    def _brief(self) -> str:
        return (
            f"{self.label}, {self.recipe.called or self.recipe}, {self.bytes_before:,} -> {self.output_bytes:,} bytes"
        )

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """The weight files, each with every stored tensor at its place."""
        return shards_of([(t.name, t.stored()) for t in self.tensors], self.max_shard_bytes)

    @property
    def about_source(self) -> tuple[str, ...]:
        """A sentence where the source is itself quantized, so that its files are smaller than the values read from them."""
        if self.source_bytes is None or self.source_bytes >= self.bytes_before:
            return ()
        return (
            f"{QUANTIZED_SOURCE}, a file of {self.source_bytes / 2**20:.0f} MiB; the size before is of its float values",
        )

    @property
    def parameters(self) -> int:
        return sum(t.count for t in self.tensors if t.dtype.is_floating_point)

    @property
    def bytes_before(self) -> int:
        return sum(t.bytes_before for t in self.tensors)

    @property
    def bytes_after(self) -> int:
        return sum(t.bytes_after for t in self.tensors)

    @cached_property
    def output_bytes(self) -> int:
        """Exact bytes of all weight files, headers and the index of shards included."""
        return sum(s.file_bytes for s in self.shards) + index_bytes(self.shards)

    @property
    def bits_per_weight(self) -> float:
        """8 * bytes of the weight files / parameters."""
        return 8 * self.output_bytes / max(1, self.parameters)

    @property
    def linear_bits_per_weight(self) -> float:
        """Bits per weight in the quantized matrices other than embeddings and heads."""
        linear = [t for t in self.tensors if t.kind in MULTIPLIED]
        return 8 * sum(t.bytes_after for t in linear) / max(1, sum(t.count for t in linear))

    @property
    def embed_bits_per_weight(self) -> float | None:
        """Bits per weight of embeddings and output heads; None where there are none."""
        tables = [t for t in self.tensors if t.kind in ("embedding", "head")]
        return 8 * sum(t.bytes_after for t in tables) / sum(t.count for t in tables) if tables else None

    @property
    def coverage(self) -> float:
        """Share of the parameters that is quantized."""
        quantized = sum(t.count for t in self.tensors if t.format is not None)
        return quantized / max(1, self.parameters)

    @property
    def peak_bytes(self) -> int:
        """Expected peak resident memory of quantizing, Python and its libraries included: the largest tensor as stored, its result,
        one slab where Python solves it, and what is read and written beside it."""
        return self._peak(self.recipe, self.recipe.needs_calibration is not None)

    @property
    def calibrated_peak_bytes(self) -> int | None:
        """The same with calibration text; None where the recipe does not look at any."""
        calibrated = self.recipe.calibrated()
        return self._peak(calibrated, True) if calibrated.uses_calibration else None

    @property
    def card_peak_bytes(self) -> int | None:
        """Expected peak resident memory of the card that `lowbit quantize` measures when it has quantized; None for a model without a
        config, of which there is none."""
        if self.config is None:
            return None
        by_engine = (
            decoder_of({"model_type": getattr(self.config, "model_type", None)}) is not None and core() is not None
        )
        return _base() + card_bytes(self.tensors, self.config, by_engine)

    def _peak(self, recipe: Recipe, calibrated: bool) -> int:
        if calibrated:
            most = calibrated_working_bytes(self.tensors, recipe) + text_bytes(self.config)
        else:
            most = max((self._alone(t) for t in self.tensors), default=0) + READ_AHEAD + WRITE_BEHIND
        if recipe.tuner_of("model") is not None:
            most = max(most, _TUNING_BYTES * self.parameters)
        return _base() + most

    def _alone(self, t: TensorPlan) -> int:
        """Bytes of solving a tensor without text."""
        if t.format is None:
            return t.reading_bytes
        slab = 0
        if not solved_in_core(self.recipe, t.format):
            smallest = math.prod(t.shape[-2:]) if len(t.shape) > 2 else 1  # a slab cuts no expert apart
            slab = min(t.count, max(SLAB, smallest)) if by_rows(t.format, t.stored_shape) else t.count
        return t.reading_bytes + t.bytes_after + 16 * slab

    @property
    def kv_bytes_per_token(self) -> int:
        return self.kv.bytes_per_token

    @property
    def kv_bytes(self) -> int:
        """KV cache of one sequence of `context` tokens, in the recipe's format."""
        return self.kv.bytes_at(self.context)

    @property
    def kv_bytes_before(self) -> int:
        """The same with 16 bits a number."""
        return self.kv.stored(None).bytes_at(self.context)

    def with_cache(self, cache: CacheFormat | None) -> Plan:
        """The same with the KV cache in this format, whatever its recipe says. RecipeError where it does not fit the model."""
        return replace(self, kv=fitted_cache(self.kv.stored(None), cache, self.label))

    @property
    def about_cache(self) -> tuple[str, ...]:
        """What the recipe's cache format leaves as it is, a sentence each."""
        return cache_notes(self.kv, self.recipe.cache if self.kv.format is None else self.kv.format)

    def kept(self) -> dict[str, tuple[int, int]]:
        """Reason -> (tensors, parameters) of what is not quantized."""
        out: dict[str, tuple[int, int]] = {}
        for t in self.tensors:
            if t.format is None:
                tensors, count = out.get(t.keep or "", (0, 0))
                out[t.keep or ""] = (tensors + 1, count + t.count)
        return out

    def kept_words(self) -> dict[str, tuple[int, int]]:
        """`kept` with each reason in plain words, such as norms for vectors of norms."""
        out: dict[str, tuple[int, int]] = {}
        for t in self.tensors:
            if t.format is None:
                words = "as the recipe says" if t.keep == BY_RECIPE else kept_words(t.name, t.keep or "")
                tensors, count = out.get(words, (0, 0))
                out[words] = (tensors + 1, count + t.count)
        return out

    def input_counts(self) -> dict[str, int]:
        """Text of inputs in few bits -> layers that have them, the most common first."""
        found = Counter(str(t.inputs) for t in self.tensors if t.inputs is not None)
        return dict(found.most_common())

    @cached_property
    def advice(self) -> tuple[str, ...]:
        """What is unusual in how weights are grouped, a sentence each; empty where nothing is."""
        return advice(self.recipe, self.tensors)

    def note_of(self, name: str) -> str:
        """Why the inputs of a weight are not what the recipe has for all; empty where they are."""
        ratio = None if self.survey is None else self.survey.exploded.get(name)
        if self.survey is None or ratio is None:
            return ""
        return f"scales of inputs are found while running: the largest input is {ratio:g} times a typical one, and the limit is {self.survey.over:g}"

    def to_json(self) -> dict[str, Any]:
        """Everything above, as JSON values."""
        keys = (
            "label", "parameters", "source_bytes", "bytes_before", "bytes_after", "output_bytes", "bits_per_weight",
            "linear_bits_per_weight", "coverage", "peak_bytes", "calibrated_peak_bytes", "card_peak_bytes", "kv_bytes_per_token", "kv_bytes", "kv_bytes_before", "context",
        )  # fmt: skip
        out: dict[str, Any] = {key: getattr(self, key) for key in keys}
        out["recipe"] = str(self.recipe)
        out["kv_format"] = None if self.kv.format is None else str(self.kv.format)
        out["files"] = {s.file: s.file_bytes for s in self.shards}
        out["tied"] = dict(self.tied)
        out["inputs"] = self.input_counts()
        out["notes"] = [*self.notes, *self.about_source, *self.about_cache]
        out["advice"] = list(self.advice)
        if self.survey is not None:
            out["ranges"] = self.survey.to_json()
        out["tensors"] = [
            {
                "name": t.name, "shape": list(t.shape), "kind": t.kind, "dtype": str(t.dtype).removeprefix("torch."),
                "format": None if t.format is None else str(t.format), "keep": t.keep,
                "inputs": None if t.inputs is None else str(t.inputs),
                "bytes_before": t.bytes_before, "bytes_after": t.bytes_after,
            }
            for t in self.tensors
        ]  # fmt: skip
        return out


def _base() -> int:
    return _BASE_BYTES if torch.version.cuda is None else _CUDA_BASE_BYTES


def make_plan(source: Source, recipe: Recipe, *, context: int = 4096, max_shard_bytes: int = MAX_SHARD) -> Plan:
    """The plan of `recipe` for a source; reads no weight. RecipeError when a layer glob matches nothing."""
    divided = divided_inputs(source, recipe)
    tensors = tuple(_tensor(spec, source.inventory, recipe, divided(name)) for name, spec in source.tensors.items())
    for pattern, fmt in recipe.layers:
        matched = [t for t in tensors if recipe.matches(pattern, t.name)]
        if not matched:
            raise RecipeError(
                f"the layer glob {pattern!r} matches no tensor of {source.label}; names look like {_example(tensors)!r}"
            )
        if fmt is not None and all(t.format is None and t.keep != BY_RECIPE for t in matched):
            first = matched[0]
            raise RecipeError(
                f"{pattern}={fmt} can do nothing: {first.name!r} is never quantized ({first.keep}); leave it out"
            )
    for pattern, rule in recipe.layer_inputs:
        matched = [t for t in tensors if recipe.matches(pattern, t.name)]
        if not any(has_inputs(t) for t in matched):
            what = "has no quantized linear layer" if matched else "matches no tensor"
            raise RecipeError(f"a:{pattern}={rule} {what} of {source.label}; names look like {_example(tensors)!r}")
    check_used(recipe, tensors, recipe.needs_calibration is not None)
    kv = fitted_cache(kv_cache(source.config), recipe.cache, source.label)
    return Plan(
        source.label, recipe, tensors, dict(source.inventory.tied), kv, context, max_shard_bytes,
        source.disk_bytes(), notes=notes_on(source), config=source.config,
    )  # fmt: skip


def notes_on(source: Source) -> tuple[str, ...]:
    """What was put into the weights of a source, what of it is not read, and what has no place in the model."""
    return (*source.merged, *source.remarks, *map(str, source.left_out))


def _tensor(spec: TensorSpec, inventory: Inventory, recipe: Recipe, divided: bool) -> TensorPlan:
    param = inventory.params[spec.name]
    fmt, keep = None, param.keep
    if keep is None:
        fmt = recipe.format_for(spec.name, param.kind)
        if fmt is None:
            keep = BY_RECIPE
        elif not spec.dtype.is_floating_point:
            fmt, keep = None, f"not a float tensor ({spec.dtype})"
    found = TensorPlan(spec.name, spec.shape, param.kind, spec.dtype, param.transposed, fmt, keep)
    if not has_inputs(found):
        return found
    inputs = recipe.rule_for(spec.name).inputs
    if divided:  # also where it stays float: weights that share an input are scaled together
        inputs = Inputs(None, divisor=True) if inputs is None else replace(inputs, divisor=True)
    return replace(found, inputs=inputs)


def _example(tensors: tuple[TensorPlan, ...]) -> str:
    return next((t.name for t in tensors if t.kind == "linear"), tensors[0].name if tensors else "")
