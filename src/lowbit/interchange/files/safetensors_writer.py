"""Write safetensors files whose every byte is known before the first tensor is.

The layout (which tensor lies where in which file) follows from names, types and shapes alone, so a plan can
state the exact size, tensors can be written in any order as they become ready, and a run that was killed
goes on where it stopped. Tensors of wide types come first, so that every one is aligned to its type.
Format: https://huggingface.co/docs/safetensors, section "Format".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from lowbit.errors import OutputError
from lowbit.interchange.files.safetensors_reader import DTYPES
from lowbit.interchange.tensors import Specs

INDEX = "model.safetensors.index.json"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Shard:
    """One file: its header, and where each tensor begins and ends in it (absolute offsets)."""

    file: str
    header: bytes
    spans: dict[str, tuple[int, int]]

    @property
    def file_bytes(self) -> int:
        return max((end for _, end in self.spans.values()), default=len(self.header))


def shards_of(tensors: Iterable[tuple[str, Specs]], max_bytes: int) -> tuple[Shard, ...]:
    """Files of at most `max_bytes` of data each (more only where one tensor alone is larger), in the given order.

    `tensors`: (name, what is stored for it); the parts of one tensor stay in one file.
    """
    groups: list[Specs] = [{}]
    filled = 0
    for _, specs in tensors:
        size = sum(_nbytes(*spec) for spec in specs.values())
        if groups[-1] and filled + size > max_bytes:
            groups.append({})
            filled = 0
        groups[-1].update(specs)
        filled += size
    names = ["model.safetensors"]
    if len(groups) > 1:
        names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    return tuple(_shard(name, group) for name, group in zip(names, groups, strict=True))


def index_bytes(shards: tuple[Shard, ...]) -> int:
    """Bytes of the index file; a single shard has none."""
    return len(index_json(shards)) if len(shards) > 1 else 0


def index_json(shards: tuple[Shard, ...]) -> bytes:
    """`model.safetensors.index.json`, as transformers reads it."""
    total = sum(end - begin for s in shards for begin, end in s.spans.values())
    weight_map = {name: s.file for s in shards for name in s.spans}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def create(folder: Path, shards: tuple[Shard, ...]) -> None:
    """Make every file at its full size with its header; files that are already there stay."""
    for shard in shards:
        path = folder / shard.file
        if path.is_file() and path.stat().st_size == shard.file_bytes:
            continue
        with path.open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.file_bytes)


def _shard(file: str, specs: Specs) -> Shard:
    order = sorted(specs, key=lambda name: -specs[name][0].itemsize)  # stable: names of a type keep their order
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at, places = 0, {}
    for name in order:
        dtype, shape = specs[name]
        if dtype not in _NAMES:
            raise OutputError(f"tensor {name!r} is {dtype}, which safetensors cannot hold")
        end = at + _nbytes(dtype, shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        places[name] = (at, end)
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 8)
    begin = 8 + len(text)
    spans = {name: (begin + a, begin + b) for name, (a, b) in places.items()}
    return Shard(file, len(text).to_bytes(8, "little") + text, spans)


def _nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * math.prod(shape)
