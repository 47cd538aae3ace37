"""Reading safetensors files as hostile input.

A safetensors file is 8 bytes of little-endian header length N, N bytes of JSON that names every
tensor with its dtype, shape and byte range, then the bytes themselves, without holes (see
https://github.com/huggingface/safetensors#format). The header is checked as a whole before any
tensor is read. A tensor is read with plain file reads into its own buffer, never by mapping the
file, so that both the resident memory and the address space stay bounded by the tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from lowbit.errors import SourceError

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_PIECE = 1 << 20  # bytes of a tensor that are hashed at a time
_AGAIN = "download or copy it again"
_EXPORT = "export it again"


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: `nbytes` bytes from `offset`, counted from the start of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A checked header: tensors in the order of their bytes, free text metadata, size and SHA-256 of the header."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    file_bytes: int
    sha256: str


def read_header(path: str | Path) -> Header:
    """Read and check the header of the file at `path`, and no tensor. SourceError names what is wrong."""
    try:
        with open(path, "rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            length = header_length(file.read(8), file_bytes, str(path))
            raw = file.read(length)
    except OSError as error:
        raise SourceError(
            f"cannot read {path}: {error.strerror or error}; check the path and its permissions"
        ) from error
    if len(raw) != length:
        _refuse(str(path), f"the file ends inside its header ({len(raw)} of {length} bytes)", _AGAIN)
    return parse_header(raw, file_bytes, str(path))


def header_length(first: bytes, file_bytes: int | None, where: str) -> int:
    """Length N of the JSON header from the first 8 bytes; `file_bytes=None` where the size is not known."""
    if len(first) < 8:
        _refuse(where, f"{len(first)} bytes are too few for a safetensors file", _AGAIN)
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER_BYTES:
        _refuse(where, f"its header claims {length} bytes, more than the {MAX_HEADER_BYTES} allowed; "
                "this is no safetensors file or it is damaged", _AGAIN)  # fmt: skip
    if file_bytes is not None and 8 + length > file_bytes:
        _refuse(where, f"its header claims {length} bytes but the file has {file_bytes}: it is truncated", _AGAIN)
    return length


def parse_header(raw: bytes, file_bytes: int | None, where: str) -> Header:
    """Check the JSON header `raw` (without its 8 length bytes) of a file of `file_bytes` bytes.

    Every tensor must have a known dtype, a byte range that is exactly shape x dtype, and the
    ranges together must fill the data part once: no overlap, no hole, nothing beyond the end.
    With `file_bytes=None` (a header fetched alone) the size is what the ranges claim.
    """
    fields = _parse_json(raw, where)
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _refuse(where, "its __metadata__ is not a map from text to text", _EXPORT)
    start = 8 + len(raw)
    entries = sorted(
        (_entry(name, field, start, where) for name, field in fields.items()),
        key=lambda e: (e.offset, e.nbytes, e.name),
    )
    position, before = start, "the header"
    for entry in entries:
        if entry.offset < position:
            _refuse(where, f"tensor {entry.name!r} overlaps {before}", _AGAIN)
        if entry.offset > position:
            _refuse(where, f"{entry.offset - position} bytes between {before} and tensor {entry.name!r} "
                    "belong to no tensor", _AGAIN)  # fmt: skip
        position, before = entry.offset + entry.nbytes, f"tensor {entry.name!r}"
        if file_bytes is not None and position > file_bytes:
            _refuse(where, f"tensor {entry.name!r} ends at byte {position} but the file has {file_bytes}: "
                    "it is truncated", _AGAIN)  # fmt: skip
    if file_bytes is not None and position != file_bytes:
        _refuse(where, f"{file_bytes - position} bytes after {before} belong to no tensor", _AGAIN)
    return Header({e.name: e for e in entries}, metadata, position, hashlib.sha256(raw).hexdigest())


def read_tensor(path: str | Path, entry: Entry, rows: slice | None = None) -> torch.Tensor:
    """The tensor `entry` of the file at `path` in fresh memory; with `rows`, only these of its first dimension.

    Reads only the bytes it returns. `rows` is a slice with step 1. SourceError when the file has
    become shorter than its header says or cannot be read.
    """
    shape, offset = entry.shape, entry.offset
    if rows is not None:
        first, last, step = rows.indices(shape[0] if shape else 0)
        if not shape or step != 1:
            raise ValueError(f"rows {rows} of {entry.name!r}: needs a dimension to slice and step 1")
        offset += first * (entry.nbytes // shape[0] if shape[0] else 0)
        shape = (max(last - first, 0), *shape[1:])
    tensor = torch.empty(shape, dtype=entry.dtype)
    view = bytes_of(tensor)
    done = 0
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            while done < len(view):  # one call reads at most 2 GiB on Linux
                count = file.readinto(view[done:])
                if not count:
                    _refuse(str(path), f"the file ends inside tensor {entry.name!r}", _AGAIN)
                done += count
    except OSError as error:
        raise SourceError(f"cannot read tensor {entry.name!r} of {path}: {error.strerror or error}") from error
    if entry.dtype is torch.bool and tensor.view(torch.uint8).gt(1).any():
        _refuse(str(path), f"tensor {entry.name!r} says BOOL but holds other values than 0 and 1", _EXPORT)
    return tensor


def tensor_sha256(path: str | Path, entry: Entry) -> str:
    """SHA-256 of the bytes of a tensor in its file, read a piece at a time. SourceError when the file is too short for it."""
    digest, left = hashlib.sha256(), entry.nbytes
    piece = memoryview(bytearray(min(left, _PIECE)))
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(entry.offset)
            while left:
                count = file.readinto(piece[: min(left, _PIECE)])
                if not count:
                    _refuse(str(path), f"the file ends inside tensor {entry.name!r}", _AGAIN)
                digest.update(piece[:count])
                left -= count
    except OSError as error:
        raise SourceError(f"cannot read tensor {entry.name!r} of {path}: {error.strerror or error}") from error
    return digest.hexdigest()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor of any dtype as bytes; writing to them writes to the tensor."""
    if tensor.numel() == 0:
        return memoryview(b"")
    raw: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(raw)


