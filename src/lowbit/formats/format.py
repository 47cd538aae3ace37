"""Format: grid + block + how the scale and the offset are stored. Frozen, hashable, printable.

    w ~= 2^exponent * scale * (level[code] - offset)

A scale (or a float minimum) may itself have a format: NF4 double quantization, NVFP4 and two-level
6-bit scales are plain nestings. The values of a nested format are the flat vector of scales.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Union

import torch

from lowbit.display import Displayed
from lowbit.errors import FormatError
from lowbit.formats import stores
from lowbit.formats.blocks import Block
from lowbit.formats.grids import CodebookGrid, Grid, IntGrid
from lowbit.formats.packing import packed_shape

Store = Union[str, "Format"]
FARTHEST = 160  # the largest |exponent|: beyond it every float32 is zero or infinite


@dataclass(frozen=True)
class Offset:
    """What is subtracted from a level, per block.

    `zero`: a rounded integer zero-point; store "grid" keeps it in the bits of the grid itself (the range
    then always includes zero), "int32" keeps any integer. `float`: an unrounded zero-point in level units.
    `min`: the real value of level zero, w = scale * level + minimum; may be stored in a nested format. One that is
    nested in an unsigned grid is at most zero: its own scale is negative, as ggml's k-quants subtract a minimum.
    """

    kind: Literal["zero", "float", "min"]
    store: Store

    def __post_init__(self) -> None:
        if self.kind == "zero":
            stores.check_store(str(self.store), ("grid", "int32"), "a zero-point")
        elif isinstance(self.store, str):
            stores.check_store(self.store, stores.FLOAT_STORES, f"a {self.kind} offset")
        elif self.kind != "min":
            raise FormatError(
                "only a minimum can have a nested format; an unrounded zero-point takes fp32, fp16 or bf16"
            )


@dataclass(frozen=True, repr=False)
class Format(Displayed):
    """What a stored number means.

    `scale`: a store name, a nested Format, or None for a learned codebook that holds real values.
    `codebook`: for a learned grid, the block that shares one set of levels; `levels_store` keeps them.
    `exponent`: what is stored is that of w / 2^exponent. It takes no bytes; a weight whose scales leave the range of
    their type has one (`solvers/ranging.py`), all others 0.
    """

    grid: Grid
    block: Block
    scale: Store | None = "fp16"
    offset: Offset | None = None
    codebook: Block | None = None
    levels_store: str = "fp16"
    exponent: int = 0

    def _brief(self) -> str:
        return repr(str(self))

    def __post_init__(self) -> None:
        learned = isinstance(self.grid, CodebookGrid)
        if learned != (self.codebook is not None):
            raise FormatError(f"{self.grid} and a codebook block go together; only kmeans grids have one")
        if learned and self.scale is None and self.codebook != self.block:
            raise FormatError(f"the codebook of {self.grid} holds real values, so its block is the block of the format")
        stores.check_store(self.levels_store, stores.FLOAT_STORES, "a learned level")
        if not learned and self.levels_store != "fp16":
            raise FormatError(f"{self.grid} stores no levels, so there is nothing to keep as {self.levels_store}")
        if self.scale is None and not learned:
            raise FormatError(f"{self.grid} needs a scale; only a learned codebook holds real values")
        if isinstance(self.scale, str):
            stores.check_store(self.scale, stores.SCALE_STORES, "a scale")
        if abs(self.exponent) > FARTHEST:
            raise FormatError(f"an exponent is a whole number from {-FARTHEST} to {FARTHEST}, not {self.exponent}")
        if self.offset is not None and not isinstance(self.grid, IntGrid):
            raise FormatError(f"an offset belongs to an integer grid, not to {self.grid}")
        for nested in (self.scale, self.offset.store if self.offset else None):
            if isinstance(nested, Format) and nested.codebook is not None:
                raise FormatError("a scale cannot have a learned codebook; use an int, uint or e4m3 grid")
            if isinstance(nested, Format) and nested.exponent:
                raise FormatError("an exponent is the whole weight's; a nested scale has none")

    def __str__(self) -> str:
        from lowbit.formats.parsing import format_text

        return format_text(self)

    @property
    def scale_signed(self) -> bool:
        """Whether a negative scale can be stored."""
        if isinstance(self.scale, Format):
            return self.scale.grid.signed or self.scale.offset is not None
        return self.scale is None or stores.is_signed(self.scale)

    @property
    def spans_zero(self) -> bool:
        """Whether the range of a block always includes zero: what is stored of the offset can express no other."""
        store = self.offset.store if self.offset else None
        return store == "grid" or (isinstance(store, Format) and not store.grid.signed and store.offset is None)

    @property
    def plain(self) -> Format:
        """The same format without its exponent: what is stored, and how, is the same."""
        return replace(self, exponent=0) if self.exponent else self

    @property
    def offset_kind(self) -> str | None:
        return self.offset.kind if self.offset else None

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every stored tensor of a weight of `shape`; nested names joined by dots."""
        shape = tuple(shape)
        parts = {"codes": (torch.uint8, packed_shape(shape, self.grid.cardinality))}
        per_block = self.block.counts(shape)
        if self.scale is not None:
            parts |= _stored_parts("scale", self.scale, per_block)
        if self.offset is not None:
            if self.offset.store == "grid":
                parts["offset"] = (torch.uint8, packed_shape(per_block, self.grid.cardinality))
            else:
                parts |= _stored_parts("offset", self.offset.store, per_block)
        if self.codebook is not None:
            dtype = stores.stored_dtype(self.levels_store)
            parts["levels"] = (dtype, (*self.codebook.counts(shape), self.grid.cardinality))
        return parts

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Exact bytes of a stored weight of `shape`: codes, scales, offsets and levels."""
        return sum(dtype.itemsize * math.prod(size) for dtype, size in self.parts(shape).values())

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        """8 * bytes / elements, exact; 0 for an empty tensor."""
        count = math.prod(shape)
        return 8 * self.nbytes(shape) / count if count else 0.0


def _stored_parts(name: str, store: Store, counts: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    if isinstance(store, Format):
        return {f"{name}.{k}": v for k, v in store.parts((math.prod(counts),)).items()}
    return {name: (stores.stored_dtype(store), counts)}
