"""The cache formats that the engine computes: each as the numbers that its kernels take, or refused with the nearest that it does.

What a cache format says of its own is checked before anything large is read (`checked`), what depends on the model's heads as soon as
these are known (`layers_of`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

from lowbit.errors import RecipeError
from lowbit.formats import Format
from lowbit.formats.grids import IntGrid, TableGrid
from lowbit.kv import CacheFormat, CacheSide
from lowbit.solvers.fits.norm import normal_scale

GROUPS = (32, 64)
"""Tokens that may share the scales of channels."""

_WHOLE = 127  # levels are whole numbers up to this


def checked(cache: str | CacheFormat) -> CacheFormat:
    """The cache format of this text. RecipeError, with what comes next to it, for one that the engine does not compute."""
    found = CacheFormat.of(cache)
    for layer in _layers_named(found):
        keys, values = found.side(layer, "k"), found.side(layer, "v")
        for side in (keys, values):
            reason = _declined(side)
            if reason:
                raise RecipeError(f"cache={str(cache)!r}: {reason}")
        if not keys.exact and not values.exact and _border(keys) != _border(values):
            recent = max(
                keys.recent, values.recent, keys.group if keys.group > 1 else 0, values.group if values.group > 1 else 0
            )
            sinks = max(keys.sinks, values.sinks)
            both = [replace(side, recent=recent, sinks=sinks) for side in (keys, values)]
            raise RecipeError(
                f"cache={str(cache)!r}: the engine keeps the same tokens of keys and of values exactly; write k={both[0]},v={both[1]}"
            )
    return found


def layers_of(core: Any, cache: CacheFormat, layers: int, width: int) -> list[Any]:
    """A `KVLayer` of the C++ part for each layer of a model with heads of `width` channels.

    RecipeError for a group that does not divide a head, and a rotation of a head that is no power of two.
    """
    found = []
    for layer in range(layers):
        keys, values = cache.side(layer, "k"), cache.side(layer, "v")
        for side in (keys, values):
            reason = _declined_by_width(side, width)
            if reason:
                raise RecipeError(f"cache={str(cache)!r}: {reason}")
        found.append(
            core.KVLayer(
                keys=_side(core, keys, width), values=_side(core, values, width),
                sinks=max(keys.sinks, values.sinks), recent=max(keys.recent, values.recent),
            )
        )  # fmt: skip
    return found


def _layers_named(cache: CacheFormat) -> list[int]:
    """Numbers of layers that between them have every pair of sides that a model may come to."""
    return list(range(512)) if cache.layers else [0]


def _border(side: CacheSide) -> tuple[int, int, int]:
    """What decides which tokens a query reads exactly."""
    group = side.group if side.group > max(1, side.recent) else 0
    return side.sinks, side.recent, group


def _declined(side: CacheSide) -> str | None:
    fmt = side.format
    if fmt is None:
        return None
    if side.calibrated:
        return f"{side} has scales or levels that are found on calibration text, which the engine does not read; use {_plain(side)}, or transformers"
    if side.outliers:
        return f"the engine keeps no channels apart; leave outliers={side.outliers} out, or use transformers"
    reason = _levels_declined(fmt) or _scales_declined(fmt)
    if reason:
        return reason
    if side.fit_used.name not in _REACH or side.fit_used.options:
        return f"the engine has no fit {str(side.fit_used)!r} for new tokens; use {replace(side, fit=None)}"
    return None


def _levels_declined(fmt: Format) -> str | None:
    table = isinstance(fmt.grid, TableGrid) and len(fmt.grid.table) <= 16 and _unit(fmt.grid) is not None
    if not table and not isinstance(fmt.grid, IntGrid):
        return _nearest(fmt, f"the levels of {fmt.grid} are not whole numbers of a byte")
    return _nearest(fmt, "ternary codes are not packed here") if fmt.grid.cardinality == 3 else None


def _scales_declined(fmt: Format) -> str | None:
    if fmt.scale != "fp16":
        return f"scales of a cache are float16 in the engine, not {fmt.scale}; use {replace(fmt, scale='fp16')}"
    if fmt.offset is not None and (fmt.offset.kind == "zero" or fmt.offset.store != "fp16"):
        return f"offsets of a cache are float16 in the engine; use {fmt.grid}{_block(fmt)}:min=fp16"
    rows, cols = fmt.block.rows, fmt.block.cols
    if rows > 1 and rows not in GROUPS:
        nearest = min(GROUPS, key=lambda size: abs(size - rows))
        return f"{' or '.join(map(str, GROUPS))} tokens share the scales of channels in the engine, not {rows}; use {nearest}x1"
    if rows == 1 and cols != -1 and (cols < 16 or cols % 16):
        return f"groups of a cache are of 16, 32, 64 or more channels in the engine, not {cols}; use g32"
    return None


def _declined_by_width(side: CacheSide, width: int) -> str | None:
    if side.rotate and width & (width - 1):
        return f"the engine rotates heads of 16, 32, 64, 128 or 256 channels, and this model's have {width}; leave rotate out"
    cols = -1 if side.format is None or side.group > 1 else side.format.block.cols
    if cols != -1 and cols < width and width % cols:
        sizes = [size for size in (128, 64, 32, 16) if width % size == 0]
        return f"groups of {cols} channels do not divide this model's heads of {width}; use g{sizes[0]}"
    return None


def _nearest(fmt: Format, why: str) -> str:
    return f"{why}, as the engine needs them; use int{max(2, min(8, fmt.grid.bits))}{_block(fmt)}"


def _plain(side: CacheSide) -> str:
    assert side.format is not None
    return f"int{max(2, side.format.grid.bits)}"


def _block(fmt: Format) -> str:
    return "" if fmt.block.rows == 1 and fmt.block.cols == -1 else f":{fmt.block}"


def _unit(grid: TableGrid) -> Fraction | None:
    """The largest number of which all levels are whole multiples, at most 127 of it; None where there is none."""
    if all(float(level).is_integer() and abs(level) <= _WHOLE for level in grid.table):
        return Fraction(1)
    for parts in (2, 4, 8, 12, 16, 24, 48, 96):
        scaled = [level * parts for level in grid.table]
        if all(abs(v - round(v)) < 1e-6 and abs(v) <= _WHOLE for v in scaled):
            return Fraction(1, parts)
    return None


def _side(core: Any, side: CacheSide, width: int) -> Any:
    fmt = side.format
    if fmt is None:
        return core.KVSide()
    grid, cols = fmt.grid, fmt.block.cols
    per_channel = side.group > 1
    return core.KVSide(
        **_levels(grid), group=1 if per_channel else (0 if cols == -1 or cols >= width else cols), tokens=side.group,
        offset="none" if fmt.offset is None else {"min": "min", "float": "zero"}[fmt.offset.kind],
        fit={"symmetric": "absmax"}.get(side.fit_used.name, side.fit_used.name), reach=_REACH[side.fit_used.name](grid), rotate=side.rotate,
    )  # fmt: skip


# The fits that the kernels have, and what each calls the reach of a grid (`csrc/kernels/kv_format.h`).
_REACH: dict[str, Callable[[Any], float]] = {
    "absmax": lambda grid: float(grid.reach),
    "norm": lambda grid: 1 / normal_scale(grid),
    "minmax": lambda grid: 1.0,
    "symmetric": lambda grid: float(grid.hi - grid.lo) / 2,
}


def _levels(grid: Any) -> dict[str, Any]:
    if isinstance(grid, IntGrid):
        return {"bits": grid.bits, "low": int(grid.lo), "count": grid.cardinality}
    unit = _unit(grid)
    assert unit is not None
    levels, bounds, _ = grid.by_bounds()
    whole = [round(level / unit) for level in levels]
    return {
        "bits": grid.bits,
        "low": whole[0],
        "count": len(whole),
        "levels": whole,
        "bounds": bounds[:-1],
        "unit": float(unit),
    }
