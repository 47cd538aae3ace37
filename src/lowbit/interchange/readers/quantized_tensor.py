"""A tensor of the model as a quantized checkpoint stores it: its integers, through the rules that rename, stack and reorder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from lowbit.formats import Format, Inputs, QTensor
from lowbit.interchange.readers.quantized import QuantizedWeight, ReadPart
from lowbit.interchange.rows import each_once, gather, numbered, row_parts_of, why_whole

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
    fmt = first.format
    if any(w.format != fmt for w in stored):
        return QuantizedTensor(
            None, f"its parts have different formats, {' and '.join(sorted({str(w.format) for w in stored}))}"
        )
    if fmt is None or why_whole(fmt, first.shape, joined=True) is not None:
        return QuantizedTensor(None, f"it is made of {len(stored)} tensors, and a block of {fmt} spans rows of each")
    by_name = dict(zip(parts, stored))
    if _numbers(rules, by_name, transposed) is None:
        return QuantizedTensor(None, "the model keeps it in another arrangement than the checkpoint")
    note = (
        first.note
        if first.inputs is None
        else "; ".join(filter(None, (first.note, f"its inputs ({first.inputs}) stay float")))
    )
    return QuantizedTensor(fmt, "", note, None, lambda: _joined(rules, by_name, fmt, read, transposed))


def _starts(weights: Mapping[str, QuantizedWeight]) -> dict[str, int]:
    """The number of the first row of each weight, rows counted over all of them."""
    ends = accumulate((math.prod(weight.shape[:-1]) for weight in weights.values()), initial=0)
    return dict(zip(weights, ends))


def _numbers(rules: Rules, weights: Mapping[str, QuantizedWeight], transposed: bool) -> Tensor | None:
    """int64 [..., out]: which rows of the weights those of the model's tensor are; None where the rules do more than move rows."""
    starts = _starts(weights)

    def numbers(name: str) -> Tensor:
        found = numbered(weights[name].shape, starts[name])
        return found.transpose(-1, -2) if weights[name].transposed else found

    try:
        made = rules(numbers)
    except Exception:  # rules of other programs, met with a tensor one column wide
        return None
    made = made.transpose(-1, -2) if transposed else made
    count = sum(math.prod(weight.shape[:-1]) for weight in weights.values())
    return made[..., 0].long() if made.shape[-1] == 1 and each_once(made, count) else None


def _joined(
    rules: Rules, weights: Mapping[str, QuantizedWeight], fmt: Format, read: ReadPart, transposed: bool
) -> QTensor:
    """The model's tensor, each of the weights read once."""
    numbers = _numbers(rules, weights, transposed)
    assert numbers is not None
    return gather(
        fmt,
        numbers,
        ((first, row_parts_of(weights[name].quantized(read))) for name, first in _starts(weights).items()),  # type: ignore[misc]
    )
