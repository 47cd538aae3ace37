"""The JSON files of a model folder, and whose folder it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lowbit.errors import SourceError
from lowbit.interchange.checks.config import check_config
from lowbit.interchange.checks.words import check_generation
from lowbit.interchange.files.adapter import refuse_adapter
from lowbit.interchange.hf.section import SECTIONS

OURS = "lowbit"  # the `quant_method` of a folder that lowbit wrote
_MOST_JSON = 256 << 20  # bytes; the largest index of shards has some


def is_ours(model: Any) -> bool:
    """Whether `model` is the path of a folder that lowbit wrote. SourceError for a folder without a readable config.json."""
    return isinstance(model, (str, Path)) and Path(model).is_dir() and quantized_by(model) == OURS


def check_ours(folder: str | Path) -> None:
    """SourceError unless `folder` is one that lowbit wrote."""
    if not Path(folder).is_dir():
        raise SourceError(f"there is no folder {str(folder)!r}; quantize a model into it first")
    method = quantized_by(folder)
    if method is None:
        raise SourceError(f"{folder} is a float model, not written by lowbit; quantize it first")
    if method != OURS:
        raise SourceError(
            f"{folder} is quantized with {method}, not written by lowbit; lowbit import makes a folder of lowbit of it"
        )


def quantized_by(folder: str | Path) -> str | None:
    """The `quant_method` of a quantized folder, None for a float model. SourceError as in `quantization_section`."""
    section = quantization_section(folder)
    return None if section is None else str(section.get("quant_method") or "an unnamed method")


def quantization_section(folder: str | Path) -> dict[str, Any] | None:
    """What the folder's config.json says of quantization, None for a float model.

    SourceError when there is no readable config.json.
    """
    config = read_config(Path(folder))
    for holder in (config, config.get("text_config") or {}):
        for key in SECTIONS if isinstance(holder, dict) else ():
            if section := holder.get(key):
                return section if isinstance(section, dict) else {}
    return None


def read_config(folder: Path) -> dict[str, Any]:
    """The checked config.json of a folder. SourceError that names the first field that makes no model, and for an adapter."""
    refuse_adapter(folder, str(folder))
    config = read_json(folder / "config.json")
    check_config(config, str(folder / "config.json"))
    return config


def generation_of(folder: Path) -> dict[str, Any]:
    """The generation_config.json of a folder, empty where there is none. SourceError where it is none."""
    file = folder / "generation_config.json"
    found = read_json(file) if file.is_file() else {}
    check_generation(found, str(file))
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. SourceError when it is absent or no object."""
    if not path.is_file():
        raise SourceError(
            f"{path.parent}: there is no {path.name}; a model folder needs config.json beside its safetensors files"
        )
    try:
        if path.stat().st_size > _MOST_JSON:
            raise SourceError(
                f"{path}: has {path.stat().st_size} bytes, which is no file of settings; download it again"
            )
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path}: not readable as JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path}: holds no JSON object; download it again")
    return value
