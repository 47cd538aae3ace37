"""Where the bits of a stored value come from: its code, and its share of the scales."""

from __future__ import annotations

from lowbit.formats import Format, QTensor
from lowbit.formats.format import Store
from lowbit.formats.stores import store_bytes
from lowbit.report.wording import number_text as num

_NAMES = {
    "codes": "codes",
    "scale": "scales",
    "offset": "offsets",
    "levels": "learned levels",
    "scale.codes": "codes of scales",
    "scale.scale": "scales of scales",
    "offset.codes": "codes of minima",
    "offset.scale": "scales of minima",
}


def bits_text(q: QTensor) -> str:
    """The bytes of this array by what they hold, and the bits of each value where blocks are whole, with their sum."""
    parts = {name: t.numel() * t.element_size() for name, t in q.parts().items()}
    said = ", ".join(f"{size} B of {_NAMES.get(name, name)}" for name, size in parts.items())
    whole = _whole(q.format)
    return f"{said}; {whole}" if whole else said


def _whole(fmt: Format) -> str:
    """'with 64 values to a scale: 4 + 16/64 = 4.25'; empty where a block is as large as the weight is."""
    size = fmt.block.cols * fmt.block.rows
    if fmt.codebook is not None or fmt.block.cols == -1 or fmt.block.rows == -1 or fmt.scale is None:
        return ""
    terms = _terms(fmt.scale, size, fmt.grid.bits)
    if fmt.offset is not None:
        terms += _terms(fmt.offset.store, size, fmt.grid.bits)
    total = fmt.grid.bits + sum(bits / count for bits, count in terms)
    text = " + ".join([str(fmt.grid.bits), *(f"{bits}/{count}" for bits, count in terms)])
    return f"where all blocks have {size} values, a value takes {text} = {num(total, 5)} bits"


def _terms(store: Store, size: int, grid_bits: int) -> list[tuple[int, int]]:
    """(bits, values that share them) of what is kept for each block; what all blocks of a weight share counts as nothing."""
    if isinstance(store, str):
        return [(grid_bits if store == "grid" else 8 * store_bytes(store), size)]
    inner = [] if store.block.cols == -1 or store.scale is None else _terms(store.scale, size * store.block.cols, 0)
    if store.offset is not None and store.block.cols != -1:
        inner += _terms(store.offset.store, size * store.block.cols, store.grid.bits)
    return [(store.grid.bits, size), *inner]
