"""A model and an adapter as one model: quantized again as it was, quantized anew, or float."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowbit.adapters.source import with_adapter
from lowbit.calibration.data import SELF
from lowbit.calibration.package_text import BUILTIN, NAME
from lowbit.convert.dequantizing import Dequantized, dequantize_model
from lowbit.errors import RecipeError, SourceError
from lowbit.formats import Format
from lowbit.interchange.files.finished import MANIFEST
from lowbit.interchange.files.settings import is_ours, read_json
from lowbit.interchange.progress import Progress
from lowbit.interchange.source import Source
from lowbit.pipeline.api import Quantized, quantize
from lowbit.pipeline.effort import AUTO
from lowbit.pipeline.options import OnLayer
from lowbit.planning.plan import MAX_SHARD
from lowbit.recipes.recipe import Recipe


@dataclass(frozen=True)
class AsBefore:
    """How a folder of lowbit was made: its recipe, and the calibration text by its name, None where there was none.

    text: "builtin" or "self", which can be had again, or None for a text that only the user has. windows, length: of the text.
    """

    recipe: Recipe
    name: str | None = None
    text: str | None = None
    windows: int = 0
    length: int = 0

    def options(self, calibration: Any, samples: int | None, length: int | None) -> dict[str, Any]:
        """What `quantize` is to be told of the text; what is given comes first. RecipeError where a text is needed that is not at hand."""
        if self.name is None and calibration is None:
            return {"samples": samples, "length": length}
        if calibration is None and self.text is None:
            raise RecipeError(
                f"the base was calibrated on {self.name}, which is not in its folder; give the text with calibration (--calibration FILE), or the "
                "word builtin for the text that comes with lowbit"
            )
        return {
            "calibration": calibration or self.text, "samples": samples or self.windows or None,
            "length": length or self.length or None,
        }  # fmt: skip


def as_before(folder: str | Path) -> AsBefore:
    """How the folder of lowbit says that it was made, in lowbit.json. SourceError where it does not say it."""
    path = Path(folder)
    manifest = read_json(path / MANIFEST)
    told = manifest.get("recipe")
    text = told.get("text") if isinstance(told, dict) else None
    if not isinstance(text, str) or not text:
        raise SourceError(f"{path / MANIFEST} names no recipe; name one after the adapter, such as w4")
    recipe, calibration = Recipe.parse(text), manifest.get("calibration")
    if not isinstance(calibration, dict):
        return AsBefore(recipe)
    windows, tokens = (
        found if type(found := calibration.get(key)) is int and found > 0 else 0 for key in ("windows", "tokens")
    )
    name = str(calibration.get("name") or "a text without a name")
    known = BUILTIN if name == NAME else SELF if "that the model wrote itself" in name else None
    return AsBefore(recipe, name, known, windows, tokens // windows if windows and tokens % windows == 0 else 0)


def merge(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    recipe: str | Format | Recipe | None = None,
    *,
    calibration: Any = None,
    samples: int | None = None,
    length: int | None = None,
    chat: bool = False,
    effort: str = AUTO,
    dtype: torch.dtype | str | None = None,
    tokenizer: Any = None,
    progress: Progress | bool | None = None,
    on_layer: OnLayer | None = None,
    max_shard_bytes: int = MAX_SHARD,
    overwrite: bool = False,
) -> Quantized | Dequantized:
    """Write `base` with a LoRA adapter of PEFT in its weights as the folder `out`, tensor by tensor; peft is not needed.

    A folder that lowbit wrote is dequantized, and quantized again by the recipe and on the calibration text that its lowbit.json names, or by another
    `recipe`. A float base becomes a float folder, or with a `recipe` a quantized one. `dtype` asks for a float folder of that type in every case. calibration,
    samples, length, chat, effort, progress and on_layer are those of `quantize`.

    An adapter that was trained on a float model loses least where it is merged into that model, and an adapter that was trained on a quantized one belongs to its weights. RecipeError
    for a base of another program without a `recipe`, SourceError for an adapter that does not fit.

    >>> lowbit.merge(quantized, adapter, folder / "merged").plan.linear_bits_per_weight  # as `quantized` was
    4.5
    """
    both = with_adapter(base, adapter, tokenizer=tokenizer)
    text = {
        "calibration": calibration,
        "samples": samples,
        "length": length,
        "chat": chat or None,
        "effort": None if effort == AUTO else effort,
    }
    given = [name for name, value in text.items() if value is not None]
    if dtype is not None and recipe is not None:
        raise RecipeError(
            "a recipe and dtype exclude each other: one asks for a quantized model, the other for a float one; leave one out"
        )
    if dtype is not None or (recipe is None and both.storage == "float"):
        if given:
            raise RecipeError(
                f"{' and '.join(given)} would be ignored, as a float model is written; name a recipe, such as w4, or leave them out"
            )
        return dequantize_model(
            both, out, dtype=dtype, progress=progress, overwrite=overwrite, max_shard_bytes=max_shard_bytes
        )
    wanted, how = _asked(base, both, recipe, calibration, samples, length)
    return quantize(
        both, wanted, out, progress=progress, max_shard_bytes=max_shard_bytes, overwrite=overwrite, chat=chat, effort=effort, on_layer=on_layer, **how,
    )  # fmt: skip


def _asked(
    base: str | Path, both: Source, recipe: str | Format | Recipe | None, calibration: Any, samples: int | None, length: int | None
) -> tuple[Recipe, dict[str, Any]]:  # fmt: skip
    """The recipe, and the text for it as `quantize` takes it. RecipeError where the base says no recipe."""
    if recipe is not None:
        return Recipe.of(recipe), {"calibration": calibration, "samples": samples, "length": length}
    if not is_ours(base):
        raise RecipeError(
            f"{base} is not a folder of lowbit ({both.storage}), so it names no recipe to quantize the merged model by; name one after the adapter, such as w4, or "
            "ask for float weights with dtype (--dtype bfloat16)"
        )
    before = as_before(base)
    return before.recipe, before.options(calibration, samples, length)
