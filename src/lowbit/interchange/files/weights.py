"""The safetensors files of a model folder: which they are, and every tensor in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowbit.errors import SourceError
from lowbit.interchange.checks.rules import shown
from lowbit.interchange.files.safetensors_reader import Entry, Header, read_header
from lowbit.interchange.files.safetensors_writer import INDEX
from lowbit.interchange.files.settings import read_json
from lowbit.interchange.hf.section import GUARD, GUARD_WORDS
from lowbit.interchange.readers.left_out import no_weights, unread_weights

SINGLE = "model.safetensors"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, as transformers chooses them. SourceError when there are none or one lacks."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise SourceError(no_weights(folder, SINGLE, INDEX))
    files = [folder / name for name in sorted(set(index_map(read_json(folder / INDEX), str(folder / INDEX)).values()))]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise SourceError(
            f"{folder}: {INDEX} names {len(absent)} of {len(files)} shards that are not there: "
            f"{', '.join(absent[:5])}; download them"
        )
    return files


def entries_of(folder: Path, headers: Mapping[Path, Header] | None = None) -> dict[str, tuple[Path, Entry]]:
    """Every tensor of a folder by name: its file and where it lies there, held against the index where there is one.

    `headers`: of all `weight_files`, where they are at hand. SourceError where the files contradict one another.
    """
    files = {file: read_header(file) for file in weight_files(folder)} if headers is None else headers
    merged: dict[str, tuple[Path, Entry]] = {}
    for file, header in files.items():
        for name, entry in header.entries.items():
            if name in merged:
                raise SourceError(
                    f"{folder}: tensor {name!r} is in both {merged[name][0].name} and {file.name}; "
                    "remove files of another download"
                )
            merged[name] = (file, entry)
    if len(files) > 1 or folder / SINGLE not in files:
        for name, file_name in index_map(read_json(folder / INDEX), str(folder / INDEX)).items():
            if name not in merged or merged[name][0].name != file_name:
                raise SourceError(
                    f"{folder}: {INDEX} puts tensor {name!r} into {file_name}, where it is not; download both again"
                )
    return merged


def remarks_on(folder: Path) -> tuple[str, ...]:
    """What to say of weights in a folder that are not among its `weight_files`; an index that is damaged names none."""
    named = read_json(folder / "config.json").get(GUARD)
    aside = () if named is None or named == GUARD_WORDS else (f"{GUARD} of config.json is not followed",)
    try:
        shards = set(index_map(read_json(folder / INDEX), INDEX).values()) if (folder / INDEX).is_file() else set()
    except SourceError:
        shards = set()
    return (*aside, *unread_weights(folder, weight_files(folder), shards, INDEX))


def index_map(index: dict[str, Any], where: str) -> dict[str, str]:
    """The checked `weight_map` of an index: tensor name -> file name in the same folder."""
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise SourceError(f"{where}: has no weight_map; download it again")
    for tensor, file in names.items():
        plain = (
            isinstance(file, str)
            and file.endswith(".safetensors")
            and file == file.replace("\\", "/").split("/")[-1]
            and "\0" not in file
            and len(file.encode("utf-8", "replace")) < 256
        )
        if not plain:
            raise SourceError(
                f"{where}: puts tensor {shown(tensor)} into {shown(file)}, which is no safetensors file of this folder; "
                "download the model again"
            )
    return names
