"""A model with an adapter in it, as a source: each weight is merged as it is read."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import nn

from lowbit.adapters.adapter import Adapter, open_adapter
from lowbit.adapters.changes import Change, changes_of, merged, same
from lowbit.errors import SourceError
from lowbit.interchange.files.settings import is_ours, quantization_section
from lowbit.interchange.hf.loading import load_tokenizer
from lowbit.interchange.hf.models import meta_model
from lowbit.interchange.opening import open_source
from lowbit.interchange.source import Source
from lowbit.interchange.wrapped import WrappedSource
from lowbit.recipes.recipe import Recipe


def with_adapter(
    model: str | Path | nn.Module | Source, adapter: str | Path | Adapter, *, tokenizer: Any = None
) -> Source:
    """`model`, float or quantized, with a LoRA adapter of PEFT in its weights: what every call of lowbit takes for a model. Reads no weight yet.

    Each weight is merged when it is read, in float64, and rounded once to the type that it is stored in; a quantized one is read in float32. A tokenizer
    beside the adapter takes the place of the model's, unless another is given. SourceError for an adapter that does not fit the model, or of a kind
    that cannot be merged.

    >>> both = lowbit.with_adapter(model, adapter)
    >>> lowbit.quantize(both, "w4", effort="none").plan.linear_bits_per_weight
    4.5
    """
    opened = adapter if isinstance(adapter, Adapter) else open_adapter(adapter)
    if tokenizer is None and opened.has_tokenizer and not isinstance(model, Source):
        tokenizer = load_tokenizer(opened.folder, opened.label)
    check_belongs(model, opened)
    named = (Path(model),) if isinstance(model, (str, Path)) else ()
    return AdaptedSource(open_source(model, tokenizer=tokenizer), opened, named)


def check_belongs(model: Any, adapter: Adapter) -> None:
    """SourceError for a folder of lowbit whose recipe rewrote the model before it was quantized, where the adapter was trained on another model.

    The function of the model is still the same, but rows and columns of its weights are scaled or rotated, and the product of an adapter that was
    trained on other weights would be added in another basis.
    """
    if not is_ours(model):
        return
    recipe = str((quantization_section(model) or {}).get("recipe") or "")
    transforms = Recipe.parse(recipe).transforms if recipe else ()
    base = adapter.config.base
    if transforms and (base is None or PurePath(base).name != Path(model).resolve().name):
        words = " and ".join(call.name for call in transforms)
        named = "does not say what it was trained on" if base is None else f"was trained on {base!r:.100}"
        raise SourceError(
            f"{model} was quantized with {words}, so its weights are other ones than those of the float model, and the adapter "
            f"{adapter.label} {named}; merge it into the float model: lowbit merge FLOAT {shlex.quote(adapter.label)} {shlex.quote(recipe)} -o OUT"
        )


class AdaptedSource(WrappedSource):
    """The tensors of `inner` with those of an adapter in them. places: the folders that were named, which no output may replace."""

    def __init__(self, inner: Source, adapter: Adapter, places: tuple[Path, ...] = ()) -> None:
        prefix = "" if inner.config is None else meta_model(inner.config).base_model_prefix
        tied = inner.inventory.tied
        changes = changes_of(adapter, inner.inventory.params, dict(tied), prefix, inner.label)
        untied = [alias for alias, name in tied.items() if _apart(adapter, changes, alias, name)]
        _check_untied(inner, adapter, untied)
        super().__init__(inner, untied)
        self.adapter, self.places = adapter, (*inner.places, *places, adapter.folder)
        self.label = f"{inner.label} with the adapter {adapter.label}"
        self.storage = inner.storage if inner.storage == "float" else f"{inner.storage}, dequantized, with an adapter"
        for alias in self.inventory.tied:
            changes.pop(alias, None)  # the same as that of the tensor that it is tied to
        self._changes = changes
        self.merged = (*inner.merged, f"the adapter {adapter.about()} is merged into the weights")
        if self.origin:
            self.merged += ("the head is stored apart from the embedding, as the adapter changes them differently",)

    def read(self, name: str) -> torch.Tensor:
        """The tensor with the adapter in it, in its stored type."""
        self.spec(name)
        weight, change = self.inner.read(self.origin.get(name, name)), self._changes.get(name)
        return (
            weight if change is None else merged(self.adapter, change, weight, self.inventory.params[name].transposed)
        )

    def changed(self) -> tuple[str, ...]:
        """The tensors that the adapter changes, in the order of the model."""
        return tuple(name for name in self.tensors if name in self._changes)

    def float_type(self, name: str) -> torch.dtype:
        return self.inner.float_type(self.origin.get(name, name))

    def identity(self) -> dict[str, Any]:
        """That of the base, and that of the adapter."""
        return {"source": self.inner.identity(), "adapter": self.adapter.identity()}


def _check_untied(inner: Source, adapter: Adapter, untied: list[str]) -> None:
    """SourceError for others than the head, whose ties transformers cannot undo."""
    head = None if inner.config is None or not untied else _head(inner.config)
    for alias in untied:
        if alias != head:
            raise SourceError(
                f"the adapter {adapter.label} changes {inner.inventory.tied[alias]!r} and {alias!r} differently, and {inner.label} keeps both as "
                "one tensor; train it with ensure_weight_tying=True"
            )


def _apart(adapter: Adapter, changes: Mapping[str, Change], alias: str, name: str) -> bool:
    """Whether a tensor and the one that it is tied to have other values once the adapter is in them."""
    one, other = changes.get(alias), changes.get(name)
    if one is None or other is None:
        return one is not other
    return not same(adapter, one, other)


def _head(config: Any) -> str | None:
    """The name of the weight of the output head of a model."""
    model = meta_model(config)
    head = model.get_output_embeddings()
    return next(
        (f"{name}.weight" for name, module in model.named_modules(remove_duplicate=False) if module is head), None
    )
