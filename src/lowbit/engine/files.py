"""Folders as the engine reads them, without transformers: it takes longer to import than a small model to load."""

from __future__ import annotations

from pathlib import Path

from lowbit.interchange.files.safetensors_reader import Entry, read_header
from lowbit.interchange.readers.folder import generation_of, quantization_method, read_config, read_json, weight_files

__all__ = ["generation_of", "quantization_method", "read_config", "read_json", "stored_tensors"]


def stored_tensors(folder: Path) -> dict[str, tuple[Path, Entry]]:
    """Every tensor of a folder: its file and where it lies there."""
    files = {file: read_header(file).entries for file in weight_files(folder)}
    return {name: (file, entry) for file, entries in files.items() for name, entry in entries.items()}
