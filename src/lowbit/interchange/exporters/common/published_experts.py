"""A mixture of experts as checkpoints publish it: stacks of experts taken apart, names as save_pretrained writes them.

transformers keeps the experts of a layer as one tensor [experts, out, in], gate and up projections together; the programs that
read exports know the published names (`experts.3.up_proj.weight`, Mixtral's `block_sparse_moe.experts.3.w1.weight`). Which rows
of a stack a published tensor has is asked of transformers' own rules, on row numbers, so that no model is named here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit.formats import Format, QTensor
from lowbit.formats.packing import pack, unpack
from lowbit.interchange.exporters.exporter import Problem
from lowbit.interchange.hf.calls import one_line
from lowbit.interchange.hf.models import meta_model
from lowbit.interchange.hf.published import as_saved
from lowbit.interchange.tensors import Contents, TensorPlan

if TYPE_CHECKING:
    from lowbit.interchange.readers.lowbit_folder import LowbitFolder

_EXPERT = re.compile(r"^(.*\bexperts)\.(\d+)\.(.*)$")


@dataclass(frozen=True)
class Piece:
    """A published tensor: `rows`, int64, of the tensor `whole` of the model, counted over all its experts; None for all."""

    tensor: TensorPlan
    whole: str
    rows: Tensor | None = None


@dataclass(frozen=True)
class Pieces:
    """A model under its published names. `contents` lists the pieces in place of the tensors that they are of.

    `problems`: of tensors that cannot be taken apart, which are missing from `contents`.
    """

    contents: Contents
    by_name: Mapping[str, Piece]
    problems: tuple[Problem, ...] = ()

    def of_wholes(self, problems: list[Problem]) -> list[Problem]:
        """Problems of pieces as problems of the model's tensors, each said once."""
        named = [
            replace(p, tensor=self.by_name[p.tensor].whole if p.tensor in self.by_name else p.tensor) for p in problems
        ]
        first = {(p.tensor, p.nearest, p.shape, re.sub(r"\d+", "0", p.reason)): p for p in reversed(named)}
        kept = {id(p) for p in first.values()}
        return [p for p in named if id(p) in kept]


class PublishedFolder:
    """A folder that lowbit wrote, read by its published names. A whole stack is in memory while its pieces are read."""

    def __init__(self, folder: LowbitFolder) -> None:
        self.folder, self.pieces = folder, published(folder.contents)
        self.contents = self.pieces.contents
        self._open: tuple[str, Tensor | Stack] | None = None

    def read(self, name: str) -> Tensor | QTensor:
        """As `LowbitFolder.read`."""
        piece = self.pieces.by_name[name]
        if piece.rows is None:
            return self.folder.read(piece.whole)
        if self._open is None or self._open[0] != piece.whole:
            read = self.folder.read(piece.whole)
            turned = self.folder.contents.tensors[piece.whole].transposed and isinstance(read, Tensor)
            whole = read.transpose(-1, -2) if turned and isinstance(read, Tensor) else read
            self._open = piece.whole, Stack(whole) if isinstance(whole, QTensor) else whole
        found = self._open[1]
        if isinstance(found, Stack):
            return found.rows(piece.rows)
        return found.reshape(-1, found.shape[-1])[piece.rows]

    def read_inputs(self, name: str) -> dict[str, Tensor]:
        """As `LowbitFolder.read_inputs`."""
        return self.folder.read_inputs(self.pieces.by_name[name].whole)


def published(model: Contents) -> Pieces:
    """The pieces of a model. One without experts has every tensor as its own piece."""
    if model.config is None or not any(t.kind == "experts" for t in model.tensors.values()):
        return Pieces(model, {name: Piece(stored, name) for name, stored in model.tensors.items()})
    module = meta_model(model.config)
    found: list[Piece] = []
    problems = []
    for stored in model.tensors.values():
        try:
            found += _taken_apart(module, stored)
        except _Whole as error:
            problems.append(Problem(stored.name, str(error), "lowbit's own folder"))
    counts = Counter(p.tensor.name for p in found)
    joined = {p.whole: None for p in found if counts[p.tensor.name] > 1}
    problems += [
        Problem(name, "transformers saves it as one tensor with others", "lowbit's own folder") for name in joined
    ]
    found = [p for p in found if p.whole not in joined]
    names = {p.whole: p.tensor.name for p in found if p.rows is None}
    contents = replace(
        model,
        tensors={p.tensor.name: p.tensor for p in found},
        tied={a: names.get(n, n) for a, n in model.tied.items()},
    )
    return Pieces(contents, {p.tensor.name: p for p in found}, tuple(problems))


def without_number(name: str) -> str:
    """The name of a tensor of one expert without the number of the expert: what the same tensor of all of them is called."""
    match = _EXPERT.match(name)
    return name if match is None else f"{match[1]}.{match[3]}"


def number_of(name: str) -> int:
    """The number of the expert that a tensor is of; -1 for others."""
    match = _EXPERT.match(name)
    return -1 if match is None else int(match[2])


class _Whole(Exception):
    """Why a tensor cannot be taken apart."""


