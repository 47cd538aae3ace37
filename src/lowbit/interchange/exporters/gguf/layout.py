"""One tensor of a model in ggml's order: its name there, its type, and its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.formats import QTensor
from lowbit.interchange.exporters.gguf.families import Family
from lowbit.interchange.exporters.gguf.types import BlockType, type_of
from lowbit.interchange.exporters.target import Contents, Stored

_FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Placed:
    """A tensor of the model and what it becomes.

    name    in the file
    kind    name of its ggml type
    shape   in elements, [out, in] as torch has it
    block   the type of blocks, None for floats
    heads   how many heads its rows are of, where they are interleaved; 0 where they stand as they are
    added   1 where a norm is stored as 1 + w
    """

    stored: Stored
    name: str
    kind: str
    shape: tuple[int, ...]
    block: BlockType | None
    heads: int = 0
    added: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes in the file, padding left out."""
        count = int(torch.Size(self.shape).numel())
        if self.block is not None and self.stored.format is not None:
            return self.stored.format.nbytes(self.shape)
        return count * {"F32": 4}.get(self.kind, 2)


def names_in_file(family: Family, model: Contents) -> dict[str, str | None]:
    """Name in the model -> name in the file, None where llama.cpp has no such tensor."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    assert model.config is not None
    architecture = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == family.architecture)
    known = get_tensor_name_map(architecture, model.config.get_text_config().num_hidden_layers)
    return {name: known.get_name(name, try_suffixes=(".weight", ".bias")) for name in model.tensors}


def place(family: Family, model: Contents) -> list[Placed]:
    """Every tensor of a model that `check` has passed, in its order."""
    names: Mapping[str, str | None] = names_in_file(family, model)
    return [_placed(family, model, stored, names[name] or name) for name, stored in model.tensors.items()]


def _placed(family: Family, model: Contents, stored: Stored, name: str) -> Placed:
    config: Any = model.config
    leaf = stored.name.split(".")[-2] if "." in stored.name else stored.name
    heads = 0
    if leaf in family.interleaved:
        text = config.get_text_config()
        heads = text.num_attention_heads if leaf == family.interleaved[0] else text.num_key_value_heads
    if stored.format is not None:
        block = type_of(stored.format)
        assert block is not None
        return Placed(stored, name, block.name, stored.shape, block, heads)
    shape = tuple(reversed(stored.shape)) if stored.transposed else stored.shape
    kind = "F32" if len(shape) < 2 else _FLOATS[stored.dtype]  # ggml adds and multiplies by vectors in float32
    is_norm = len(shape) == 1 and stored.name.endswith("norm.weight")
    return Placed(stored, name, kind, shape, None, heads, int(family.shifted and is_norm))


def bytes_in_file(placed: Placed, tensor: Tensor | QTensor) -> Any:
    """The tensor as numpy has it for the file: uint8 [rows, bytes] for blocks, else of the type's own width."""
    if isinstance(tensor, QTensor):
        assert placed.block is not None
        packed = placed.block.pack(tensor)
        return packed[_rows(placed, len(packed)).numpy()] if placed.heads else packed
    if placed.stored.transposed:
        tensor = tensor.T
    if placed.heads:
        tensor = tensor[_rows(placed, len(tensor))]
    if placed.added:
        tensor = tensor.float() + placed.added
    if placed.kind == "BF16":
        return tensor.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()
    return tensor.to({"F32": torch.float32, "F16": torch.float16}[placed.kind]).contiguous().numpy()


def values_in_model(placed: Placed, values: Tensor) -> Tensor:
    """What `bytes_in_file` did to the order of a tensor, undone: float32 as the module has it."""
    if placed.heads:
        values = values[torch.argsort(_rows(placed, len(values)))]
    if placed.added:
        values = values - placed.added
    return values.T.contiguous() if placed.stored.transposed else values.contiguous()


def _rows(placed: Placed, rows: int) -> Tensor:
    """int64 [rows]: which row of the model stands where in the file. Row i of a half of a head beside row i of the
    other: llama.cpp rotates neighbours (i, i + 1), transformers (i, i + d / 2)."""
    return torch.arange(rows).view(placed.heads, 2, -1).transpose(1, 2).reshape(-1)
