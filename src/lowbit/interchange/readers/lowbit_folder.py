"""A folder that lowbit wrote, one tensor at a time, without building its model: what exporters read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lowbit.errors import OutputError, SourceError, nearest
from lowbit.formats import QTensor
from lowbit.interchange.checks.section import check_parts, read_section
from lowbit.interchange.checks.tensors import check_layers, check_shapes
from lowbit.interchange.companions import companions_of, copy_companions
from lowbit.interchange.files.safetensors_reader import read_tensor
from lowbit.interchange.files.settings import check_ours, generation_of, read_config
from lowbit.interchange.files.weights import entries_of, remarks_on
from lowbit.interchange.hf.conversion import unread
from lowbit.interchange.hf.loading import load_config, load_tokenizer
from lowbit.interchange.hf.models import meta_model
from lowbit.interchange.hf.section import as_float
from lowbit.interchange.inventory import Inventory, Param, inventory_of, tied_names
from lowbit.interchange.source import Source, say_remarks
from lowbit.interchange.tensors import Contents, TensorPlan, TensorSpec


class LowbitFolder:
    """The stored tensors of a folder that lowbit wrote, and `contents`, which says what they are.

    SourceError when the folder is not lowbit's, has no transformers config, or lacks a tensor.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        check_ours(folder)
        where, config = str(self.folder / "config.json"), read_config(self.folder)
        section = read_section(config.get("quantization_config"), where)
        self.config = as_float(load_config(self.folder))
        say_remarks(str(folder), remarks_on(self.folder))
        self._entries = entries_of(self.folder)
        check_parts(section, {name: (e.dtype, e.shape) for name, (_, e) in self._entries.items()}, str(self.folder))
        check_layers(config, self._entries, where)
        self._packed = section.tensors
        model = meta_model(self.config, len(self._entries))
        self.inventory = inventory_of(model, frozenset(tied_names(model)) - set(section.tied))
        owned = {f"{name}.{part}" for name, packed in self._packed.items() for part in packed.parts()}
        kept = [name for name in self._entries if name not in owned]
        order = {name: i for i, name in enumerate(self.inventory.params)}
        names = sorted([*self._packed, *kept], key=lambda n: (order.get(n, len(order)), n))
        tensors = {name: self._tensor(name) for name in names}
        self._check(model, tensors, section.tied, config)
        self.contents = Contents(str(folder), section.recipe, self.config, tensors, dict(section.tied))

    def _check(
        self, model: Any, tensors: Mapping[str, TensorPlan], tied: Mapping[str, str], config: dict[str, Any]
    ) -> None:
        """SourceError where the folder lacks a tensor of its model, or has one of another shape."""
        shapes = {name: param.shape for name, param in self.inventory.params.items()}
        check_shapes(shapes, {name: s.shape for name, s in tensors.items()}, config, str(self.folder))
        missing = [name for name in shapes if name not in tensors and name not in tied and not unread(model, name)]
        if missing:
            raise SourceError(
                f"{self.folder}: the weights lack {len(missing)} of {len(shapes)} tensors of {type(model).__name__}, as "
                f"{missing[0]!r}; copy the folder again or quantize the model again"
            )

    def _tensor(self, name: str) -> TensorPlan:
        param = self.inventory.params.get(name)
        kind = "other" if param is None else param.kind
        if name not in self._packed:
            entry = self._entries[name][1]
            return TensorPlan(name, entry.shape, kind, entry.dtype, param is not None and param.transposed)
        packed, dtype = self._packed[name], self.config.dtype or torch.float32
        *batch, out, width = packed.shape
        shape = (*batch, width, out) if packed.transposed else packed.shape
        return TensorPlan(name, shape, kind, dtype, packed.transposed, packed.format, inputs=packed.inputs)

    def _known(self, name: str) -> TensorPlan:
        if name not in self.contents.tensors:
            raise SourceError(f"{self.folder} has no tensor {name!r}{nearest(name, self.contents.tensors)}")
        return self.contents.tensors[name]

    def read(self, name: str) -> torch.Tensor | QTensor:
        """The stored tensor: a QTensor [.., out, in] where it is quantized, else as it was kept."""
        known = self._known(name)
        if known.format is None:
            return read_tensor(*self._entries[name])
        parts = {part: read_tensor(*self._entries[f"{name}.{part}"]) for part in known.format.parts(known.stored_shape)}
        return QTensor.from_parts(known.format, known.stored_shape, parts)

    def read_inputs(self, name: str) -> dict[str, torch.Tensor]:
        """What is stored of the inputs of a weight: a static scale, a divisor; empty where nothing is."""
        wanted = self._known(name).input_parts()
        return {part: read_tensor(*self._entries[f"{name}.{part}"]) for part in wanted}

    def values(self, name: str) -> torch.Tensor:
        """The weight as the module has it: dequantized to float32 and transposed where the module keeps it so, else as kept."""
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
            name: TensorSpec(name, t.shape, t.dtype if t.format is None else torch.float32)
            for name, t in contents.tensors.items()
        }
        known = folder.inventory.params
        params = {n: known.get(n) or Param(n, spec.shape, "other") for n, spec in self.tensors.items()}
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
