"""One tensor of a model in ggml's order: its name there, its type, and its rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from lowbit.families.family import Family
from lowbit.formats import QTensor
from lowbit.interchange.exporters.common.exponents import without_exponent
from lowbit.interchange.exporters.common.published_experts import PublishedModel, number_of, published, without_number
from lowbit.interchange.exporters.gguf.metadata import gguf_of
from lowbit.interchange.exporters.gguf.types import BlockType, type_of
from lowbit.interchange.rows import gather, row_parts_of
from lowbit.interchange.tensors import Contents, TensorPlan

_FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Placed:
    """A tensor of the model and what it becomes.

    name    in the file
    kind    name of its ggml type
    shape   in elements, [out, in] as torch has it; of experts [experts, out, in]
    block   the type of blocks, None for floats
    heads   how many heads its rows are of, where they are interleaved; 0 where they stand as they are
    added   1 where a norm is stored as 1 + w
    rows    of a part of a stack of experts: its rows in the model's stack, counted over all experts
    """

    tensor: TensorPlan
    name: str
    kind: str
    shape: tuple[int, ...]
    block: BlockType | None
    heads: int = 0
    added: int = 0
    rows: Tensor | None = field(default=None, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes in the file, padding left out."""
        count = int(torch.Size(self.shape).numel())
        if self.block is not None and self.tensor.format is not None:
            return self.tensor.format.nbytes(self.shape)
        return count * {"F32": 4}.get(self.kind, 2)


def names_in_file(family: Family, model: Contents) -> dict[str, str | None]:
    """Name in the model -> name in the file, of a stack of gates and ups that of its gates; None where llama.cpp has none."""
    parts = _parts(family, model, published(model))
    return {
        name: None if None in (there := [n for n, _ in parts.get(name, ())]) or not there else there[0]
        for name in model.tensors
    }


def place(family: Family, model: Contents) -> list[Placed]:
    """Every tensor of a model that `check` has passed, in its order; gates and ups of experts are two."""
    return [
        _placed(family, model, model.tensors[whole], there or whole, rows)
        for whole, parts in _parts(family, model, published(model)).items()
        for there, rows in parts
    ]


def _parts(family: Family, model: Contents, saved: PublishedModel) -> dict[str, list[tuple[str | None, Tensor | None]]]:
    """Name in the model -> (name in the file, rows of the stack or None) of what it becomes."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    assert model.config is not None
    architecture = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == gguf_of(family).architecture)
    known = get_tensor_name_map(architecture, model.config.get_text_config().num_hidden_layers)
    together: dict[tuple[str, str], list[tuple[int, Tensor | None]]] = {}
    for name, tensor in saved.by_name.items():
        together.setdefault((tensor.whole, without_number(name)), []).append((number_of(name), tensor.rows))
    found: dict[str, list[tuple[str | None, Tensor | None]]] = {}
    for (whole, name), experts in together.items():
        stacked = [rows for _, rows in sorted(experts, key=lambda e: e[0]) if rows is not None]
        there = known.get_name(name, try_suffixes=(".weight", ".bias"))
        found.setdefault(whole, []).append((there, torch.cat(stacked) if stacked else None))
    return found


def _placed(family: Family, model: Contents, t: TensorPlan, name: str, rows: Tensor | None) -> Placed:
    config: Any = model.config
    leaf = t.name.split(".")[-2] if "." in t.name else t.name
    heads = 0
    interleaved = gguf_of(family).interleaved
    if leaf in interleaved:
        text = config.get_text_config()
        heads = text.num_attention_heads if leaf == interleaved[0] else text.num_key_value_heads
    shape = t.out_in
    if rows is not None:
        shape = (shape[0], len(rows) // shape[0], shape[-1])
    if t.format is not None:
        block = type_of(t.format)
        assert block is not None
        return Placed(t, name, block.name, shape, block, heads, rows=rows)
    router = ".ffn_gate_inp" in name  # of experts, or of one that all tokens share, which is a vector to llama.cpp
    shape = shape[1:] if router and shape[0] == 1 else shape
    kind = "F32" if len(shape) < 2 or router else _FLOATS[t.dtype]  # ggml multiplies by vectors in float32
    is_norm = len(shape) == 1 and t.name.endswith("norm.weight")
    return Placed(t, name, kind, shape, None, heads, int(family.plus_one and is_norm), rows)


def bytes_in_file(placed: Placed, tensor: Tensor | QTensor) -> Any:
    """The tensor as numpy has it for the file: uint8 [rows, bytes] for blocks, else of the type's own width."""
    if isinstance(tensor, QTensor):
        assert placed.block is not None
        tensor = without_exponent(tensor, placed.tensor.name)
        if placed.rows is not None:
            tensor = gather(tensor.format, placed.rows, [(0, row_parts_of(tensor))])
        packed = placed.block.pack(tensor)
        return packed[_rows(placed, len(packed)).numpy()] if placed.heads else packed
    if placed.tensor.transposed:
        tensor = tensor.transpose(-1, -2)
    if placed.rows is not None:
        tensor = tensor.reshape(-1, tensor.shape[-1])[placed.rows]
    tensor = tensor.reshape(placed.shape)
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
    if placed.tensor.transposed:
        values = values.T
    return values.reshape(placed.tensor.shape) if placed.tensor.format is None else values.contiguous()


def stack_in_model(parts: list[tuple[Placed, Tensor]]) -> Tensor:
    """The stack of experts that these parts [experts, out, in] are of: float32 as the module has it."""
    t, total = parts[0][0].tensor, sum(prod(values.shape[:-1]) for _, values in parts)
    made = torch.empty((total, parts[0][1].shape[-1]))
    for placed, values in parts:
        assert placed.rows is not None
        made[placed.rows] = values.reshape(-1, values.shape[-1])
    made = made.reshape(t.stored_shape[0], -1, made.shape[-1])
    return made.transpose(-1, -2).contiguous() if t.transposed else made


def _rows(placed: Placed, rows: int) -> Tensor:
    """int64 [rows]: which row of the model stands where in the file. Row i of a half of a head beside row i of the
    other: llama.cpp rotates neighbours (i, i + 1), transformers (i, i + d / 2)."""
    return torch.arange(rows).view(placed.heads, 2, -1).transpose(1, 2).reshape(-1)
