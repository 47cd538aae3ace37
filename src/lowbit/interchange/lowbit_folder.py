"""A folder that lowbit wrote, one tensor at a time, without building its model: what exporters read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lowbit.errors import OutputError, SourceError, nearest
from lowbit.formats import QTensor, parse_format, parse_inputs
from lowbit.interchange.companions import companions_of, copy_companions
from lowbit.interchange.exporters.target import Contents, Stored
from lowbit.interchange.folder import (
    generation_of,
    load_config,
    load_tokenizer,
    quantization_method,
    read_json,
    remarks_on,
    weight_files,
)
from lowbit.interchange.inventory import Inventory, Param, inventory_of, meta_model, tied_names
from lowbit.interchange.quantized import as_float
from lowbit.interchange.safetensors_file import Entry, read_header, read_tensor
from lowbit.interchange.source import Source, TensorSpec, say_remarks


class LowbitFolder:
    """The stored tensors of a folder that lowbit wrote, and `contents`, which says what they are.

    SourceError when the folder is not lowbit's, has no transformers config, or lacks a tensor.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise SourceError(f"there is no folder {str(folder)!r}; quantize a model into it first")
        method = quantization_method(self.folder)
        if method != "lowbit":
            if method is None:
                raise SourceError(f"{folder} is a float model, not written by lowbit; quantize it first")
            raise SourceError(
                f"{folder} is quantized with {method}, not written by lowbit; lowbit import makes a folder of lowbit of it"
            )
        section = read_json(self.folder / "config.json")["quantization_config"]
        self.config = as_float(load_config(self.folder))
        files = weight_files(self.folder)
        say_remarks(str(folder), remarks_on(self.folder, files))
        self._entries: dict[str, tuple[Path, Entry]] = {
            name: (file, entry) for file in files for name, entry in read_header(file).entries.items()
        }
        self._section: Mapping[str, Any] = section["tensors"]
        self._parts: dict[str, list[str]] = {name: [] for name in self._section}
        for entry in self._entries:
            owner = entry
            while owner and owner not in self._parts:
                owner = owner.rpartition(".")[0]
            if owner and owner != entry:
                self._parts[owner].append(entry[len(owner) + 1 :])
        model = meta_model(self.config)
        self.inventory = inventory_of(model, frozenset(tied_names(model)) - set(section.get("tied", {})))
        owned = {f"{name}.{part}" for name, parts in self._parts.items() for part in parts}
        kept = [name for name in self._entries if name not in owned]
        order = {name: i for i, name in enumerate(self.inventory.params)}
        names = sorted([*self._section, *kept], key=lambda n: (order.get(n, len(order)), n))
        self.contents = Contents(
            str(folder),
            str(section.get("recipe", "")),
            self.config,
            {name: self._stored(name) for name in names},
            dict(section.get("tied", {})),
        )

    def _stored(self, name: str) -> Stored:
        param = self.inventory.params.get(name)
        kind = "other" if param is None else param.kind
        if name not in self._section:
            entry = self._entries[name][1]
            return Stored(name, entry.shape, kind, entry.dtype, param is not None and param.transposed)
        entry = self._section[name]
        inputs = parse_inputs(str(entry["inputs"])) if "inputs" in entry else None
        dtype = self.config.dtype or torch.float32
        shape = tuple(int(size) for size in entry["shape"])
        return Stored(name, shape, kind, dtype, bool(entry.get("transposed")), parse_format(entry["format"]), inputs)

    def _known(self, name: str) -> Stored:
        if name not in self.contents.tensors:
            raise SourceError(f"{self.folder} has no tensor {name!r}{nearest(name, self.contents.tensors)}")
        return self.contents.tensors[name]

    def read(self, name: str) -> torch.Tensor | QTensor:
        """The stored tensor: a QTensor [.., out, in] where it is quantized, else as it was kept."""
        stored = self._known(name)
        if stored.format is None:
            return read_tensor(*self._entries[name])
        mine = stored.format.parts(stored.shape)
        parts = {part: read_tensor(*self._entries[f"{name}.{part}"]) for part in self._parts[name] if part in mine}
        return QTensor.from_parts(stored.format, stored.shape, parts)

    def read_inputs(self, name: str) -> dict[str, torch.Tensor]:
        """What is stored of the inputs of a weight: a static scale, a divisor; empty where nothing is."""
        stored = self._known(name)
        wanted = {} if stored.inputs is None else stored.inputs.parts(stored.shape[-1])
        return {part: read_tensor(*self._entries[f"{name}.{part}"]) for part in wanted}

    def values(self, name: str) -> torch.Tensor:
        """The weight as the module has it: dequantized to float32 and turned where it is quantized, else as kept."""
        tensor = self.read(name)
        if isinstance(tensor, QTensor):
            dense = tensor.dequantize()
            return dense.transpose(-2, -1).contiguous() if self.contents.tensors[name].transposed else dense
        return tensor

    def tokenizer(self) -> Any:
        """The folder's tokenizer. SourceError when there is none."""
        return load_tokenizer(self.folder, str(self.folder))

    def save_assets(self, out: Path) -> None:
        """Copy what goes with the weights (`companions.py`) into the folder `out`. OutputError."""
        try:
            copy_companions(self.folder, out)
        except OSError as error:
            raise OutputError(f"cannot copy the files of {self.folder} to {out}: {error}") from error

    def left_files(self) -> tuple[str, ...]:
        """What `save_assets` leaves, a line for each reason."""
        return companions_of(self.folder).sentences()

    def dense(self) -> Source:
        """The model of dequantized weights as a source: what every export is held to."""
        return _Dense(self)


class _Dense(Source):
    """Dequantized float32 values under the names of the model."""

    def __init__(self, folder: LowbitFolder) -> None:
        self._folder = folder
        contents = folder.contents
        self.label, self.config = contents.label, contents.config
        self.tensors = {
            name: TensorSpec(name, _module_shape(s), _dense_dtype(s)) for name, s in contents.tensors.items()
        }
        known = folder.inventory.params
        params = {n: known.get(n) or Param(n, spec.shape, "other", "") for n, spec in self.tensors.items()}
        self.inventory = Inventory(params, contents.tied, folder.inventory.model_class)
        self.extra = tuple(name for name in self.tensors if name not in known)

    def read(self, name: str) -> torch.Tensor:
        return self._folder.values(name)

    def identity(self) -> dict[str, Any]:
        return {"lowbit": str(self._folder.folder)}

    def save_assets(self, out: Path) -> None:
        self._folder.save_assets(out)

    def generation(self) -> dict[str, Any]:
        return generation_of(self._folder.folder)

    def tokenizer(self) -> Any:
        return self._folder.tokenizer()


def _module_shape(stored: Stored) -> tuple[int, ...]:
    if stored.format is None or not stored.transposed:
        return stored.shape
    return (*stored.shape[:-2], stored.shape[-1], stored.shape[-2])


def _dense_dtype(stored: Stored) -> torch.dtype:
    return stored.dtype if stored.format is None else torch.float32