def _taken_apart(module: Any, stored: TensorPlan) -> list[Piece]:
    stack = stored.kind == "experts"
    turned = stored.transposed and stored.format is None
    shape = (*stored.shape[:-2], stored.shape[-1], stored.shape[-2]) if turned else stored.shape
    count = prod(shape[:-1]) if stack else prod(shape[:1])
    ids = torch.arange(count).view(*shape[:-1], 1) if stack else torch.arange(count)
    try:
        made = as_saved(module, {stored.name: ids.transpose(-1, -2) if stored.transposed and stack else ids})
    except Exception as error:  # the rules are transformers', met with a row_part one column wide
        raise _Whole(f"transformers cannot take it apart for saving ({one_line(error)})") from error
    if not stack:
        if len(made) != 1:
            raise _Whole("transformers saves it in several pieces")
        return [Piece(replace(stored, name=next(iter(made))), stored.name)]
    if stored.format is not None and (why := _why_whole(stored.format, stored.shape)) is not None:
        raise _Whole(why)
    pieces = []
    for name, rows in made.items():
        rows = rows.transpose(-1, -2) if stored.transposed and rows.dim() > 1 else rows
        if rows.dim() != 2 or rows.shape[-1] != 1:
            raise _Whole("transformers saves its experts as one tensor, and readers want one for each")
        piece = replace(
            stored, name=name, shape=(len(rows), shape[-1]), kind="linear", transposed=False,
        )  # fmt: skip
        pieces.append(Piece(piece, stored.name, rows.reshape(-1)))
    if not torch.equal(torch.cat([p.rows for p in pieces if p.rows is not None]).sort().values, torch.arange(count)):
        raise _Whole("transformers does more than move rows where it takes it apart")
    return pieces


def _why_whole(fmt: Format, shape: tuple[int, ...]) -> str | None:
    """Why rows of a stack of this format are no tensor of it, or None."""
    if fmt.codebook is not None:
        return f"{fmt} has levels of its own for the whole stack"
    if fmt.block.rows not in (1, -1):
        return f"{fmt} has scales for blocks of several rows, which gates and ups may share"
    groups = fmt.block.counts(shape)[2]
    for nested in (fmt.scale, fmt.offset.store if fmt.offset else None):
        if not isinstance(nested, Format):
            continue
        runs = nested.block.cols > 0 and nested.block.rows in (1, -1) and groups % nested.block.cols == 0
        one = (nested.block.rows, nested.block.cols) == (-1, -1)
        if nested.offset is not None or isinstance(nested.scale, Format) or not (one or (runs and fmt.block.rows == 1)):
            return f"{fmt} has scales that run over several rows"
    return None


class Stack:
    """A quantized stack [experts, out, in] that `published` takes apart, its codes unpacked once."""

    def __init__(self, q: QTensor) -> None:
        self.q, self.codes = q, q.unpacked()
        self.counts = q.format.block.counts(q.shape)
        self.parts = {name: self._flat(name) for name in ("scale", "offset") if getattr(q, name) is not None}

    def rows(self, rows: Tensor) -> QTensor:
        """[len(rows), in]: these rows, counted over all experts. Codes and scales are moved, none is changed."""
        fmt, width = self.q.format, self.q.shape[-1]
        shape = (len(rows), width)
        codes = self.codes.view(-1, width)[rows].contiguous()
        batch, per, groups = self.counts
        found = {}
        for name, values in self.parts.items():
            if fmt.block.rows == 1:
                picked = values.view(batch * per, groups)[rows]
            else:  # a scale for each expert: its rows are of one
                picked = values.view(batch, groups)[rows[:1] // self.q.shape[-2]]
            found[name] = self._stored(name, picked, fmt.block.counts(shape), rows)
        return QTensor(fmt, shape, pack(codes, fmt.grid.cardinality), found.get("scale"), found.get("offset"))

    def _flat(self, name: str) -> Tensor:
        """Scales or offsets as values or codes, one for each block."""
        value = getattr(self.q, name)
        if isinstance(value, QTensor):
            return value.unpacked().view(-1)
        packed = name == "offset" and self.q.format.offset is not None and self.q.format.offset.store == "grid"
        return unpack(value, self.counts, self.q.format.grid.cardinality).reshape(-1) if packed else value.reshape(-1)

    def _stored(self, name: str, picked: Tensor, counts: tuple[int, int, int], rows: Tensor) -> Any:
        value, fmt = getattr(self.q, name), self.q.format
        if not isinstance(value, QTensor):
            packed = name == "offset" and fmt.offset is not None and fmt.offset.store == "grid"
            shaped = picked.reshape(counts).contiguous()
            return pack(shaped, fmt.grid.cardinality) if packed else shaped
        how, flat, outer = value.format, picked.reshape(-1).contiguous(), value.scale
        assert isinstance(outer, Tensor)
        if outer.numel() > 1:  # for runs of scales, some to a row
            outer = outer.reshape(self.counts[0] * self.counts[1], -1)[rows]
        scale = outer.reshape(how.block.counts((flat.numel(),))).clone()
        return QTensor(how, (flat.numel(),), pack(flat, how.grid.cardinality), scale)
