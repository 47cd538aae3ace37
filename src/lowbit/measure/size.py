"""Bytes on disk of what is needed to run a model, and bits per weight."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lowbit.errors import SourceError

_WEIGHTS = (".safetensors", ".gguf")
# Files of tokenizers that are neither JSON nor weights.
_ASSETS = (".model", ".spm", ".tiktoken", ".jinja", ".vocab", ".bpe")
_ASSET_NAMES = ("merges.txt", "vocab.txt")
# What lowbit writes for people; the model runs without them.
REPORTS = ("card.json", "lowbit.json")


@dataclass(frozen=True)
class DiskSize:
    """Bytes of the weights and of everything needed to run (weights, JSON, tokenizer)."""

    weights: int
    total: int


def disk_size(path: Path | str, *, ignore: Iterable[str] = REPORTS) -> DiskSize:
    """Size of a model folder or of a single weight file; a link counts as what it points to.

    In a folder, an index of shards says which weight files count; else `model.safetensors`
    when it is there; else every weight file. Raises SourceError when there are no weights.
    """
    path = Path(path)
    if path.is_file():
        return DiskSize(path.stat().st_size, path.stat().st_size)
    if not path.is_dir():
        raise SourceError(f"{path}: no such file or folder, so it has no size")
    skipped = set(ignore)
    files = [file for file in sorted(path.iterdir()) if file.is_file() and file.name not in skipped]
    weights = _weight_files(path, [file for file in files if file.suffix in _WEIGHTS])
    if not weights:
        raise SourceError(f"{path} holds no .safetensors or .gguf file: name the folder of a saved model")
    assets = [f for f in files if f.suffix == ".json" or f.suffix in _ASSETS or f.name in _ASSET_NAMES]
    weight_bytes = sum(file.stat().st_size for file in weights)
    return DiskSize(weight_bytes, weight_bytes + sum(file.stat().st_size for file in assets))


def _weight_files(folder: Path, found: list[Path]) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError):
            raise SourceError(f"{index} is not an index of shards: save the model again") from None
        listed = [folder / name for name in sorted(names)]
        missing = [file.name for file in listed if not file.is_file()]
        if missing:
            raise SourceError(f"{folder} lacks {', '.join(missing)}, which its index lists: copy it there")
        return listed
    single = folder / "model.safetensors"
    return [single] if single in found else found


def bits_per_weight(nbytes: int, parameters: int) -> float:
    """8 * bytes / parameters."""
    return 8 * nbytes / parameters


def count_parameters(module: nn.Module) -> int:
    """Numbers in a float model's parameters; a tied one counts once."""
    return sum(parameter.numel() for parameter in module.parameters())


def module_bytes(module: nn.Module) -> int:
    """Bytes of a model's parameters and buffers in memory; a tied one counts once."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
