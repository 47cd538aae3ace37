"""The weights of a model by name, for the engine: from a folder that lowbit wrote, a float folder, or a live model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import EngineError
from lowbit.formats import InputQuantizer, QTensor
from lowbit.interchange.checks.section import Section, check_parts, read_section
from lowbit.interchange.checks.tensors import check_layers
from lowbit.interchange.files.safetensors_reader import read_tensor
from lowbit.interchange.files.settings import OURS, read_config
from lowbit.interchange.files.weights import entries_of
from lowbit.interchange.source import Source


@dataclass(frozen=True, eq=False)
class Found:
    """A weight: a QTensor, or a float tensor; and what becomes of its inputs."""

    value: QTensor | Tensor
    inputs: InputQuantizer | None = None


class Weights(ABC):
    """The tensors of a model by their names in transformers, without `.weight`."""

    config: Mapping[str, Any]

    @abstractmethod
    def find(self, name: str) -> Found | None:
        """The tensor `name`, or None; one tied to another is that other."""

    def get(self, name: str) -> Found:
        """The tensor `name`. EngineError when there is none."""
        found = self.find(name)
        if found is None:
            raise EngineError(f"the model has no {name!r}, which the engine needs")
        return found

    def vector(self, name: str) -> Tensor | None:
        """A norm or bias as float32, or None."""
        found = self.find(name)
        if found is None:
            return None
        value = found.value
        return (value.dequantize() if isinstance(value, QTensor) else value).float().contiguous()


class FolderWeights(Weights):
    """Read from safetensors, one tensor at a time, when they are asked for."""

    def __init__(self, folder: Path, config: Mapping[str, Any] | None = None) -> None:
        """config: that of the folder where it is at hand already."""
        config, where = read_config(folder) if config is None else config, str(folder / "config.json")
        given = config.get("quantization_config") or None
        method = OURS if given is None else given.get("quant_method", OURS)
        if method != OURS:
            raise EngineError(
                f"{folder} is quantized with {method}; the engine runs float models and what lowbit wrote"
            )
        self.config, self._stored = config, entries_of(folder)
        section = Section({}, {}) if given is None else read_section(given, where)
        check_parts(section, {name: (e.dtype, e.shape) for name, (_, e) in self._stored.items()}, str(folder))
        check_layers(config, self._stored, where)
        self._packed, self._tied = section.tensors, dict(section.tied)
        if config.get("tie_word_embeddings") and "lm_head.weight" not in self._stored:
            self._tied = {"lm_head.weight": "model.embed_tokens.weight", **self._tied}

    def find(self, name: str) -> Found | None:
        key = self._tied.get(name, name)
        entry = self._packed.get(key)
        if entry is None:
            place = self._stored.get(key)
            return None if place is None else Found(read_tensor(*place))
        if entry.transposed:
            raise EngineError(f"{name!r} is stored as [in, out]; the engine reads [out, in]")
        parts = {part: read_tensor(*self._stored[f"{key}.{part}"]) for part in entry.weight_parts()}
        input_parts = {part: read_tensor(*self._stored[f"{key}.{part}"]) for part in entry.input_parts()}
        quantizer = InputQuantizer.of(entry.inputs, entry.shape[-1], input_parts) if entry.inputs else None
        return Found(QTensor.from_parts(entry.format, entry.shape, parts), quantizer)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape by its name, packed ones as [out, in]; nothing is read for it."""
        kept = {name: entry.shape for name, (_, entry) in self._stored.items()}
        return kept | {name: packed.shape for name, packed in self._packed.items()}


class ModelWeights(Weights):
    """Of a transformers model in memory, packed or not; shares its memory until the engine has packed."""

    def __init__(self, model: nn.Module) -> None:
        self.config = model.config.to_dict()  # type: ignore[operator, union-attr]
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._parameters = dict(model.named_parameters(remove_duplicate=False))

    def find(self, name: str) -> Found | None:
        from lowbit.nn.packed import PackedWeight

        module = self._modules.get(name)
        if isinstance(module, PackedWeight):
            if module.transposed:
                raise EngineError(f"{name!r} is stored as [in, out]; the engine reads [out, in]")
            return Found(module.qtensor(), module.quantizer())
        value = self._parameters.get(name)
        return None if value is None else Found(value.detach().cpu())


class SourceWeights(Weights):
    """Of a model by any name that lowbit opens, such as a GGUF file: read one tensor at a time, packed as it is stored."""

    def __init__(self, source: Source) -> None:
        if source.config is None:
            raise EngineError(f"{source.label} has no transformers config, by which the engine knows a model")
        self.config, self._source = source.config.to_dict(), source

    def find(self, name: str) -> Found | None:
        key = self._source.inventory.tied.get(name, name)
        if key not in self._source.tensors:
            return None
        stored = self._source.stored_as(key)
        if stored is None or stored.read is None or self._source.inventory.params[key].transposed:
            return Found(self._source.read(key))
        q, inputs = stored.read(), stored.inputs
        return Found(q, InputQuantizer.of(inputs, q.shape[-1], stored.input_parts()) if inputs else None)


def as_float(value: Tensor) -> Tensor:
    """A float weight in a type that the kernels read."""
    known = (torch.float32, torch.float16, torch.bfloat16)
    return (value if value.dtype in known else value.float()).contiguous()
