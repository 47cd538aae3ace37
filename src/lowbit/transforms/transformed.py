"""A source that rewrites tensors as they are read.

Fold and rotate change weights only, so they are sources around a source: the same names and shapes (but for a head
that they untie), computed in float64 from the tensors of the inner source and rounded once, to the stored type, at
the outermost one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from lowbit.interchange.source import Source
from lowbit.interchange.wrapped import WrappedSource
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


class TransformedSource(WrappedSource):
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
        super().__init__(inner, untied)
        self.transform, self._edits = transform, dict(edits)
        self.online = {**getattr(inner, "online", {}), **(online or {})}
        self.notes = (*getattr(inner, "notes", ()), *notes)
        self.arch = dataclasses.replace(arch, tied=self.inventory.tied)

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
        origin, own = self.origin.get(name, name), self._edits.get(name, ())
        if isinstance(self.inner, TransformedSource):
            base, before = self.inner._chain(origin)
            return base, (*before, *own)
        inner = self.inner
        return (lambda: inner.read(origin)), own

    def identity(self) -> dict[str, Any]:
        """That of the inner source, and the transform with its options."""
        return {"source": self.inner.identity(), "transform": self.transform}


def exact(source: Source, name: str) -> Tensor:
    """A tensor of any source in float64, unrounded where the source computes it."""
    return source.exact(name) if isinstance(source, TransformedSource) else source.read(name).double()


def _apply(tensor: Tensor, edits: tuple[Edit, ...]) -> Tensor:
    tensor = tensor.double()
    for edit in edits:
        tensor = edit.function(tensor)
    return tensor
