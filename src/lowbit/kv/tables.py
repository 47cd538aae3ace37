"""Tables: what calibration found for one side of one layer, and how tables are stored in a file.

The file has a tensor for each field: `layers.{number}.{k|v}.{levels|scale|offset|channels}`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Union

import torch
from torch import Tensor

from lowbit.errors import RecipeError, SourceError
from lowbit.kv.side import CacheSide

if TYPE_CHECKING:
    from lowbit.kv.cache_format import CacheFormat

# The learned levels of a cache are whole numbers within +-AXIS, so that kernels hold them as int8.
AXIS = 127
# One number for keys and values of all layers, or (of keys, of values).
Sizes = Union[int, tuple[int, int]]
TablesOfLayers = dict[tuple[int, str], "Tables"]
_NAME = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.([kv])\.(levels|scale|offset|channels)")


@dataclass(frozen=True, eq=False)
class Tables:
    """What calibration found for one side of one layer. A number is read back as `scale * level + offset`.

    levels: float32 [cardinality], learned levels, ascending whole numbers within +-127, for all heads. scale, offset: float32
    [heads, width], of formats whose scales serve all tokens (`*x1`); offset is the real value of level zero, whichever way the
    format writes offsets. channels: int64 [heads, outliers], ascending, those that are stored as float16.
    """

    levels: Tensor | None = None
    scale: Tensor | None = None
    offset: Tensor | None = None
    channels: Tensor | None = None

    def to(self, device: torch.device | str) -> Tables:
        """The same tables on another device."""
        return Tables(**{name: value.to(device) for name, value in self.parts().items()})

    def parts(self) -> dict[str, Tensor]:
        """The fields that are there, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if value is not None}


def shapes(side: CacheSide, heads: int, width: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of each field that calibration finds for this side."""
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    if side.format is None:
        return found
    if side.format.codebook is not None:
        found["levels"] = (torch.float32, (side.format.grid.cardinality,))
    if side.static:
        found["scale"] = (torch.float32, (heads, width))
        if side.format.codebook is not None or side.format.offset is not None:
            found["offset"] = (torch.float32, (heads, width))
    if side.outliers:
        found["channels"] = (torch.int64, (heads, min(side.outliers, width)))
    return found


def check_tables(tables: Tables, side: CacheSide, heads: int, width: int, where: str = "the tables") -> None:
    """SourceError unless these are the tables of a side of so many heads and channels.

    Channels may be left out where nothing else is calibrated: they are then chosen while the model runs.
    """
    expected, found = shapes(side, heads, width), tables.parts()
    missing = [name for name in expected if name not in found and (name != "channels" or side.calibrated)]
    if missing or found.keys() - expected.keys():
        has, wants = ", ".join(sorted(found)) or "nothing", ", ".join(sorted(expected)) or "nothing"
        raise SourceError(f"{where} of the KV cache: {side} needs {wants}, and there is {has}; calibrate again")
    for name, value in found.items():
        dtype, shape = expected[name]
        if value.dtype != dtype or tuple(value.shape) != shape:
            raise SourceError(
                f"{where} of the KV cache: {name} is {value.dtype} {tuple(value.shape)}, not {dtype} {shape} as {side} needs"
            )
        reason = _wrong(name, value, width)
        if reason:
            raise SourceError(f"{where} of the KV cache: {name} {reason}; the file is damaged, so calibrate again")


def tables_to_tensors(tables: Mapping[tuple[int, str], Tables]) -> dict[str, Tensor]:
    """Tensors by name, as `kv_cache.safetensors` of a folder has them, in the order of layers."""
    return {
        f"layers.{layer}.{which}.{name}": value.contiguous()
        for (layer, which), found in sorted(tables.items(), key=lambda item: item[0])
        for name, value in found.parts().items()
    }


def tables_from_tensors(
    tensors: Mapping[str, Tensor], cache: CacheFormat, layers: int | Iterable[int], heads: Sizes, width: Sizes
) -> TablesOfLayers:
    """The tables that these tensors are, every name, type, shape and number checked.

    layers: how many there are, or the numbers of those that have keys and values of their own. heads, width: heads that are
    stored, and channels of each; a pair where values differ from keys. SourceError for names that are no table, and for
    what is missing, does not fit or cannot be.
    """
    numbers = set(range(layers) if isinstance(layers, int) else layers)
    found: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, value in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or int(match[1]) not in numbers:
            raise SourceError(f"{name!r} is no table of the KV cache of this model, which has {len(numbers)} layers")
        found.setdefault((int(match[1]), match[2]), {})[match[3]] = value
    tables = {}
    for layer in sorted(numbers):
        for i, which in enumerate("kv"):
            side = cache.side(layer, which)  # type: ignore[arg-type]
            given = Tables(**found.get((layer, which), {}))
            sizes = [size if isinstance(size, int) else size[i] for size in (heads, width)]
            check_tables(given, side, sizes[0], sizes[1], f"layers.{layer}.{which}")
            if given.parts():
                tables[layer, which] = given
    return tables


def tables_for(
    tables: Mapping[tuple[int, str], Tables] | None, side: CacheSide, layer: int, which: str
) -> Tables | None:
    """The tables of this side, None where it needs none. RecipeError where it needs some that are not there."""
    found = (tables or {}).get((layer, which))
    if found is None and side.calibrated:
        raise RecipeError(
            f"{side} has numbers that are found on calibration text, and there are none for layer {layer} ({which}); "
            "use lowbit.kv.calibrate, or a folder that was quantized with this cache"
        )
    return found


def _wrong(name: str, value: Tensor, width: int) -> str:
    """Why these cannot be the numbers of a field; empty where they can."""
    if name == "channels":
        if not bool(((value >= 0) & (value < width)).all()):
            return f"names channels beyond the {width} that there are"
        return "" if bool((value.diff(dim=-1) > 0).all()) else "are not in ascending order"
    if not bool(value.isfinite().all()):
        return "has numbers that are not finite"
    if name == "levels":
        if not bool(((value.abs() <= AXIS) & (value == value.round())).all()):
            return f"are not whole numbers within {AXIS}"
        if not bool((value.diff() >= 0).all()) or not float(value[0]) < 0 < float(value[-1]):
            return "do not ascend from below zero to above it"
    return ""
