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
from lowbit.interchange.exporters.exporter import Problem
from lowbit.interchange.hf.calls import one_line
from lowbit.interchange.hf.models import meta_model
from lowbit.interchange.hf.published import as_saved
from lowbit.interchange.rows import each_once, gather, numbered, row_parts_of, why_whole
from lowbit.interchange.tensors import Contents, TensorPlan

if TYPE_CHECKING:
    from lowbit.interchange.readers.lowbit_folder import LowbitFolder

_EXPERT = re.compile(r"^(.*\bexperts)\.(\d+)\.(.*)$")


@dataclass(frozen=True)
class PublishedTensor:
    """A published tensor: `rows`, int64, of the tensor `whole` of the model, counted over all its experts; None for all."""

    tensor: TensorPlan
    whole: str
    rows: Tensor | None = None


@dataclass(frozen=True)
class PublishedModel:
    """A model under its published names. `contents` lists the published tensors in place of those that they are of.

    `problems`: of tensors that cannot be taken apart, which are missing from `contents`.
    """

    contents: Contents
    by_name: Mapping[str, PublishedTensor]
    problems: tuple[Problem, ...] = ()

    def of_wholes(self, problems: list[Problem]) -> list[Problem]:
        """Problems of published tensors as problems of the model's tensors, each said once."""
        named = [
            replace(p, tensor=self.by_name[p.tensor].whole if p.tensor in self.by_name else p.tensor) for p in problems
        ]
        first = {(p.tensor, p.nearest, p.shape, re.sub(r"\d+", "0", p.reason)): p for p in reversed(named)}
        kept = {id(p) for p in first.values()}
        return [p for p in named if id(p) in kept]


class PublishedFolder:
    """A folder that lowbit wrote, read by its published names. A whole stack is in memory while it is read."""

    def __init__(self, folder: LowbitFolder) -> None:
        self.folder, self.model = folder, published(folder.contents)
        self.contents = self.model.contents
        self._open: tuple[str, Format | None, dict[str, Tensor]] | None = None  # name of a stack, and its row parts

    def read(self, name: str) -> Tensor | QTensor:
        """As `LowbitFolder.read`."""
        found = self.model.by_name[name]
        if found.rows is None:
            return self.folder.read(found.whole)
        if self._open is None or self._open[0] != found.whole:
            read = self.folder.read(found.whole)
            if isinstance(read, QTensor):
                self._open = found.whole, read.format, row_parts_of(read)
            else:
                turned = read.transpose(-1, -2) if self.folder.contents.tensors[found.whole].transposed else read
                self._open = found.whole, None, {"": turned.reshape(-1, turned.shape[-1])}
        _, fmt, parts = self._open
        return parts[""][found.rows] if fmt is None else gather(fmt, found.rows, [(0, parts)])

    def read_inputs(self, name: str) -> dict[str, Tensor]:
        """As `LowbitFolder.read_inputs`."""
        return self.folder.read_inputs(self.model.by_name[name].whole)


def published(model: Contents) -> PublishedModel:
    """A model under its published names. One without experts keeps every tensor as it is."""
    if model.config is None or not any(t.kind == "experts" for t in model.tensors.values()):
        return PublishedModel(model, {name: PublishedTensor(stored, name) for name, stored in model.tensors.items()})
    module = meta_model(model.config)
    found: list[PublishedTensor] = []
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
    return PublishedModel(contents, {p.tensor.name: p for p in found}, tuple(problems))


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


def _taken_apart(module: Any, stored: TensorPlan) -> list[PublishedTensor]:
    stack = stored.kind == "experts"
    turned = stored.transposed and stored.format is None
    shape = (*stored.shape[:-2], stored.shape[-1], stored.shape[-2]) if turned else stored.shape
    count = prod(shape[:-1]) if stack else prod(shape[:1])
    ids = numbered(shape) if stack else torch.arange(count)
    try:
        made = as_saved(module, {stored.name: ids.transpose(-1, -2) if stored.transposed and stack else ids})
    except Exception as error:  # the rules are transformers', met with a tensor one column wide
        raise _Whole(f"transformers cannot take it apart for saving ({one_line(error)})") from error
    if not stack:
        if len(made) != 1:
            raise _Whole("transformers saves it in several pieces")
        return [PublishedTensor(replace(stored, name=next(iter(made))), stored.name)]
    if stored.format is not None and (why := why_whole(stored.format, stored.shape, joined=False)) is not None:
        raise _Whole(why)
    found = []
    for name, rows in made.items():
        rows = rows.transpose(-1, -2) if stored.transposed and rows.dim() > 1 else rows
        if rows.dim() != 2 or rows.shape[-1] != 1:
            raise _Whole("transformers saves its experts as one tensor, and readers want one for each")
        tensor = replace(stored, name=name, shape=(len(rows), shape[-1]), kind="linear", transposed=False)
        found.append(PublishedTensor(tensor, stored.name, rows.reshape(-1)))
    if not each_once(torch.cat([p.rows for p in found if p.rows is not None]), count):
        raise _Whole("transformers does more than move rows where it takes it apart")
    return found
