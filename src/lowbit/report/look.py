"""What the commands that look are in Python: inspect, explain, doctor, and the catalogue of names that recipes are made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.display import Displayed
from lowbit.errors import SourceError, WeightError, nearest
from lowbit.formats import Format
from lowbit.interchange.files.settings import is_ours
from lowbit.interchange.opening import open_source
from lowbit.interchange.progress import Progress, heard
from lowbit.pipeline.api import Quantized
from lowbit.recipes.recipe import Recipe
from lowbit.report import explain as arithmetic
from lowbit.report.catalogue import Entry, matching
from lowbit.report.catalogue import catalogue as entries
from lowbit.report.doctor import Report, examine
from lowbit.report.inspect import Inspection, inspect_quantized, inspect_source

_TENSOR_ELEMENTS = 16  # of a block of a model's tensor; the block may be a million wide


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


def explain(
    what: str | Tensor | Sequence[Any], recipe: str | Format | Recipe = "w4", *, rows: int = 1
) -> arithmetic.Explanation:
    """Each step of the arithmetic on a few numbers: range, scale, zero-point, codes, values, error.

    what: an array, as numbers in lists, as text ("[-0.3, 0, 0.1, 0.7]") or as a tensor of one to three dimensions, which is computed in
    float32; or "MODEL:TENSOR", of which the first blocks of the first `rows` rows are shown. WeightError for what is no array of
    finite numbers, SourceError for a tensor that the model does not have.

    >>> found = lowbit.explain([-0.3, 0, 0.1, 0.7], "absmax")
    >>> found.blocks[0].codes
    (74, 128, 146, 255)
    """
    wanted = Recipe.of(recipe)
    if isinstance(what, str) and not what.lstrip().startswith(("[", "(")):
        return _of_model(what, wanted, rows)
    array = what if isinstance(what, Tensor) else arithmetic.parse_array(what if isinstance(what, str) else str(what))
    if array.dim() == 0 or array.dim() > 3 or array.numel() == 0:
        raise WeightError(
            f"an array of shape {tuple(array.shape)} has nothing to explain; give one to three dimensions"
        )
    return arithmetic.explain(array.detach().to("cpu", torch.float32), wanted)


def _of_model(what: str, wanted: Recipe, rows: int) -> arithmetic.Explanation:
    model, colon, tensor = what.rpartition(":")
    if not colon or not model:
        raise SourceError(
            f'{what!r} is neither an array nor MODEL:TENSOR; write "[-0.3, 0, 0.1, 0.7]" or '
            "smollm2:model.layers.0.self_attn.q_proj"
        )
    source = open_source(model)
    name = next((n for n in (tensor, f"{tensor}.weight") if n in source.tensors), None)
    if name is None:
        hint = nearest(tensor, source.tensors) or f"; names look like {next(iter(source.tensors))!r}"
        raise SourceError(f"{model} has no tensor {tensor!r}{hint} (`lowbit inspect {model}` lists them)")
    param = source.inventory.params[name]
    weight = source.read(name)
    if not weight.is_floating_point():
        raise SourceError(f"{name} of {model} is {weight.dtype}, not a float tensor")
    fmt = wanted.format_for(name, param.kind) or wanted.format
    weight = weight.transpose(-1, -2) if param.transposed else weight
    return arithmetic.explain(weight, wanted, fmt, label=name, rows=rows, elements=_TENSOR_ELEMENTS)


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
