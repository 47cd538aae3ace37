"""A GGUF file that this version wrote, read back by the other direction of the same layout.

For the families that transformers cannot read. Bytes become numbers by the `gguf` package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lowbit.errors import SourceError
from lowbit.interchange.exporters.gguf.layout import Placed, stack_in_model, values_in_model
from lowbit.interchange.readers.lowbit_folder import LowbitFolder
from lowbit.interchange.source import Source


class Reread(Source):
    """The tensors of `model` as the file `path` holds them; its config is that of `model`."""

    def __init__(self, path: Path, model: LowbitFolder, placed: list[Placed]) -> None:
        import gguf

        ours = model.dense()
        self.label, self.config, self.inventory = str(path), ours.config, ours.inventory
        self._placed: dict[str, list[Placed]] = {}
        for p in placed:
            self._placed.setdefault(p.tensor.name, []).append(p)
        self._there = {t.name: t for t in gguf.GGUFReader(path).tensors}
        self.tensors = {
            n: s
            for n, s in ours.tensors.items()
            if n in self._placed and all(p.name in self._there for p in self._placed[n])
        }
        self._model = model

    def read(self, name: str) -> torch.Tensor:
        self.spec(name)
        parts = [(placed, self._values(placed)) for placed in self._placed[name]]
        return values_in_model(*parts[0]) if parts[0][0].rows is None else stack_in_model(parts)

    def _values(self, placed: Placed) -> torch.Tensor:
        """float32, of the shape in the file."""
        from gguf.quants import dequantize

        found = self._there[placed.name]
        if found.tensor_type.name != placed.kind:
            raise SourceError(f"{self.label}: {placed.name!r} came out as {found.tensor_type.name}, not {placed.kind}")
        return torch.from_numpy(dequantize(found.data, found.tensor_type).copy()).float().reshape(placed.shape)

    def identity(self) -> dict[str, Any]:
        return {"gguf": self.label}

    def save_assets(self, out: Path) -> None:
        self._model.save_assets(out)

    def tokenizer(self) -> Any:
        return self._model.tokenizer()