def sampled(path: Path) -> str:
    """SHA-256 of evenly spaced pieces of a file: tells two models of one shape apart without reading them."""
    digest, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as stream:
        for i in range(_SAMPLES):
            stream.seek(i * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _entry(name: str, field: Any, start: int, where: str) -> Entry:
    """Check one `name: {dtype, shape, data_offsets}` of a header whose data begins at byte `start`."""
    if not isinstance(field, dict) or set(field) != {"dtype", "shape", "data_offsets"}:
        _refuse(where, f"tensor {name!r} has not exactly dtype, shape and data_offsets", _EXPORT)
    dtype = DTYPES.get(field["dtype"]) if isinstance(field["dtype"], str) else None
    if dtype is None:
        _refuse(where, f"tensor {name!r} has the dtype {field['dtype']!r}, which is not known here",
                f"known are {', '.join(DTYPES)}")  # fmt: skip
    shape, offsets = field["shape"], field["data_offsets"]
    if not _naturals(shape):
        _refuse(where, f"tensor {name!r} has the shape {shape!r}, which is no list of sizes", _EXPORT)
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(where, f"tensor {name!r} has data_offsets {offsets!r}, which are no [begin, end]", _EXPORT)
    nbytes = dtype.itemsize
    for size in shape:
        nbytes *= size
    if nbytes != offsets[1] - offsets[0]:
        _refuse(where, f"tensor {name!r} of shape {shape} and dtype {field['dtype']} needs {nbytes} bytes "
                f"but its data_offsets give {offsets[1] - offsets[0]}", _AGAIN)  # fmt: skip
    return Entry(name, dtype, tuple(shape), start + offsets[0], nbytes)


def _naturals(value: Any) -> bool:
    """Whether `value` is a list of ints from 0 to 2^63 - 1, none of them a bool."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """The header as a dict; refuses bad UTF-8, bad JSON, repeated keys and deep nesting."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys if len(set(keys)) < len(keys) else ():
            if keys.count(key) > 1:
                _refuse(where, f"its header names {key!r} twice", _EXPORT)
        return dict(pairs)

    try:
        fields = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        _refuse(
            where,
            f"its header is not valid JSON ({error}); this is no safetensors file or it is damaged",
            _AGAIN,
        )
    if not isinstance(fields, dict):
        _refuse(where, "its header is not a JSON object", _AGAIN)
    return fields


def _refuse(where: str, problem: str, remedy: str) -> NoReturn:
    raise SourceError(f"{where}: {problem}; {remedy}")
