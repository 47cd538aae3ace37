"""What an export writes otherwise than lowbit's folder has it: the folder as it is written, and what each conversion cost.

An exporter names the tensors that its program cannot hold as they are, and what they become (`Exporter.becomes`). They are
converted when they are read, one at a time, and measured against lowbit's own when the result is read back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import ExportError
from lowbit.formats import Format, QTensor
from lowbit.interchange.exporters.common.relayout import loses, relaid
from lowbit.interchange.exporters.exporter import Becomes, Exporter, as_written
from lowbit.interchange.readers.lowbit_folder import LowbitFolder
from lowbit.interchange.tensors import TensorPlan

# Values rounded to 16 bits: by at most half a unit in the last place, 2^-9 in bfloat16 and 2^-12 in float16.
_OF_FLOATS = 2.0**-8


@dataclass(frozen=True)
class Conversion:
    """A tensor that is not written as lowbit's folder has it.

    stored, written  its type in the folder and in the export, as text
    before, after    its bytes there and here
    same_codes       only the layout and type of scales and offsets changed
    error            |a - b| / |b| of its values, measured when the export was read back
    """

    tensor: str
    stored: str
    written: str
    before: int
    after: int
    same_codes: bool
    error: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return dict(vars(self))


class ConvertedFolder(LowbitFolder):
    """`folder` with tensors read as what they become."""

    def __init__(self, folder: LowbitFolder, becomes: Mapping[str, Becomes]) -> None:
        self.__dict__.update(folder.__dict__)
        self._original, self.becomes = folder, dict(becomes)
        tensors = {name: as_written(t, becomes.get(name)) for name, t in folder.contents.tensors.items()}
        self.contents = replace(folder.contents, tensors=tensors)

    def read(self, name: str) -> Tensor | QTensor:
        """As the tensor is written. ExportError for a value that does not fit."""
        tensor, kind = self._original.read(name), self.becomes.get(name)
        if kind is None or not isinstance(tensor, QTensor):
            return tensor
        if isinstance(kind, Format):
            return relaid(tensor, kind, name)
        return _rounded(self._original.values(name), kind, name)


def converted(kind: Exporter, folder: LowbitFolder) -> LowbitFolder:
    """The folder as `kind` writes it: the same one where nothing is converted."""
    becomes = kind.becomes(folder.contents)
    return ConvertedFolder(folder, becomes) if becomes else folder


def allowed(t: TensorPlan, becomes: Becomes) -> float:
    """How far the values of a tensor may be from lowbit's own once they are converted, |a - b| / |b|."""
    assert t.format is not None
    return loses(t.format, becomes) if isinstance(becomes, Format) else _OF_FLOATS


def conversions(
    kind: Exporter, folder: LowbitFolder, written: LowbitFolder, errors: Mapping[str, float]
) -> tuple[Conversion, ...]:
    """What was converted, in the order of the model; errors: of the weights that did not come back equal."""
    found = []
    for name, becomes in written.becomes.items() if isinstance(written, ConvertedFolder) else ():
        old, new = folder.contents.tensors[name], written.contents.tensors[name]
        found.append(
            Conversion(
                name, str(old.format), kind.title(becomes), old.bytes_after, kind.bytes_of(new),
                isinstance(becomes, Format), errors.get(name, 0.0),
            )
        )  # fmt: skip
    return tuple(found)


def sentences(kind: Exporter, found: Iterable[Conversion]) -> list[str]:
    """A line for each kind of conversion: what became what, and what it cost."""
    groups: dict[tuple[str, str], list[Conversion]] = {}
    for each in found:
        groups.setdefault((each.stored, each.written), []).append(each)
    lines = []
    for (stored, written), same in groups.items():
        names = [c.tensor.removesuffix(".weight") for c in same]
        who = " and ".join(names) if len(names) <= 2 else f"{len(names)} layers such as {names[0]}"
        before, after, error = sum(c.before for c in same), sum(c.after for c in same), max(c.error for c in same)
        size = f"{after:,} bytes" + (f" instead of {before:,}" if after != before else ", as many as before")
        codes = "the codes are the same, " if same[0].same_codes else ""
        cost = f"relative error {error:.1e}" if error else "the values are equal"
        lines.append(f"{who}: {written} for {kind.reader}, {size}; lowbit's folder has {stored}: {codes}{cost}")
    return lines


def _rounded(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    rounded = values.to(dtype)
    if not bool(rounded.isfinite().all()):
        peak = float(values.abs().max())
        raise ExportError(f"{name} has values up to {peak:.3g}, too large for {dtype}; quantize the bfloat16 model")
    return rounded
