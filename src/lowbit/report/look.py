"""What the commands that look are in Python: inspect, doctor, and the catalogue of names that recipes are made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from lowbit.display import Displayed
from lowbit.errors import SourceError
from lowbit.interchange.files.settings import is_ours
from lowbit.interchange.opening import open_source
from lowbit.interchange.progress import Progress, heard
from lowbit.pipeline.api import Quantized
from lowbit.report.catalogue import Entry, matching
from lowbit.report.catalogue import catalogue as entries
from lowbit.report.doctor import Report, examine
from lowbit.report.inspect import Inspection, inspect_quantized, inspect_source


def inspect(model: str | Path | nn.Module | Quantized, *, progress: Progress | bool | None = None) -> Inspection:
    """What is in a model: shapes, ranges, outliers and bytes of a float one; formats and bits of a quantized one.

    model: any name that `quantize` takes, a module, a folder that lowbit wrote, or what `quantize` returned. One tensor is in memory at
    a time. progress: called with (tensor, bytes done, bytes in all); a folder of lowbit is read by its headers alone, without one.
    SourceError for what is no model.

    >>> found = lowbit.inspect(model)
    >>> found.tensors[0].shape
    (128, 32)
    """
    if isinstance(model, Quantized):
        if model.folder is None:
            raise SourceError("this result has no folder; save it first, and give the folder")
        model = model.folder
    if not isinstance(model, nn.Module) and is_ours(model):
        return inspect_quantized(Path(model))
    return inspect_source(open_source(model), heard(progress))


def doctor(kernels: bool = True) -> Report:
    """What this machine offers: versions, vector units, whether the engine runs, kernels and how fast they are, memory, disk.

    kernels: time them too, which takes some seconds. Sizes are bytes, times microseconds.

    >>> lowbit.doctor(kernels=False).cores > 0
    True
    """
    return examine(kernels)


class Catalogue(Displayed, list[Entry]):
    """Names that recipes are made of, with what is to be said of each. asked: what was looked up, None for all; others: names that only
    contain it."""

    def __init__(self, found: Sequence[Entry], asked: str | None = None, others: Sequence[str] = ()) -> None:
        super().__init__(found)
        self.asked, self.others = asked, tuple(others)

    def _brief(self) -> str:
        return f"{len(self)} names" if self.asked is None else ", ".join(entry.name for entry in self)


def catalogue(what: str | None = None) -> Catalogue:
    """The presets, methods and formats that recipes are made of; with a name, everything about it.

    what: a name, a kind ("solver", "preset") or a part of names. RecipeError where there is none, with the nearest.

    >>> [entry.kind for entry in lowbit.catalogue("gptq")]
    ['preset', 'solver']
    """
    if what is None:
        return Catalogue(entries())
    found, others = matching(entries(), what)
    return Catalogue(found, what, others)
