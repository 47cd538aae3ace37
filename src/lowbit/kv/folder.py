"""The cache format that a folder of lowbit carries: its text in config.json and lowbit.json, and calibrated tables beside the weights.

    config.json             quantization_config.kv, such as "int8" or "k=int8,v=int4:g32"; what counts when the model is run
    lowbit.json             quantization.kv, the same, for people
    kv_cache.safetensors    tables of calibrated formats, `layers.{number}.{k|v}.{levels|scale|offset|channels}`

A folder without them stores its cache as the program that runs it likes best, as folders did before there were any.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from lowbit.errors import FormatError, OutputError, RecipeError, SourceError
from lowbit.interchange.checks.section import read_section
from lowbit.interchange.files.atomic import replace_file
from lowbit.interchange.files.finished import MANIFEST
from lowbit.interchange.files.lock import locked
from lowbit.interchange.files.safetensors_reader import read_header, read_tensor
from lowbit.interchange.files.settings import OURS, check_ours, quantization_section, read_json
from lowbit.interchange.hf.section import CACHE_TABLES
from lowbit.kv.cache_format import CacheFormat
from lowbit.kv.tables import TablesOfLayers, tables_from_tensors, tables_to_tensors

KEY = "kv"
_LONGEST = 1 << 16  # characters of the text of a cache format
_MOST_TENSORS, _MOST_BYTES = 1 << 16, 1 << 30

Sizes = Mapping[int, tuple[int, int, int]]
"""Of each layer that keeps keys and values, by number: heads, channels of a key, channels of a value."""


def read_cache_format(folder: str | Path) -> CacheFormat | None:
    """The cache format that a folder carries, None where it says nothing of it. SourceError for a text that is none."""
    section = quantization_section(folder)
    if section is None or section.get("quant_method", OURS) != OURS:
        return None
    where = str(Path(folder) / "config.json")
    return parsed(read_section(section, where).kv, where)


def parsed(text: str, where: str) -> CacheFormat | None:
    """The format of a text that a file has; None for an empty one. SourceError that names the file."""
    if not text:
        return None
    try:
        if len(text) > _LONGEST:
            raise RecipeError(f"it has {len(text):,} characters")
        return CacheFormat.of(text)
    except (FormatError, RecipeError, ValueError, OverflowError, RecursionError) as error:
        said = " ".join(str(error).split())[:200]
        raise SourceError(
            f"{where}: quantization_config.{KEY} is no format of a KV cache: {said}; `lowbit check-kv FOLDER --write` writes one"
        ) from None


def read_cache_tables(folder: str | Path, cache: CacheFormat, sizes: Sizes) -> TablesOfLayers:
    """The calibrated tables of a folder, each checked; empty for formats without.

    SourceError where the format needs some that are not there, and for what cannot be of this format and model.
    """
    file = Path(folder) / CACHE_TABLES
    if not file.is_file():
        if cache.calibrated:
            raise SourceError(
                f"{folder}: its cache format {cache} has tables, and {CACHE_TABLES} is not there; copy the folder whole, or write another format "
                "with `lowbit check-kv FOLDER --write`"
            )
        return {}
    entries = read_header(file).entries
    if len(entries) > _MOST_TENSORS or sum(entry.nbytes for entry in entries.values()) > _MOST_BYTES:
        raise SourceError(f"{file} is too large for the tables of a KV cache; copy the folder again")
    return checked_tables({name: read_tensor(file, entry) for name, entry in entries.items()}, cache, sizes, str(file))


def checked_tables(tensors: Mapping[str, Tensor], cache: CacheFormat, sizes: Sizes, where: str) -> TablesOfLayers:
    """The tables that these tensors are, in a model of these sizes. SourceError that names the file."""
    found: TablesOfLayers = {}
    known = set[str]()
    try:
        for layer, (heads, keys, values) in sizes.items():
            own = {name: value for name, value in tensors.items() if name.startswith(f"layers.{layer}.")}
            known |= own.keys()
            found |= tables_from_tensors(own, cache, (layer,), heads, (keys, values))
    except SourceError as error:
        raise SourceError(f"{where}: {error}") from None
    if stray := sorted(tensors.keys() - known):
        raise SourceError(f"{where}: {stray[0]!r} is no table of the KV cache of this model; copy the folder again")
    return found


def write_cache_format(folder: str | Path, cache: CacheFormat | None, tables: TablesOfLayers | None = None) -> None:
    """Let a folder that lowbit wrote carry this cache format, with what calibration found for it; None takes out what it carries.

    Each file is replaced whole. SourceError for a folder of others, RecipeError where tables are missing, OutputError.
    """
    place = Path(folder)
    check_ours(place)
    if cache is not None and cache.calibrated and not tables:
        raise RecipeError(f"the cache format {cache} has tables that calibration finds, and none are given")
    tensors = tables_to_tensors(tables) if cache is not None and tables else {}
    tensors = {name: value.detach().cpu().clone() for name, value in tensors.items()}  # a file shares no memory
    try:
        with locked(place):
            if tensors:
                _replace(place / CACHE_TABLES, save(tensors, metadata={"format": "pt"}))
            for name, key in (("config.json", "quantization_config"), (MANIFEST, "quantization")):
                if (place / name).is_file():
                    _write_text(place / name, key, cache)
            if not tensors:
                (place / CACHE_TABLES).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot write the cache format into {folder}: {error.strerror or error}; check its permissions"
        ) from error


def _write_text(file: Path, key: str, cache: CacheFormat | None) -> None:
    whole: dict[str, Any] = read_json(file)
    section = {k: v for k, v in dict(whole.get(key) or {}).items() if k != KEY}
    whole[key] = section if cache is None else {**section, KEY: str(cache)}
    _replace(file, (json.dumps(whole, indent=2, sort_keys=True) + "\n").encode())


def _replace(file: Path, content: bytes) -> None:
    fresh = file.with_name(f".{file.name}.lowbit-new")
    fresh.write_bytes(content)
    replace_file(fresh, file)
