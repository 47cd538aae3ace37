"""A source around a source: the same model, of which tensors are changed as they are read."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lowbit.interchange.hf.text_config import text_config
from lowbit.interchange.inventory import Param
from lowbit.interchange.model_card import BaseFacts
from lowbit.interchange.source import Source
from lowbit.interchange.tensors import TensorSpec


class WrappedSource(Source):
    """Everything but the tensors is that of the inner source; what is read, and its identity, subclasses say.

    inner   the source that it is around
    origin  a tensor that was tied, and has a place of its own here -> the one that it was tied to
    """

    def __init__(self, inner: Source, untied: Iterable[str] = ()) -> None:
        """untied: aliases of the inner source, outputs of a model, that are stored apart from what they are tied to."""
        self.inner, self.label = inner, inner.label
        self.extra, self.dropped, self.left_out = inner.extra, inner.dropped, inner.left_out
        self.remarks, self.merged = inner.remarks, inner.merged
        tied = dict(inner.inventory.tied)
        self.origin = {name: tied.pop(name) for name in untied}
        tensors, params = dict(inner.tensors), dict(inner.inventory.params)
        for name, origin in self.origin.items():
            tensors[name] = dataclasses.replace(inner.tensors[origin], name=name)
            params[name] = Param(name, inner.tensors[origin].shape, "head", keep=params[origin].keep)
        self.tensors: Mapping[str, TensorSpec] = tensors
        self.inventory = dataclasses.replace(inner.inventory, params=params, tied=tied)
        self.config = copy.deepcopy(inner.config)
        # With other ties left (T5's embeddings) the flag must stay; a head stored with its own values is untied anyway.
        if self.origin and not tied and self.config is not None:
            for part in (self.config, text_config(self.config)):
                part.tie_word_embeddings = False

    def disk_bytes(self) -> int:
        return self.inner.disk_bytes()

    def save_assets(self, out: Path) -> None:
        self.inner.save_assets(out)

    def facts(self) -> BaseFacts:
        return self.inner.facts()

    def generation(self) -> dict[str, Any]:
        return self.inner.generation()

    def left_files(self) -> tuple[str, ...]:
        return self.inner.left_files()

    def tokenizer(self) -> Any:
        return self.inner.tokenizer()
