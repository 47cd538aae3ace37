"""QTensor: a quantized tensor as plain stored parts, and the arithmetic that reads them.

`dequantize()` is the truth that every kernel and every exporter is held to:

    w = scale * (level[code] - offset)        no offset, integer zero-point, float zero-point
    w = scale * level[code] + minimum         float minimum

evaluated in float32 in this order, whatever the stored types are. The format's exponent is part of what is real: of scales and
minima, and of learned levels that have no scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Union

import torch
from torch import Tensor

from lowbit.errors import FormatError
from lowbit.formats import stores
from lowbit.formats.blocks import map_blocks, reduce_blocks
from lowbit.formats.format import Format, Offset, Store
from lowbit.formats.nearest import inverse, nearest_level
from lowbit.formats.packing import pack, unpack

Stored = Union[Tensor, "QTensor"]


@dataclass(frozen=True, eq=False)
class QTensor:
    """A tensor of `shape` in `format`.

    codes: uint8, packed (see `packing`). scale, offset: stored values per block
    [batch, row blocks, column blocks], or a QTensor over the flat vector of them when nested; an integer
    zero-point kept on the grid is packed like codes. levels: learned codebooks [batch, nR, nC, cardinality].
    """

    format: Format
    shape: tuple[int, ...]
    codes: Tensor
    scale: Stored | None = None
    offset: Stored | None = None
    levels: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all stored parts."""
        return sum(part.numel() * part.element_size() for part in self.parts().values())

    @property
    def bits_per_weight(self) -> float:
        """8 * bytes / elements, exact."""
        count = math.prod(self.shape)
        return 8 * self.nbytes / count if count else 0.0

    def parts(self) -> dict[str, Tensor]:
        """Every stored tensor by name; nested names joined by dots."""
        out = {"codes": self.codes}
        for name in ("scale", "offset"):
            value = getattr(self, name)
            if isinstance(value, QTensor):
                out |= {f"{name}.{k}": v for k, v in value.parts().items()}
            elif value is not None:
                out[name] = value
        if self.levels is not None:
            out["levels"] = self.levels
        return out

    @staticmethod
    def from_parts(fmt: Format, shape: tuple[int, ...], parts: Mapping[str, Tensor]) -> QTensor:
        """The tensor whose `parts()` these are. FormatError when one is missing, extra, or of a wrong shape."""
        expected = fmt.parts(tuple(shape))
        if set(expected) != set(parts):
            raise FormatError(f"a {fmt} tensor is stored as {sorted(expected)}, not as {sorted(parts)}")
        for name, (dtype, size) in expected.items():
            if parts[name].dtype != dtype or tuple(parts[name].shape) != size:
                found = f"{parts[name].dtype} {tuple(parts[name].shape)}"
                raise FormatError(
                    f"part {name!r} of a {fmt} tensor of shape {tuple(shape)} is {found}, not {dtype} {size}"
                )
        counts = fmt.block.counts(tuple(shape))
        return QTensor(
            fmt,
            tuple(shape),
            parts["codes"],
            None if fmt.scale is None else _gather("scale", fmt.scale, counts, parts),
            None if fmt.offset is None else _gather("offset", fmt.offset.store, counts, parts),
            parts.get("levels"),
        )

    def to(self, device: torch.device | str) -> QTensor:
        """The same tensor on another device."""
        return QTensor.from_parts(self.format, self.shape, {k: v.to(device) for k, v in self.parts().items()})

    def unpacked(self) -> Tensor:
        """The codes, one uint8 each, of `shape`."""
        return unpack(self.codes, self.shape, self.format.grid.cardinality)

    def scales(self) -> Tensor | None:
        """float32 [batch, row blocks, column blocks], or None."""
        return None if self.scale is None else self._real(load(self.scale, self.format.scale, self._counts))

    def offsets(self) -> Tensor | None:
        """float32 [batch, row blocks, column blocks]: zero-points in level units, or minima; or None."""
        fmt = self.format
        if fmt.offset is None or self.offset is None:
            return None
        if fmt.offset.store == "grid":
            packed = self.offset
            return fmt.grid.decode(unpack(packed, self._counts, fmt.grid.cardinality))  # type: ignore[arg-type]
        value = load(self.offset, fmt.offset.store, self._counts)
        return self._real(value) if fmt.offset.kind == "min" else value

    def codebooks(self) -> Tensor:
        """float32 [batch, nR, nC, cardinality]: learned levels, real values where there is no scale."""
        assert self.levels is not None
        levels = self.levels.to(torch.float32)
        return self._real(levels) if self.format.scale is None else levels

    def _real(self, stored: Tensor) -> Tensor:
        """Values that were stored of w / 2^exponent."""
        return stores.times_power(stored, self.format.exponent) if self.format.exponent else stored

    @property
    def _counts(self) -> tuple[int, int, int]:
        return self.format.block.counts(self.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values that the parts stand for, computed in float32."""
        fmt, codes = self.format, self.unpacked()
        if fmt.codebook is not None:
            x = map_blocks(_look_up, fmt.codebook, codes, self.codebooks(), dtype=torch.float32)
            if fmt.scale is None:
                return x.to(dtype)
            return map_blocks(lambda v, s: v * s[:, None], fmt.block, x, self.scales(), dtype=dtype)

        def value(block: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
            level = fmt.grid.decode(block)
            if offset is None:
                return level.mul_(scale[:, None])
            if fmt.offset_kind == "min":
                return level.mul_(scale[:, None]).add_(offset[:, None])
            return level.sub_(offset[:, None]).mul_(scale[:, None])

        return map_blocks(value, fmt.block, codes, self.scales(), self.offsets(), dtype=dtype)

    def index(self, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """`dequantize()[rows]` for int64 indices into the first dimension, expanding only what is asked for."""
        picked = self.select(rows.reshape(-1))
        flat = self.dequantize(dtype)[rows.reshape(-1)] if picked is None else picked.dequantize(dtype)
        return flat.view((*rows.shape, *self.shape[1:]))

    def select(self, rows: Tensor) -> QTensor | None:
        """These rows (2-D) or matrices (3-D) as a QTensor, or None when a block or a byte spans several."""
        fmt = self.format
        two_d = len(self.shape) == 2
        blocks = [fmt.block] if fmt.codebook is None else [fmt.block, fmt.codebook]
        spans = two_d and any(block.rows not in (1, -1) for block in blocks)
        if len(self.shape) not in (2, 3) or self.codes.dim() != len(self.shape) or spans:
            return None
        dim = 1 if two_d else 0

        def pick(t: Tensor | None, rows_in_block: int) -> Tensor | None:
            if t is None or (two_d and rows_in_block == -1):
                return t if t is None or len(rows) else t[:, :0]
            return t.index_select(dim, rows)

        plain_offset = None if fmt.offset is None else Offset("min" if fmt.offset_kind == "min" else "float", "fp32")
        return QTensor(
            replace(
                fmt,
                scale=None if fmt.scale is None else "fp32",
                offset=plain_offset,
                exponent=fmt.exponent if fmt.scale is None else 0,
            ),
            (len(rows), *self.shape[1:]),
            self.codes.index_select(0, rows),
            pick(self.scales(), fmt.block.rows),
            pick(self.offsets(), fmt.block.rows),
            pick(self.levels, fmt.codebook.rows if fmt.codebook else 1),
        )

    def __repr__(self) -> str:
        return f"QTensor({self.format}, shape={self.shape}, {self.bits_per_weight:.3f} bits per weight)"


def _gather(name: str, how: Store, counts: tuple[int, ...], parts: Mapping[str, Tensor]) -> Stored:
    if not isinstance(how, Format):
        return parts[name]
    inner = {k[len(name) + 1 :]: v for k, v in parts.items() if k.startswith(name + ".")}
    return QTensor.from_parts(how, (math.prod(counts),), inner)


def _look_up(codes: Tensor, levels: Tensor) -> Tensor:
    return levels.gather(1, codes.to(torch.int64))


def encode(
    x: Tensor, fmt: Format, scale: Tensor | None = None, offset: Tensor | None = None, levels: Tensor | None = None
) -> QTensor:
    """Round `x` to the nearest level of `fmt`, given scale and offset per block (float32, as a fit returns them).

    `offset` is in level units, x ~= scale * (level - offset), whatever the format stores. Scale, offset and
    levels are rounded to how they are stored first, and codes are chosen for the stored values.
    Ties follow the grid. `x` must be finite.
    """
    if fmt.exponent:
        parts = [None if t is None else stores.times_power(t, -fmt.exponent) for t in (scale, levels)]
        learned = parts[1] if fmt.scale is None else levels
        x = stores.times_power(x, -fmt.exponent)
        return replace(encode(x, fmt.plain, parts[0], offset, learned), format=fmt)
    q = without_codes(tuple(x.shape), fmt, scale, offset, levels)
    codes = nearest_codes(x, q)
    return replace(q, codes=pack(codes, fmt.grid.cardinality))


def without_codes(
    shape: tuple[int, ...], fmt: Format, scale: Tensor | None = None, offset: Tensor | None = None,
    levels: Tensor | None = None,
) -> QTensor:  # fmt: skip
    """A tensor of `shape` with scale, offset and levels as they are stored, given as to `encode`, and no codes yet."""
    counts = fmt.block.counts(shape)
    kept_scale = None if fmt.scale is None else save(_given(scale, "scale", fmt).reshape(counts), fmt.scale)
    kept_offset: Stored | None = None
    if fmt.offset is not None:
        zero = _given(offset, "offset", fmt).reshape(counts)
        if fmt.offset.store == "grid":
            kept_offset = pack(fmt.grid.encode(zero), fmt.grid.cardinality)
        else:
            minimum = -_given(scale, "scale", fmt).reshape(counts) * zero if fmt.offset.kind == "min" else zero
            if fmt.spans_zero:
                minimum = minimum.clamp_max(0)
            kept_offset = save(minimum, fmt.offset.store)
    kept_levels = None if levels is None else stores.to_store(levels, fmt.levels_store)
    return QTensor(fmt, shape, torch.empty(0, dtype=torch.uint8), kept_scale, kept_offset, kept_levels)


def nearest_codes(x: Tensor, q: QTensor) -> Tensor:
    """uint8 codes, of the shape of `x`, of the levels nearest to `x` under the stored scale and offset of `q`."""
    fmt = q.format
    if fmt.codebook is not None:
        levels = q.codebooks()
        if fmt.scale is not None:
            x = map_blocks(lambda v, s: v * inverse(s)[:, None], fmt.block, x, q.scales(), dtype=torch.float32)
        return map_blocks(nearest_level, fmt.codebook, x, levels, dtype=torch.uint8)

    def code(block: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        if offset is None:
            return fmt.grid.encode(block * inverse(scale)[:, None])
        if fmt.offset_kind == "min":
            return fmt.grid.encode((block - offset[:, None]) * inverse(scale)[:, None])
        return fmt.grid.encode(block * inverse(scale)[:, None] + offset[:, None])

    return map_blocks(code, fmt.block, x, q.scales(), q.offsets(), dtype=torch.uint8)


def _given(value: Tensor | None, what: str, fmt: Format) -> Tensor:
    if value is None:
        raise FormatError(f"{fmt} needs a {what} per block, and the fit gave none")
    return value


def save(values: Tensor, how: Store) -> Stored:
    """Store per-block values; a nested format quantizes the flat vector, its own scale being absmax or min-max."""
    if not isinstance(how, Format):
        return stores.to_store(values, how)
    flat = values.reshape(-1)
    grid = how.grid
    if how.offset is None:
        sign = 1
        if not grid.signed and bool((flat < 0).any()):
            if bool((flat > 0).any()) or not how.scale_signed:
                raise FormatError(f"scales or minima of both signs do not fit the unsigned nested format {how}")
            sign = -1  # minima: levels count down from zero
        (scale,) = reduce_blocks(lambda b: b.abs().amax(1) * (sign / grid.hi), how.block, flat)
        return encode(flat, how, scale)

    def span(b: Tensor) -> tuple[Tensor, Tensor]:
        low, high = b.amin(1), b.amax(1)
        if how.offset is not None and how.offset.store == "grid":  # the range must include a zero-point on the grid
            low, high = low.clamp_max(0), high.clamp_min(0)
        step = (high - low) / (grid.hi - grid.lo)
        step = torch.where(step > 0, step, 1.0)
        return step, grid.lo - low / step

    scale, offset = reduce_blocks(span, how.block, flat)
    return encode(flat, how, scale, offset)


def load(stored: Stored, how: Store | None, counts: tuple[int, ...]) -> Tensor:
    """What `save` stored, as float32 of shape `counts`."""
    if isinstance(stored, QTensor):
        return stored.dequantize().view(counts)
    return stores.from_store(stored, str(how)).view(counts)
