"""What an exporter of an export is: a program's format that can hold some models, and a writer of it.

An exporter is a class with `@exporter` above it, in a file or package of this folder. Its `check` is static: it sees names,
shapes, formats and the config, so that it can say no before a model is quantized. Its `write` streams from a folder
that lowbit wrote. Everything around them (temporary names, reading back, comparing) is `convert/exporting.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch

from lowbit.discovery import modules_of
from lowbit.errors import ExportError, nearest
from lowbit.formats import Format
from lowbit.interchange.exporters.common.cache_types import CacheTypes
from lowbit.interchange.exporters.common.kv_ranges import KVRanges
from lowbit.interchange.opening import open_source
from lowbit.interchange.progress import Progress
from lowbit.interchange.source import Source
from lowbit.interchange.tensors import Contents, TensorPlan

if TYPE_CHECKING:
    from lowbit.interchange.readers.lowbit_folder import LowbitFolder

# What is written of a quantized tensor: the same codes in another format, or its values in a float type.
Becomes: TypeAlias = Format | torch.dtype
KEPT = 1e-6  # how far a tensor that was not quantized may be: some formats store 1 + w, which float32 rounds


@dataclass(frozen=True)
class Problem:
    """Something that an exporter cannot hold.

    tensor   its name, empty for the model as a whole
    reason   why not
    nearest  what the exporter can hold in its place: the text of a format, or words
    shape    the format is one of the exporter's, but this tensor's shape is not for it; `quantize --as` then takes
             `nearest` by itself
    """

    tensor: str
    reason: str
    nearest: str = ""
    shape: bool = False


@dataclass(frozen=True)
class Mix:
    """Formats of a model as texts: of linear layers, of embeddings and heads, and of single tensors by name."""

    base: str
    embed: str
    layers: Mapping[str, str]


def as_written(t: TensorPlan, becomes: Becomes | None) -> TensorPlan:
    """A tensor as what it `becomes` is written; None: as it is."""
    if becomes is None:
        return t
    return replace(t, format=becomes) if isinstance(becomes, Format) else replace(t, format=None, dtype=becomes)


class Exporter(ABC):
    """A format of another program.

    name        what `--as` says
    also        other names that people know it by, in small letters: those of programs that read it
    summary     one line for people
    reader      who reads the result, for messages
    suffix      `.gguf` where one file is written, empty for a folder
    embed       text of the format (or `keep`) that `quantize --as` gives embeddings and heads where the recipe leaves it open
    recipes     name of a preset -> what it means for this exporter, where that is another recipe: without calibration
                text, and with it
    fuses       last words of the names of layers beside one another that get one format
    tolerance   how far a weight may be from ours when it is read back, |a - b| / |b|
    tags        what the hub calls such models, in the README of a folder
    loading     lines of code that load the folder `{folder}`, for its README; none where one file is written
    kv          what keys and values of the running model may be kept in with scales that the exporter holds, as `fp8`
    caches      how the program stores a KV cache when it is asked to; None where that is not known
    """

    name: ClassVar[str]
    also: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str]
    reader: ClassVar[str]
    suffix: ClassVar[str] = ""
    embed: ClassVar[str] = ""
    recipes: ClassVar[Mapping[str, tuple[str, str]]] = {}
    fuses: ClassVar[tuple[tuple[str, ...], ...]] = ()
    tolerance: ClassVar[float] = 0.0
    tags: ClassVar[tuple[str, ...]] = ()
    loading: ClassVar[str] = ""
    kv: ClassVar[tuple[str, ...]] = ()
    caches: ClassVar[CacheTypes | None] = None

    @abstractmethod
    def check(self, model: Contents) -> list[Problem]:
        """Everything that this exporter cannot hold of `model`; empty when it can hold it all."""

    def becomes(self, model: Contents) -> Mapping[str, Becomes]:
        """Name -> what is written of the tensors that `check` would refuse as they are, or that readers want otherwise: the
        same codes under another layout of scales, and of embeddings and heads 16-bit floats where no layout has their codes.
        """
        return {}

    def title(self, becomes: Becomes) -> str:
        """What people call the type that a tensor becomes."""
        return str(becomes).removeprefix("torch.")

    def bytes_of(self, t: TensorPlan) -> int:
        """Bytes that are written of a tensor as `becomes` leaves it."""
        return t.bytes_after

    @abstractmethod
    def write(self, model: LowbitFolder, out: Path, progress: Progress | None = None) -> None:
        """Write `model`, which `check` has passed, to `out`: a file or folder that does not exist yet.

        One tensor is in memory at a time. `progress(name, bytes done, bytes in all)`. OutputError or SourceError.
        """

    def allowed(self, t: TensorPlan) -> float:
        """How far this weight may be from ours when it is read back, |a - b| / |b|."""
        return max(KEPT, self.tolerance) if t.format is None else self.tolerance

    def logits_allowed(self, model: Contents) -> float:
        """How far the logits may be: both are float32 of weights that are compared already."""
        return 1e-3

    def notes(self, model: Contents) -> list[str]:
        """What people should know of the file or folder that `write` makes of `model`; empty when nothing is unexpected."""
        return []

    def check_tokenizer(self, tokenizer: Any, model: Contents) -> list[Problem]:
        """Why this exporter cannot hold the tokenizer; empty when it can, or does not look at it."""
        return []

    def check_kv(self, kind: str, model: Contents) -> list[Problem]:
        """Why this exporter cannot hold scales for a KV cache of `kind`, one of `kv`; empty when it can."""
        return []

    def with_kv(self, ranges: KVRanges) -> Exporter:
        """This exporter with a KV cache: a new one, whose `write` writes the scales. Only where `kv` has `ranges.kind`."""
        raise NotImplementedError(f"{self.name} says it has {', '.join(self.kv)} and no with_kv")

    def mix(self, name: str, model: Contents) -> Mix | None:
        """The formats that a name of this exporter's own world stands for, such as `q4_k_m`; None for an unknown one.

        Of `model` only names, shapes and the config count.
        """
        return None

    def candidates(self, model: Contents) -> tuple[str, ...]:
        """Texts of the formats that mixed precision chooses from, each of which every linear layer of `model` fits."""
        return ()

    def mixes(self) -> tuple[str, ...]:
        """The names that `mix` knows."""
        return ()

    def weight_bytes(self, model: Contents) -> int:
        """Bytes of the weights that `write` makes of `model`, which `check` has passed; a vocabulary beside them is not counted."""
        return sum(t.bytes_after for t in model.tensors.values())

    def reopen(self, out: Path, model: LowbitFolder) -> Source:
        """What was written, as a source of the same tensors, read by other code than wrote it where that exists."""
        return open_source(out)


_EXPORTERS: dict[str, Exporter] = {}


def exporter(kind: type[Exporter]) -> type[Exporter]:
    """Register an exporter under its name."""
    _EXPORTERS[kind.name] = kind()
    return kind


def exporters() -> dict[str, Exporter]:
    """Every exporter by name, in alphabetical order."""
    modules_of("lowbit.interchange.exporters")
    return dict(sorted(_EXPORTERS.items()))


def exporter_named(name: str) -> Exporter:
    """The exporter called `name`, in capitals or not, or after a program that reads what it writes. ExportError with the names that
    there are."""
    known = exporters()
    spoken = {other: kind for kind in known.values() for other in (kind.name, *kind.also)}
    if name.lower() not in spoken:
        raise ExportError(f"unknown target {name!r}{nearest(name, spoken)} (known: {', '.join(known)})")
    return spoken[name.lower()]
