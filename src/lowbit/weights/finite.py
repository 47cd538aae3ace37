"""Numbers that are none: every tensor that is read is looked at, and one that has some is refused by its name."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import WeightError
from lowbit.interchange.source import Source
from lowbit.recipes.recipe import Recipe


def nonfinite(x: Tensor) -> str:
    """How many NaN and infinite values a tensor has and where the first is, in words; empty where there is none."""
    if not x.is_floating_point() or not x.numel():
        return ""
    if x.element_size() == 1:  # no sums of float8
        x = x.float()
    if bool(torch.isfinite(x.sum(dtype=torch.float32))):
        return ""
    odd = ~torch.isfinite(x)
    if not bool(odd.any()):
        return ""
    nans, infs = int(x.isnan().sum()), int(x.isinf().sum())
    first = odd.reshape(-1).to(torch.uint8).argmax()  # the first of the largest
    place = ", ".join(str(int(i)) for i in torch.unravel_index(first, x.shape))
    return f"{nans:,} NaN and {infs:,} infinite values, the first at [{place}]"


def check_finite(x: Tensor, name: str, doing: str = "quantized") -> None:
    """WeightError naming the tensor when it has a NaN or an infinity. `doing`: what cannot be done with it then."""
    found = nonfinite(x)
    if found:
        way = f", or keep them with a recipe ending in ,{name}=keep" if doing == "quantized" else ""
        raise WeightError(
            f"tensor {name!r} has {found} and cannot be {doing}; the checkpoint is damaged: download or save it again{way}"
        )


def check_kept(x: Tensor, name: str, recipe: Recipe, buffer: bool = False) -> str:
    """What is to be said of a tensor that stays as it is. WeightError for a NaN or an infinity, unless the recipe keeps
    the tensor by its name. `buffer`: it is no parameter and may hold infinities, as masks do."""
    if recipe.keeps_by_name(name):
        found = nonfinite(x)
        return f"has {found}, kept as the recipe says" if found else ""
    check_finite(x.nan_to_num(nan=torch.nan, posinf=0.0, neginf=0.0) if buffer else x, name)
    return ""


def check_source(source: Source, recipe: Recipe) -> None:
    """Read every tensor once and look at it, before a model is run for a long time. WeightError as in `check_kept`."""
    for name, spec in source.tensors.items():
        if spec.dtype.is_floating_point:
            check_kept(source.read(name), name, recipe, source.inventory.params[name].keep == "buffer")
