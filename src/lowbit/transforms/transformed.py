"""A source that rewrites tensors as they are read.

Fold and rotate change weights only, so they are sources around a source: the same names and shapes (but for a head
that they untie), computed in float64 from the tensors of the inner source and rounded once, to the stored type, at
the outermost one.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.interchange.hf.text_config import text_config
from lowbit.interchange.inventory import Param
from lowbit.interchange.model_card import BaseFacts
from lowbit.interchange.source import Source
from lowbit.interchange.tensors import TensorSpec
from lowbit.transforms.arch import Arch
from lowbit.transforms.hadamard import Rotation

CHUNK = 1 << 22  # elements that are in float64 at a time, where rows can be rewritten apart from each other


@dataclasses.dataclass(frozen=True)
class Edit:
    """One rewrite of one tensor: float64 [..., out, in] (vectors as they are) to the same shape.

    `by_rows`: each row (last dimension) of the result depends on the same row of the tensor alone.
    """

    function: Callable[[Tensor], Tensor]
    by_rows: bool = False


class TransformedSource(Source):
    """A source whose tensors are rewritten on reading.

    arch       the facts that hold after the transform
    transform  its text, such as `fold(head=1)`; part of the identity
    online     weight name -> the rotation that its input takes while the model runs
    notes      what could not be done, or changes what a user sees, one sentence each
    """

    def __init__(
        self,
        inner: Source,
        transform: str,
        edits: Mapping[str, tuple[Edit, ...]],
        arch: Arch,
        *,
        untied: tuple[str, ...] = (),
        online: Mapping[str, Rotation] | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.inner, self.transform, self._edits = inner, transform, dict(edits)
        self.label, self.extra, self.dropped = inner.label, inner.extra, inner.dropped
        self.left_out, self.remarks, self.merged = inner.left_out, inner.remarks, inner.merged
        self.online = {**getattr(inner, "online", {}), **(online or {})}
        self.notes = (*getattr(inner, "notes", ()), *notes)
        tied = dict(inner.inventory.tied)
        self._origin = {name: tied.pop(name) for name in untied}
        tensors, params = dict(inner.tensors), dict(inner.inventory.params)
        for name, origin in self._origin.items():
            tensors[name] = dataclasses.replace(inner.tensors[origin], name=name)
            params[name] = Param(name, inner.tensors[origin].shape, "head", keep=params[origin].keep)
        self.tensors: Mapping[str, TensorSpec] = tensors
        self.inventory = dataclasses.replace(inner.inventory, params=params, tied=tied)
        self.arch = dataclasses.replace(arch, tied=tied)
        self.config = copy.deepcopy(inner.config)
        # With other ties left (T5's embeddings) the flag must stay; a head stored with its own values is untied anyway.
        if self._origin and not tied and self.config is not None:
            for part in (self.config, text_config(self.config)):
                part.tie_word_embeddings = False

    def read(self, name: str) -> Tensor:
        """The rewritten tensor, rounded once to its stored type. float64 for a few megabytes at a time where rows are apart."""
        spec = self.spec(name)
        base, edits = self._chain(name)
        if not edits:
            return base()
        tensor, transposed = base(), name in self.arch.transposed
        rows = tensor.mT if transposed else tensor
        if tensor.dim() < 2 or not all(edit.by_rows for edit in edits) or tensor.numel() <= CHUNK:
            done = _apply(rows, edits).to(spec.dtype)
        else:
            done = torch.empty(rows.shape, dtype=spec.dtype)
            step = max(1, CHUNK // max(1, prod(rows.shape[1:])))
            for chunk, out in zip(rows.split(step), done.split(step)):
                out.copy_(_apply(chunk, edits))
        return (done.mT if transposed else done).contiguous()

    def exact(self, name: str) -> Tensor:
        """The rewritten tensor in float64, as stored: [in, out] where the module keeps it so."""
        base, edits = self._chain(name)
        tensor = base()
        transposed = name in self.arch.transposed
        done = _apply(tensor.mT if transposed else tensor, edits)
        return done.mT if transposed else done

    def _chain(self, name: str) -> tuple[Callable[[], Tensor], tuple[Edit, ...]]:
        """How to read what the innermost source stores, and every edit from there to here."""
        origin, own = self._origin.get(name, name), self._edits.get(name, ())
        if isinstance(self.inner, TransformedSource):
            base, before = self.inner._chain(origin)
            return base, (*before, *own)
        inner = self.inner
        return (lambda: inner.read(origin)), own

    def identity(self) -> dict[str, Any]:
        """That of the inner source, and the transform with its options."""
        return {"source": self.inner.identity(), "transform": self.transform}

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


def exact(source: Source, name: str) -> Tensor:
    """A tensor of any source in float64, unrounded where the source computes it."""
    return source.exact(name) if isinstance(source, TransformedSource) else source.read(name).double()


def _apply(tensor: Tensor, edits: tuple[Edit, ...]) -> Tensor:
    tensor = tensor.double()
    for edit in edits:
        tensor = edit.function(tensor)
    return tensor
