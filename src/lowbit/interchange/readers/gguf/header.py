"""The header of a GGUF file, read as hostile input: metadata are checked and passed over, tensors are listed.

GGUF (docs/gguf.md of ggml): "GGUF", version, number of tensors, number of metadata; metadata as key, type, value; tensors as
name, dimensions (innermost first), ggml type, offset; then, at the next multiple of `general.alignment`, the data. Every
count and length is held against what is left of the file before anything of that size is read, so that neither time
nor memory grows beyond the file. transformers' own reader, which makes config and tokenizer, comes after this one.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from lowbit.errors import SourceError

_SCALARS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_DIMENSIONS, _DEPTH, _KEY, _ALIGNMENT = 4, 4, 1 << 16, 1 << 20
_KEPT = 4096  # numbers of an array that are kept: as many as there may be layers
_SHOWN = 300  # characters of a problem: damaged names can be long


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its ggml type, its shape in torch order, and where its bytes lie, counted from the start of the file `path`."""

    path: Path
    name: str
    ggml_type: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Architecture, tensors in the order of the file, and metadata (arrays of words and long ones are None).

    Of the parts of a split model the first alone has an architecture; that of the others is empty.
    """

    architecture: str
    tensors: dict[str, GgufTensor]
    metadata: dict[str, Any]


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the header of the file at `path`. SourceError says what is wrong with it."""
    try:
        with path.open("rb") as file:
            return _Reader(file, path).header()
    except OSError as error:
        raise SourceError(
            f"cannot read {path}: {error.strerror or error}; check the path and its permissions"
        ) from error


class _Reader:
    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._left = self._size = path.stat().st_size

    def header(self) -> GgufHeader:
        if self._size < 24 or self._bytes(4, "the magic") != b"GGUF":
            self._refuse("it does not begin with GGUF", "this is no GGUF file")
        version = self._number("<I", "the version")
        if version not in (2, 3):
            self._refuse(f"it has version {version}, and 2 and 3 are known (others, and big-endian files, are not)")
        tensor_count, pair_count = (
            self._number("<Q", "the number of tensors"),
            self._number("<Q", "the number of metadata"),
        )
        metadata: dict[str, Any] = {}
        for _ in range(self._possible(pair_count, 13, "metadata")):
            key = self._string("a key", _KEY)
            if key in metadata:
                self._refuse(f"its metadata name {key!r} twice")
            metadata[key] = self._value(self._number("<I", f"the type of {key!r}"), key)
        architecture, alignment = metadata.get("general.architecture"), metadata.get("general.alignment", 32)
        if architecture is None and metadata.get("split.no"):
            architecture = ""
        if not isinstance(architecture, str):
            self._refuse("its metadata name no general.architecture")
        if type(alignment) is not int or not 0 < alignment <= _ALIGNMENT:
            self._refuse(f"its data are aligned to {alignment!r} bytes")
        entries = [self._tensor() for _ in range(self._possible(tensor_count, 24, "tensors"))]
        start = -(-(self._size - self._left) // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                self._refuse(f"it has two tensors {name!r}")
            nbytes = self._nbytes(name, shape, kind)
            if start + offset + nbytes > self._size:
                self._refuse(
                    f"tensor {name!r} ends at byte {start + offset + nbytes} but the file has {self._size}: it is truncated"
                )
            tensors[name] = GgufTensor(self._path, name, kind, shape, start + offset, nbytes)
        self._check_apart(tensors)
        return GgufHeader(architecture, tensors, metadata)

    def _check_apart(self, tensors: dict[str, GgufTensor]) -> None:
        """SourceError where two tensors share bytes."""
        ordered = sorted((t for t in tensors.values() if t.nbytes), key=lambda t: t.offset)
        for before, after in pairwise(ordered):
            if after.offset < before.offset + before.nbytes:
                self._refuse(f"tensor {after.name!r} overlaps {before.name!r}")

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string("a tensor's name", _KEY)
        count = self._number("<I", f"the dimensions of {name!r}")
        if count > _DIMENSIONS:
            self._refuse(f"tensor {name!r} has {count} dimensions, and at most {_DIMENSIONS} are possible")
        shape = tuple(self._number("<Q", f"the shape of {name!r}") for _ in range(count))[::-1]
        kind = self._number("<I", f"the type of {name!r}")
        return name, shape, kind, self._number("<Q", f"the offset of {name!r}")

    def _nbytes(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            self._refuse(f"tensor {name!r} has the ggml type {kind}, which the gguf package here does not know")
        columns = shape[-1] if shape else 1
        if columns % block:
            self._refuse(f"tensor {name!r} has rows of {columns}, which blocks of {block} do not fill")
        return prod(shape) // block * size

    def _value(self, kind: int, key: str, depth: int = 0) -> Any:
        """A scalar, a string, or a short array of numbers; None for another array, which is passed over."""
        if kind in _SCALARS:
            return self._number(_SCALARS[kind], f"the value of {key!r}")
        if kind == _STRING:
            return self._string(f"the value of {key!r}", self._left)
        if kind != _ARRAY or depth == _DEPTH:
            self._refuse(f"the value of {key!r} has the type {kind}, which is not known (or arrays in arrays)")
        inner, count = self._number("<I", f"the type of {key!r}"), self._number("<Q", f"the length of {key!r}")
        if inner in _SCALARS and count <= _KEPT:
            return tuple(self._number(_SCALARS[inner], f"the values of {key!r}") for _ in range(count))
        if inner in _SCALARS:
            self._skip(count * struct.calcsize(_SCALARS[inner]), f"the {count} values of {key!r}")
            return None
        for _ in range(self._possible(count, 8, f"values of {key!r}")):
            if inner == _STRING:
                self._skip(self._number("<Q", f"the values of {key!r}"), f"the values of {key!r}")
            else:
                self._value(inner, key, depth + 1)
        return None

    def _string(self, what: str, limit: int) -> str:
        length = self._number("<Q", what)
        if length > limit:
            self._refuse(f"{what} claims {length} bytes")
        try:
            return self._bytes(length, what).decode("utf-8")
        except UnicodeDecodeError:
            self._refuse(f"{what} is not UTF-8")

    def _number(self, code: str, what: str) -> Any:
        return struct.unpack(code, self._bytes(struct.calcsize(code), what))[0]

    def _possible(self, count: int, size: int, what: str) -> int:
        """A count of things of at least `size` bytes each, that the rest of the file can hold."""
        if count * size > self._left:
            self._refuse(f"it claims {count} {what}, and {self._left} bytes are left of the file")
        return count

    def _bytes(self, count: int, what: str) -> bytes:
        self._take(count, what)
        found = self._file.read(count)
        if len(found) != count:
            self._refuse(f"it ends inside {what}")
        return found

    def _skip(self, count: int, what: str) -> None:
        self._take(count, what)
        self._file.seek(count, 1)

    def _take(self, count: int, what: str) -> None:
        if count > self._left:
            self._refuse(f"{what} takes {count} bytes and {self._left} are left: the file is truncated or damaged")
        self._left -= count

    def _refuse(self, problem: str, what: str = "it is damaged") -> NoReturn:
        problem = problem if len(problem) <= _SHOWN else problem[: _SHOWN - 3] + "..."
        raise SourceError(f"{self._path}: cannot be read as GGUF ({problem}): {what}; download it again")
