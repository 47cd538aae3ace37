"""The tensor table of a GGUF file: names, types, shapes and places, read as hostile input.

A file is b"GGUF", the version (u32), the numbers of tensors and of metadata entries (u64 each), the entries, the tensor
table, and the data from the next multiple of `general.alignment` on (32 when it is not given). Source: ggml's `gguf.h`.
Values of metadata are stepped over, but for the two that the table needs; transformers reads them for the config.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of the metadata types of a fixed size
_STRING, _ARRAY, _U32 = 8, 9, 4
_MOST_DIMENSIONS = 4
_MOST_NAME = 1 << 16


@dataclass(frozen=True)
class StoredBlocks:
    """One tensor of the file: its ggml type, its shape in torch order, and its bytes, counted from the file's start."""

    name: str
    ggml_type: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_table(path: Path) -> tuple[str, dict[str, StoredBlocks]]:
    """(architecture, tensors by name). ValueError saying what is wrong with a file that is no whole GGUF file."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    size = path.stat().st_size
    if size < 24:
        raise ValueError(f"{size} bytes are too few for a GGUF file")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        at = _Cursor(memory)
        if at.bytes(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        (version,) = at.unpack("<I")
        if version not in (2, 3):
            raise ValueError(f"it is of version {version}; 2 and 3 can be read")
        tensors, entries = at.unpack("<QQ")
        found = _metadata(at, entries)
        table = [_entry(at) for _ in range(_counted(at, tensors, 24))]
        alignment = found.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment % 8:
            raise ValueError(f"its alignment is {alignment!r}")
        start = -(-at.position // alignment) * alignment
    out: dict[str, StoredBlocks] = {}
    for name, shape, kind, offset in table:
        if name in out:
            raise ValueError(f"it has two tensors {name!r}")
        if kind not in set(GGMLQuantizationType):
            raise ValueError(f"tensor {name!r} is of the unknown ggml type {kind}")
        block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if not shape or shape[-1] % block or 0 in shape:
            raise ValueError(f"tensor {name!r} has shape {list(shape)}, which is not whole blocks of {block}")
        blocks = StoredBlocks(name, kind, shape, start + offset, prod(shape) // block * nbytes)
        if blocks.offset + blocks.nbytes > size:
            raise ValueError(
                f"tensor {name!r} ends at byte {blocks.offset + blocks.nbytes} but the file has {size}: it is truncated"
            )
        out[name] = blocks
    architecture = found.get("general.architecture")
    if not isinstance(architecture, str):
        raise ValueError("it does not say its architecture")
    return architecture, out


class _Cursor:
    """Reads forward through a mapped file, and never beyond its end."""

    def __init__(self, memory: mmap.mmap) -> None:
        self.memory, self.position = memory, 0

    def bytes(self, count: int) -> bytes:
        if count > len(self.memory) - self.position:
            raise ValueError(f"it ends at byte {len(self.memory)}, inside its header: it is truncated")
        self.position += count
        return self.memory[self.position - count : self.position]

    def skip(self, count: int) -> None:
        if count > len(self.memory) - self.position:
            raise ValueError(f"it ends at byte {len(self.memory)}, inside its header: it is truncated")
        self.position += count

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self.bytes(struct.calcsize(layout)))

    def name(self) -> str:
        (length,) = self.unpack("<Q")
        if length > _MOST_NAME:
            raise ValueError(f"a name of {length} bytes cannot be right")
        return self.bytes(length).decode("utf-8")


def _counted(at: _Cursor, count: int, least: int) -> int:
    """`count`, if so many things of at least `least` bytes can follow."""
    if count * least > len(at.memory) - at.position:
        raise ValueError(f"it claims {count} entries, more than it has bytes for")
    return count


def _metadata(at: _Cursor, entries: int) -> dict[str, Any]:
    """The two values that the table needs; the others are stepped over."""
    found: dict[str, Any] = {}
    for _ in range(_counted(at, entries, 13)):
        key = at.name()
        (kind,) = at.unpack("<I")
        if key == "general.architecture" and kind == _STRING:
            found[key] = at.name()
        elif key == "general.alignment" and kind == _U32:
            (found[key],) = at.unpack("<I")
        else:
            _skip(at, kind)
    return found


def _skip(at: _Cursor, kind: int) -> None:
    if kind in _WIDTHS:
        at.skip(_WIDTHS[kind])
    elif kind == _STRING:
        at.skip(at.unpack("<Q")[0])
    elif kind == _ARRAY:
        element, count = at.unpack("<IQ")
        if element in _WIDTHS:
            at.skip(_WIDTHS[element] * count)
        elif element == _STRING:
            for _ in range(_counted(at, count, 8)):
                at.skip(at.unpack("<Q")[0])
        else:
            raise ValueError(f"an array of the type {element} cannot be read")
    else:
        raise ValueError(f"a value of the unknown type {kind}")


def _entry(at: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape in torch order, ggml type, offset in the data) of the next tensor."""
    name = at.name()
    (dimensions,) = at.unpack("<I")
    if dimensions > _MOST_DIMENSIONS:
        raise ValueError(f"tensor {name!r} claims {dimensions} dimensions")
    sizes = at.unpack(f"<{dimensions}Q")
    kind, offset = at.unpack("<IQ")
    return name, tuple(reversed(sizes)), kind, offset
