"""A quantized weight through the rules that rename, stack and reorder a checkpoint, its integers untouched.

Such rules move whole rows: they stack experts, concatenate gate and up, put the rows of q and k into another order. Each stored
part has a row for each row of the weight (a *row_part*: codes [out, in], scales [out, groups]), so the same rules are run on
each row_part. A row_part of row numbers goes first: where it does not come back as the same numbers in some order, the rules do more
than move rows, and the weight is read as values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.formats import Format, Inputs, QTensor
from lowbit.formats.packing import pack, unpack
from lowbit.interchange.readers.quantized import QuantizedWeight, ReadPart

Rules = Callable[[ReadPart], Tensor]


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor of the model as its source stores it. `format` None: no format holds it, for the reason `why`.

    `read` gives [..., out, in] also where the model keeps [..., in, out]. `inputs`, `input_parts` and `note` as in QuantizedWeight.
    """

    format: Format | None
    why: str = ""
    note: str = ""
    inputs: Inputs | None = None
    read: Callable[[], QTensor] | None = None
    input_parts: Callable[[], dict[str, Tensor]] = dict


def tensor_of(
    rules: Rules, weights: Mapping[str, QuantizedWeight], parts: Sequence[str], read: ReadPart, transposed: bool, renamed: bool
) -> QuantizedTensor | None:  # fmt: skip
    """The model tensor that `rules` make of `parts`, some of which are stored `weights`; None where none is.

    `renamed`: the rules only rename, so that any format passes through them.
    """
    found = [weights.get(part) for part in parts]
    stored = [weight for weight in found if weight is not None]
    if not stored:
        return None
    first = stored[0]
    if len(stored) < len(found):
        return QuantizedTensor(None, "it is made of quantized and of float tensors")
    bad = next((w for w in stored if w.format is None or w.quantized is None), None)
    if bad is not None:
        return QuantizedTensor(None, bad.why)
    if renamed and first.transposed == transposed:
        quantized, beside = first.quantized, first.input_parts
        return QuantizedTensor(
            first.format, "", first.note, first.inputs, lambda: quantized(read),  # type: ignore[misc]
            dict if beside is None else lambda: beside(read),
        )  # fmt: skip
    if any(w.format != first.format for w in stored):
        return QuantizedTensor(
            None, f"its parts have different formats, {' and '.join(sorted({str(w.format) for w in stored}))}"
        )
    if first.format is None or not by_rows(first.format, first.shape):
        return QuantizedTensor(
            None, f"it is made of {len(stored)} tensors, and a block of {first.format} spans rows of each"
        )
    moved = _moves_rows(rules, dict(zip(parts, stored)), transposed)
    if not moved:
        return QuantizedTensor(None, "the model keeps it in another arrangement than the checkpoint")
    note = (
        first.note
        if first.inputs is None
        else "; ".join(filter(None, (first.note, f"its inputs ({first.inputs}) stay float")))
    )
    return QuantizedTensor(
        first.format, "", note, None, lambda: _joined(rules, weights, first.format, read, transposed)
    )


def by_rows(fmt: Format, shape: tuple[int, ...]) -> bool:
    """Whether every stored part has rows of its own for each row of the weight."""
    groups = fmt.block.counts(shape)[2]
    nested = [s for s in (fmt.scale, fmt.offset.store if fmt.offset else None) if isinstance(s, Format)]
    whole = all(
        s.block.rows in (1, -1) and s.block.cols > 0 and groups % s.block.cols == 0 and isinstance(s.scale, str) and s.offset is None
        for s in nested
    )  # fmt: skip
    return fmt.block.rows == 1 and fmt.codebook is None and whole


def row_parts_of(q: QTensor) -> dict[str, Tensor]:
    """Every stored part with the rows of the weight in front: codes [..., out, in], scales [..., out, groups], ..."""
    rows = q.shape[:-1]
    row_parts = {"codes": q.unpacked()}
    for name in ("scale", "offset"):
        value, fmt = getattr(q, name), q.format
        if isinstance(value, QTensor):
            row_parts[f"{name}.codes"] = value.unpacked().view(*rows, -1)
            row_parts[f"{name}.scale"] = value.scale.view(*rows, -1)  # type: ignore[union-attr]
        elif value is not None and name == "offset" and fmt.offset is not None and fmt.offset.store == "grid":
            row_parts[name] = unpack(value, fmt.block.counts(q.shape), fmt.grid.cardinality).view(*rows, -1)
        elif value is not None:
            row_parts[name] = value.view(*rows, -1)
    return row_parts


def from_row_parts(fmt: Format, row_parts: Mapping[str, Tensor]) -> QTensor:
    """The QTensor with these `row_parts_of`."""
    shape = tuple(row_parts["codes"].shape)
    counts = fmt.block.counts(shape)

    def stored(name: str, how: Any) -> Any:
        if isinstance(how, Format):
            codes, count = row_parts[f"{name}.codes"].reshape(-1), math.prod(counts)
            scale = row_parts[f"{name}.scale"].reshape(how.block.counts((count,)))
            return QTensor(how, (count,), pack(codes, how.grid.cardinality), scale)
        value = row_parts[name].reshape(counts).contiguous()
        return pack(value, fmt.grid.cardinality) if how == "grid" else value

    return QTensor(
        fmt, shape, pack(row_parts["codes"].contiguous(), fmt.grid.cardinality),
        None if fmt.scale is None else stored("scale", fmt.scale),
        None if fmt.offset is None else stored("offset", fmt.offset.store),
    )  # fmt: skip


def _moves_rows(rules: Rules, weights: Mapping[str, QuantizedWeight], transposed: bool) -> bool:
    """Whether the rules give each row once and add nothing: tried on row numbers."""
    starts, total = {}, 0
    for name, weight in weights.items():
        starts[name] = total
        total += math.prod(weight.shape[:-1])

    def numbers(name: str) -> Tensor:
        rows = weights[name].shape[:-1]
        ids = torch.arange(starts[name], starts[name] + math.prod(rows), dtype=torch.int32).view(*rows, 1)
        return ids.transpose(-1, -2) if weights[name].transposed else ids

    try:
        made = rules(numbers)
    except Exception:  # rules of other programs, met with a row_part one column wide
        return False
    made = made.transpose(-1, -2) if transposed else made
    return made.shape[-1] == 1 and torch.equal(made.reshape(-1).sort().values.long(), torch.arange(total))


def _joined(
    rules: Rules, weights: Mapping[str, QuantizedWeight], fmt: Format | None, read: ReadPart, transposed: bool
) -> QTensor:
    """Run the rules on every row_part. Each part is read once for all of its row_parts."""
    kept: dict[str, dict[str, Tensor]] = {}

    def row_part(name: str, which: str) -> Tensor:
        if name not in kept:
            quantized = weights[name].quantized
            assert quantized is not None
            kept[name] = row_parts_of(quantized(read))
        found = kept[name][which]
        return found.transpose(-1, -2).contiguous() if weights[name].transposed else found

    made: dict[str, Tensor] = {}
    names = ["codes"]
    while names:
        which = names.pop()
        value = rules(lambda name, which=which: row_part(name, which))  # type: ignore[misc]
        made[which] = value.transpose(-1, -2) if transposed else value
        if which == "codes":
            names = [name for name in next(iter(kept.values())) if name != "codes"]
    assert fmt is not None
    return from_row_parts(fmt, made)
