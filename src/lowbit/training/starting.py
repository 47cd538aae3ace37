"""Where training starts: the codes, scales and ranges of a model that was quantized before."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import RecipeError, SourceError
from lowbit.formats import Inputs, QTensor
from lowbit.formats.qtensor import nearest_codes
from lowbit.interchange.files.settings import check_ours
from lowbit.interchange.hf.packed_model import load_packed
from lowbit.interchange.hf.ties import packed_by_every_name
from lowbit.nn.packed import PackedWeight
from lowbit.nn.swap import owner_of
from lowbit.pipeline.api import Quantized
from lowbit.pipeline.loading import dequantize
from lowbit.recipes.recipe import Recipe


@dataclass(frozen=True)
class Weight:
    """A quantized weight of the start, with what is stored of its inputs."""

    q: QTensor
    inputs: Inputs | None
    input_parts: dict[str, Tensor]
    transposed: bool


class Start:
    """A packed model: its recipe, its weights under each of their names, and what it keeps in float."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.model, self.recipe = model, recipe
        self.weights = {name: _weight(packed) for name, packed in packed_by_every_name(model).items()}
        if not self.weights:
            raise RecipeError(f"{type(model).__name__} has no quantized weight to start from; leave start out")

    @staticmethod
    def of(value: Any) -> Start:
        """From a folder that lowbit wrote, what `lowbit.quantize` returned, or a packed model."""
        if isinstance(value, Quantized):
            if value.folder is None:
                return Start(value.model, value.plan.recipe)
            value = value.folder
        if isinstance(value, nn.Module):
            return Start(value, _recipe_of(value))
        check_ours(value)
        model = load_packed(Path(value), dtype=torch.float32)
        return Start(model, _recipe_of(model))

    def dense(self) -> nn.Module:
        """The model with float weights, the values of its codes; a new one, all of it trainable."""
        made = dequantize(copy.deepcopy(self.model), torch.float32)
        made.__dict__.pop("generate", None)  # by the engine, of a loaded model
        for parameter in made.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        return made

    @torch.no_grad()
    def put_into(self, model: nn.Module) -> None:
        """Let the float `model` round to these codes. Each weight that rounds to its code stays; others become its value.

        What the start keeps in float is copied. SourceError where the two do not fit.
        """
        kept = dict(model.named_parameters(remove_duplicate=False))
        for name, weight in self.weights.items():
            owner, leaf = owner_of(model, name)
            parameter = owner._parameters.get(leaf)
            q = weight.q
            wanted = (*q.shape[:-2], q.shape[-1], q.shape[-2]) if weight.transposed else q.shape
            if parameter is None or tuple(parameter.shape) != tuple(wanted):
                raise SourceError(
                    f"the start has {name!r} of shape {tuple(wanted)}, and {type(model).__name__} has no such weight"
                )
            rows = parameter.transpose(-1, -2) if weight.transposed else parameter
            q = q.to(rows.device)
            same = nearest_codes(rows.to(torch.float32), q) == q.unpacked()
            rows.copy_(torch.where(same, rows, q.dequantize(rows.dtype)))
            kept.pop(name, None)
        for name, parameter in self.model.named_parameters():
            if name in kept and kept[name].shape == parameter.shape:
                kept[name].copy_(parameter)


def is_packed(value: Any) -> bool:
    """Whether a model is quantized by lowbit already."""
    if isinstance(value, Quantized):
        return True
    if isinstance(value, nn.Module):
        return any(isinstance(module, PackedWeight) for module in value.modules())
    try:
        check_ours(value)
    except SourceError:
        return False
    return True


def _weight(packed: PackedWeight) -> Weight:
    parts = {} if packed.inputs is None else {name: packed.get_buffer(name) for name in packed._input_parts}
    return Weight(packed.qtensor(), packed.inputs, parts, packed.transposed)


def _recipe_of(model: Any) -> Recipe:
    said = getattr(getattr(getattr(model, "config", None), "quantization_config", None), "recipe", None)
    if not said:
        raise RecipeError(
            f"{type(model).__name__} does not say by which recipe it was quantized; give what lowbit.quantize returned"
        )
    return Recipe.parse(str(said))
