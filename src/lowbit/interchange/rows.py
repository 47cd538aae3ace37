"""Rows of quantized weights, moved by number: codes and scales come to stand elsewhere, and none is changed.

Models and checkpoints keep the same weights in different tensors: experts stacked or apart, gates above ups, the rows of q and k in
another order. Rules of other programs lead from one to the other. They are run once, on row numbers one column wide (`numbered`);
where these do not come back each once, the rules do more than move rows. Everything that is stored of a weight is then gathered by
these numbers as *row parts*, tensors with a row for each row of the weight: codes [rows, in], scales [rows, groups].
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.formats import Format, QTensor
from lowbit.formats.packing import pack, unpack


def numbered(shape: tuple[int, ...], first: int = 0) -> Tensor:
    """int64 [..., out, 1]: the row numbers of a weight of `shape` [..., out, in], from `first` on."""
    return torch.arange(first, first + math.prod(shape[:-1])).view(*shape[:-1], 1)


def each_once(numbers: Tensor, count: int) -> bool:
    """Whether these are the numbers below `count`, each once, in whatever order."""
    return torch.equal(numbers.reshape(-1).sort().values.long(), torch.arange(count))


def why_whole(fmt: Format, shape: tuple[int, ...], joined: bool) -> str | None:
    """Why rows of a weight of `shape` are no tensor of this format, or None.

    joined: rows of several weights become one tensor, so that these can share no scale. Else those of one tensor of the weight's
    batch, such as an expert, stay together.
    """
    if fmt.codebook is not None:
        return f"{fmt} has levels of its own for the whole stack"
    if fmt.block.rows not in ((1,) if joined else (1, -1)):
        return f"{fmt} has scales for blocks of several rows, which gates and ups may share"
    groups = fmt.block.counts(shape)[2]
    for nested in (fmt.scale, fmt.offset.store if fmt.offset else None):
        if not isinstance(nested, Format):
            continue
        in_row = nested.block.cols > 0 and nested.block.rows in (1, -1) and groups % nested.block.cols == 0
        one = (nested.block.rows, nested.block.cols) == (-1, -1) and not joined
        if (
            nested.offset is not None
            or not isinstance(nested.scale, str)
            or not (one or (in_row and fmt.block.rows == 1))
        ):
            return f"{fmt} has scales that run over several rows"
    return None


def row_parts_of(q: QTensor) -> dict[str, Tensor]:
    """What is stored of a weight, as row parts; a scale that rows share stands at each of them. `why_whole` must be None."""
    fmt, counts = q.format, q.format.block.counts(q.shape)
    rows = math.prod(q.shape[:-1])

    def of_rows(values: Tensor) -> Tensor:
        blocks = values.reshape(1, 1, 1) if values.numel() == 1 else values.reshape(*counts[:2], -1)
        return blocks.expand(counts[0], rows // counts[0], -1).reshape(rows, -1)

    parts = {"codes": q.unpacked().view(rows, -1)}
    for name in ("scale", "offset"):
        value = getattr(q, name)
        if isinstance(value, QTensor):
            assert isinstance(value.scale, Tensor)
            parts |= {f"{name}.codes": of_rows(value.unpacked()), f"{name}.scale": of_rows(value.scale)}
        elif value is not None and name == "offset" and fmt.offset is not None and fmt.offset.store == "grid":
            parts[name] = of_rows(unpack(value, counts, fmt.grid.cardinality))
        elif value is not None:
            parts[name] = of_rows(value)
    return parts


def from_row_parts(fmt: Format, shape: tuple[int, ...], parts: Mapping[str, Tensor]) -> QTensor:
    """The QTensor of `shape` with these `row_parts_of`."""
    counts = fmt.block.counts(shape)

    def of_blocks(values: Tensor) -> Tensor:  # rows that share a scale have the same
        return values.reshape(counts[0], -1, values.shape[-1])[:, : counts[1]]

    def stored(name: str, how: Any) -> Any:
        if isinstance(how, Format):
            codes, scales = (of_blocks(parts[f"{name}.{leaf}"]).reshape(-1) for leaf in ("codes", "scale"))
            wanted = how.block.counts((len(codes),))
            packed = pack(codes.contiguous(), how.grid.cardinality)
            return QTensor(how, (len(codes),), packed, scales[: math.prod(wanted)].view(wanted).clone())
        value = of_blocks(parts[name]).reshape(counts)
        return pack(value.contiguous(), fmt.grid.cardinality) if how == "grid" else value.clone()

    return QTensor(
        fmt, shape, pack(parts["codes"].reshape(shape).contiguous(), fmt.grid.cardinality),
        None if fmt.scale is None else stored("scale", fmt.scale),
        None if fmt.offset is None else stored("offset", fmt.offset.store),
    )  # fmt: skip


def gather(fmt: Format, numbers: Tensor, sources: Iterable[tuple[int, Mapping[str, Tensor]]]) -> QTensor:
    """[..., out, in] of the rows with these `numbers`, int64 [..., out].

    sources: (number of its first row, row parts) of each weight of format `fmt`; one is asked for at a time.
    """
    flat = numbers.reshape(-1)
    made: dict[str, Tensor] = {}
    for first, parts in sources:
        there = ((flat >= first) & (flat < first + len(parts["codes"]))).nonzero()[:, 0]
        for name, part in parts.items():
            whole = made.setdefault(name, torch.empty((len(flat), part.shape[-1]), dtype=part.dtype))
            # As bytes: PyTorch does not index every type of scale.
            whole.view(torch.uint8).index_copy_(0, there, part.view(torch.uint8).index_select(0, flat[there] - first))
    return from_row_parts(fmt, (*numbers.shape, made["codes"].shape[-1]), made)
