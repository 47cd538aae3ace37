"""What a finished folder says of itself: by it a run that was killed at its very end is known again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from lowbit.errors import LowbitError, SourceError
from lowbit.interchange.files.safetensors_reader import read_header, tensor_sha256
from lowbit.interchange.files.safetensors_writer import INDEX, Shard, index_json

MANIFEST = "lowbit.json"


def manifest_text(origin: Mapping[str, Any], journal: Mapping[str, Mapping[str, Any]]) -> str:
    """The manifest: where every byte came from, and of every tensor what the journal had."""
    tensors = {name: {k: v for k, v in entry.items() if k != "tensor"} for name, entry in sorted(journal.items())}
    return json.dumps({**origin, "tensors": tensors}, indent=2, sort_keys=True) + "\n"


def recorded(folder: Path, shards: tuple[Shard, ...], origin: Mapping[str, Any]) -> dict[str, dict[str, Any]] | None:
    """The journal of the finished folder that a run with this `origin` writes, None where `folder` is not that.

    Every byte of a weight is read and held against its hash.
    """
    try:
        found = json.loads((folder / MANIFEST).read_text("utf-8"))
        tensors = found.pop("tensors")
        if _without_cache(found) != _without_cache(json.loads(json.dumps(origin))):
            return None
        journal = {name: {"tensor": name, **entry} for name, entry in tensors.items()}
        if not all(_same_header(folder / shard.file, shard) for shard in shards):
            return None
        if len(shards) > 1 and (folder / INDEX).read_bytes() != index_json(shards):
            return None
        check_written(folder, shards, journal)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, LowbitError):
        return None
    return journal


def _without_cache(said: dict[str, Any]) -> dict[str, Any]:
    """What a manifest says but for the cache format, which may be written anew into a finished folder."""
    section = said.get("quantization")
    if not isinstance(section, dict):
        return said
    return {**said, "quantization": {key: value for key, value in section.items() if key != "kv"}}


def check_written(folder: Path, shards: tuple[Shard, ...], journal: Mapping[str, Mapping[str, Any]]) -> None:
    """Read every stored tensor back, a piece at a time and not by mapping, and compare. SourceError on a difference."""
    expected = {part: digest for entry in journal.values() for part, digest in entry["sha256"].items()}
    parts = [(folder / s.file, e) for s in shards for e in read_header(folder / s.file).entries.values()]
    with ThreadPoolExecutor(torch.get_num_threads(), "lowbit-verify") as threads:
        for (path, entry), digest in zip(parts, threads.map(lambda part: tensor_sha256(*part), parts), strict=True):
            if digest != expected.pop(entry.name, None):
                threads.shutdown(wait=False, cancel_futures=True)
                raise SourceError(
                    f"{path}: {entry.name} reads back other than it was written; the disk or memory is failing"
                )
    if expected:
        raise SourceError(f"{folder}: {next(iter(expected))} was written and cannot be read back")


def _same_header(path: Path, shard: Shard) -> bool:
    with path.open("rb") as file:
        return path.stat().st_size == shard.file_bytes and file.read(len(shard.header)) == shard.header
