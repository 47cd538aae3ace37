"""A local Hugging Face folder as a source: config.json and safetensors, in one file or in shards."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowbit.errors import OutputError
from lowbit.interchange.checks.tensors import check_layers
from lowbit.interchange.companions import companions_of, copy_companions
from lowbit.interchange.files.safetensors_reader import read_header, read_tensor, sampled
from lowbit.interchange.files.settings import generation_of, quantization_section, read_config
from lowbit.interchange.files.weights import entries_of, remarks_on, weight_files
from lowbit.interchange.hf.configs import write_tokenizer
from lowbit.interchange.hf.conversion import Conversion, plan_conversion
from lowbit.interchange.hf.loading import load_config, load_tokenizer
from lowbit.interchange.hf.models import meta_model
from lowbit.interchange.hf.section import as_float
from lowbit.interchange.hf.text_config import text_config
from lowbit.interchange.inventory import Inventory, Param, inventory_of
from lowbit.interchange.model_card import BaseFacts, facts_of_folder, repo_of_cache
from lowbit.interchange.readers.left_out import left_out
from lowbit.interchange.readers.quantized import Checkpoint, QuantizedWeight, quantized_checkpoint
from lowbit.interchange.readers.quantized_tensor import QuantizedTensor, tensor_of
from lowbit.interchange.source import Source
from lowbit.interchange.tensors import TensorSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def claims(model: Any) -> bool:
    """Whether `model` is the path of a folder."""
    return isinstance(model, (str, Path)) and Path(model).is_dir()


def open_model(model: Any, tokenizer: Any = None) -> Source:
    """Open the folder `model`: reads config.json and the safetensors headers."""
    return FolderSource(model, tokenizer=tokenizer)


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
        for part in (config, text_config(config)):
            part.tie_word_embeddings = False


class FolderSource(Source):
    """Weights read by byte range from the safetensors files of a folder, float or quantized by a program that is known."""

    def __init__(
        self, folder: str | Path, label: str | None = None, tokenizer: Any = None, repo: str | None = None
    ) -> None:
        """repo: the name of the model on the hub, where it is known."""
        self.folder, self._repo = Path(folder), repo
        self.label = label or str(folder)
        self._tokenizer = tokenizer
        section = quantization_section(self.folder)
        self.config = as_float(load_config(self.folder))
        self._headers = {file: read_header(file) for file in weight_files(self.folder)}
        self.remarks = remarks_on(self.folder)
        self._entries = entries_of(self.folder, self._headers)
        checkpoint = {n: TensorSpec(n, e.shape, e.dtype) for n, (_, e) in self._entries.items()}
        check_layers(read_config(self.folder), checkpoint, str(self.folder / "config.json"))
        model = meta_model(self.config, len(checkpoint))
        self._weights: Mapping[str, QuantizedWeight] = {}
        unused: tuple[str, ...] = ()
        if section is not None:
            packed = quantized_checkpoint(Checkpoint(section, checkpoint, self.label, self._raw), model)
            self._weights, self.storage, unused = packed.weights, packed.about, packed.unused
            checkpoint = packed.specs(checkpoint)
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

    def facts(self) -> BaseFacts:
        """By the folder's README.md, and its name on the hub where it is known or the folder lies in the hub's cache."""
        found = facts_of_folder(self.folder)
        return replace(found, base_model=self._repo or repo_of_cache(self.folder) or found.base_model)

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
        weight = self._weights.get(key)
        return self._raw(key) if weight is None else weight.read(self._raw)

    def _raw(self, key: str) -> torch.Tensor:
        file, entry = self._entries[key]
        return read_tensor(file, entry)

    def _same(self, a: str, b: str) -> bool:
        """Whether two checkpoint tensors hold the same bytes; reads both a few megabytes at a time."""
        if a in self._weights or b in self._weights:
            return torch.equal(self._part(a), self._part(b))
        (file_a, one), (file_b, two) = self._entries[a], self._entries[b]
        if (one.dtype, one.shape) != (two.dtype, two.shape) or not one.shape:
            return False
        step = max(1, (8 << 20) * one.shape[0] // max(one.nbytes, 1))
        chunks = (slice(i, i + step) for i in range(0, one.shape[0], step))
        return all(torch.equal(read_tensor(file_a, one, rows), read_tensor(file_b, two, rows)) for rows in chunks)
