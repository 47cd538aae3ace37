"""A local Hugging Face folder as a source: config.json and safetensors, in one file or in shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowbit.errors import OutputError, SourceError
from lowbit.interchange.checks.config import check_config
from lowbit.interchange.checks.rules import shown
from lowbit.interchange.checks.tensors import check_layers
from lowbit.interchange.checks.words import check_generation, check_tokenizer
from lowbit.interchange.companions import companions_of, copy_companions
from lowbit.interchange.files.safetensors_reader import Entry, read_header, read_tensor, sampled
from lowbit.interchange.hf.calls import asking, one_line
from lowbit.interchange.hf.configs import write_tokenizer
from lowbit.interchange.hf.conversion import Conversion, plan_conversion
from lowbit.interchange.hf.section import GUARD, GUARD_WORDS, SECTIONS, as_float, oriented
from lowbit.interchange.inventory import Inventory, Param, inventory_of, meta_model
from lowbit.interchange.readers.left_out import left_out, no_weights, unread_weights
from lowbit.interchange.readers.quantized import Checkpoint, QuantizedWeight, stored_model
from lowbit.interchange.readers.row_parts import QuantizedTensor, tensor_of
from lowbit.interchange.source import Source
from lowbit.interchange.tensors import TensorSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MOST_JSON = 256 << 20  # bytes; the largest index of shards has some


def claims(model: Any) -> bool:
    """Whether `model` is the path of a folder."""
    return isinstance(model, (str, Path)) and Path(model).is_dir()


def open_model(model: Any, tokenizer: Any = None) -> Source:
    """Open the folder `model`: reads config.json and the safetensors headers."""
    return FolderSource(model, tokenizer=tokenizer)


def quantization_section(folder: str | Path) -> dict[str, Any] | None:
    """What the folder's config.json says of quantization, None for a float model.

    SourceError when there is no readable config.json.
    """
    config = read_config(Path(folder))
    for holder in (config, config.get("text_config")):
        for key in SECTIONS if isinstance(holder, dict) else ():
            section = holder.get(key) if isinstance(holder, dict) else None
            if section:
                return section if isinstance(section, dict) else {}
    return None


def read_config(folder: Path) -> dict[str, Any]:
    """The checked config.json of a folder. SourceError that names the first field that makes no model."""
    config = read_json(folder / "config.json")
    check_config(config, str(folder / "config.json"))
    return config


def quantization_method(folder: str | Path) -> str | None:
    """The `quant_method` of a quantized folder, None for a float model. SourceError as in `quantization_section`."""
    section = quantization_section(folder)
    return None if section is None else str(section.get("quant_method") or "an unnamed method")


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


def generation_of(folder: Path) -> dict[str, Any]:
    """The generation_config.json of a folder, empty where there is none. SourceError where it is none."""
    file = folder / "generation_config.json"
    found = read_json(file) if file.is_file() else {}
    check_generation(found, str(file))
    return found


def load_config(folder: Path, **options: Any) -> PretrainedConfig:
    """The transformers config of a folder, never running code from it. SourceError when transformers refuses."""
    from transformers import AutoConfig, PretrainedConfig

    if "gguf_file" not in options:
        read_config(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
        if not isinstance(config.get_text_config(), PretrainedConfig):  # an object that the class knows nothing of
            raise TypeError(f"a {type(config).__name__} has no config of a text model inside it")
        return config
    except Exception as error:  # transformers raises many kinds for a bad config
        raise SourceError(
            f"{folder / options.get('gguf_file', '')}: transformers cannot use this config ({one_line(error)}); a model type that needs code from its "
            "folder is not supported, and a newer transformers may know a new one"
        ) from error


def load_tokenizer(folder: Path, label: str, **options: Any) -> Any:
    """The tokenizer of a folder. SourceError when there is none or it needs code from the folder."""
    from transformers import AutoTokenizer

    file = folder / "tokenizer_config.json"
    if "gguf_file" not in options and file.is_file():
        check_tokenizer(read_json(file), str(file))
    with asking(
        "transformers", label, "load a tokenizer from it", "put tokenizer.json into the folder or pass tokenizer=..."
    ):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)


def described(
    conversion: Conversion, inventory: Inventory, unknown: Mapping[str, TensorSpec] | None = None
) -> tuple[dict[str, TensorSpec], Inventory]:
    """Model tensors followed by the `unknown` ones of the checkpoint, and the inventory of exactly these."""
    unknown = unknown or {}
    tensors = {**conversion.specs, **unknown}
    params = {name: inventory.params[name] for name in conversion.specs}
    for name, spec in unknown.items():
        params[name] = Param(name, spec.shape, "other", keep="not known to the model")
    return tensors, replace(inventory, params=params)


def untie(config: PretrainedConfig, inventory: Inventory, untied: frozenset[str]) -> None:
    """Tell the config that nothing is tied, when the checkpoint holds every tied tensor with its own values."""
    if untied and not inventory.tied:
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False


class FolderSource(Source):
    """Weights read by byte range from the safetensors files of a folder, float or quantized by a program that is known."""

    def __init__(self, folder: str | Path, label: str | None = None, tokenizer: Any = None) -> None:
        self.folder = Path(folder)
        self.label = label or str(folder)
        self._tokenizer = tokenizer
        section = quantization_section(self.folder)
        self.config = as_float(load_config(self.folder))
        self._headers = {file: read_header(file) for file in weight_files(self.folder)}
        self.remarks = remarks_on(self.folder, list(self._headers))
        self._entries = _merge(self.folder, {f: h.entries for f, h in self._headers.items()})
        checkpoint = {n: TensorSpec(n, e.shape, e.dtype) for n, (_, e) in self._entries.items()}
        check_layers(read_config(self.folder), checkpoint, str(self.folder / "config.json"))
        model = meta_model(self.config, len(checkpoint))
        self._weights: Mapping[str, QuantizedWeight] = {}
        unused: tuple[str, ...] = ()
        if section is not None:
            stored = stored_model(Checkpoint(section, checkpoint, self.label, self._raw))
            stored = replace(stored, weights=oriented(stored.weights, model))
            self._weights, self.storage, unused = stored.weights, stored.about, stored.unused
            checkpoint = stored.specs(checkpoint)
        self._conversion = plan_conversion(model, checkpoint, self.label, same=self._same)
        inventory = inventory_of(model, self._conversion.untied)
        unknown = {name: checkpoint[name] for name in self._conversion.extra}
        self.tensors, self.inventory = described(self._conversion, inventory, unknown)
        self.extra, self.dropped = self._conversion.extra, (*self._conversion.dropped, *unused)
        kind = self.inventory.model_class
        self.left_out = left_out(self.dropped, self._stored_bytes, self.tensors, kind, self.config, frozenset(unused))
        untie(self.config, self.inventory, self._conversion.untied)

    def read(self, name: str) -> torch.Tensor:
        """One tensor in fresh memory."""
        self.spec(name)
        return self._part(name) if name in self.extra else self._conversion.read(name, self._part)

    def identity(self) -> dict[str, Any]:
        """Size, SHA-256 of the header and of 64 evenly spaced samples of each file, SHA-256 of config.json."""
        files = {
            file.name: {"size": header.file_bytes, "header": header.sha256, "samples": sampled(file)}
            for file, header in self._headers.items()
        }
        return {
            "config": hashlib.sha256((self.folder / "config.json").read_bytes()).hexdigest(),
            "files": files,
        }

    def save_assets(self, out: Path) -> None:
        """Copy what goes with the weights (`companions.py`); a tokenizer given at opening replaces its files."""
        try:
            copy_companions(self.folder, out)
            if self._tokenizer is not None:
                write_tokenizer(self._tokenizer, out)
        except OSError as error:
            raise OutputError(f"cannot copy the files of {self.label} to {out}: {error}") from error

    def left_files(self) -> tuple[str, ...]:
        """What `save_assets` leaves, a line for each reason."""
        return companions_of(self.folder).sentences()

    def generation(self) -> dict[str, Any]:
        """generation_config.json, where there is one."""
        return generation_of(self.folder)

    def tokenizer(self) -> Any:
        """The tokenizer given at opening, else the folder's."""
        return self._tokenizer if self._tokenizer is not None else load_tokenizer(self.folder, self.label)

    def stored_as(self, name: str) -> QuantizedTensor | None:
        """What a quantized folder stores of a tensor, None where it is float."""
        self.spec(name)
        if name in self.extra or not self._weights:
            return None
        parts, conversion = self._conversion.parts(name), self._conversion
        return tensor_of(
            lambda read: conversion.read(name, read), self._weights, parts, self._raw,
            self.inventory.params[name].transposed, conversion.only_renames(name),
        )  # fmt: skip

    def disk_bytes(self) -> int:
        """Bytes of the tensors as they are stored."""
        return sum(entry.nbytes for _, entry in self._entries.values())

    def _stored_bytes(self, key: str) -> int:
        """Bytes on disk of a tensor of the checkpoint as the float model would have it."""
        parts = self._weights[key].parts if key in self._weights else (key,)
        return sum(self._entries[part][1].nbytes for part in parts)

    def _part(self, key: str) -> torch.Tensor:
        """A tensor of the checkpoint as the float model would have it."""
        stored = self._weights.get(key)
        return self._raw(key) if stored is None else stored.read(self._raw)

    def _raw(self, key: str) -> torch.Tensor:
        file, entry = self._entries[key]
        return read_tensor(file, entry)

    def _same(self, a: str, b: str) -> bool:
        """Whether two checkpoint tensors hold the same bytes; reads both in pieces of a few megabytes."""
        if a in self._weights or b in self._weights:
            return torch.equal(self._part(a), self._part(b))
        (file_a, one), (file_b, two) = self._entries[a], self._entries[b]
        if (one.dtype, one.shape) != (two.dtype, two.shape) or not one.shape:
            return False
        step = max(1, (8 << 20) * one.shape[0] // max(one.nbytes, 1))
        pieces = (slice(i, i + step) for i in range(0, one.shape[0], step))
        return all(torch.equal(read_tensor(file_a, one, rows), read_tensor(file_b, two, rows)) for rows in pieces)


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


def remarks_on(folder: Path, read: list[Path]) -> tuple[str, ...]:
    """What to say of weights in a folder that are not among those `read`; an index that is damaged names none."""
    named = read_json(folder / "config.json").get(GUARD)
    aside = () if named is None or named == GUARD_WORDS else (f"{GUARD} of config.json is not followed",)
    try:
        shards = set(index_map(read_json(folder / INDEX), INDEX).values()) if (folder / INDEX).is_file() else set()
    except SourceError:
        shards = set()
    return (*aside, *unread_weights(folder, read, shards, INDEX))


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


def _merge(folder: Path, files: Mapping[Path, Mapping[str, Entry]]) -> dict[str, tuple[Path, Entry]]:
    """Checkpoint name -> (file, entry) over all shards, held against the index where there is one."""
    merged: dict[str, tuple[Path, Entry]] = {}
    for file, entries in files.items():
        for name, entry in entries.items():
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
