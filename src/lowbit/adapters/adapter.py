"""One adapter on the disk: its settings, and which tensors of its file change which module."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.adapters.config import AdapterConfig, check_patterns, read_adapter_config
from lowbit.errors import SourceError, WeightError
from lowbit.interchange.companions import READ_BY_TRANSFORMERS
from lowbit.interchange.files.adapter import ADAPTER
from lowbit.interchange.files.safetensors_reader import Entry, Header, read_header, read_tensor, sampled
from lowbit.interchange.hub import hub

WEIGHTS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.(weight|bias)")
_EMBEDDING = re.compile(r"(.+)\.lora_embedding_([AB])(?:\.default)?")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?")
_KEPT = re.compile(r"(.+?)\.(?:base_layer|modules_to_save(?:\.default)?)\.(.+)")
_PACKED = re.compile(r".+\.base_layer\.weight\..+")
_FOREIGN = re.compile(r"lora_|\.(?:token_adapter|original_module|base_layer|modules_to_save)\b|_adapter\.")


@dataclass(frozen=True)
class LowRank:
    """The product s B A that is added to the weight of one module, and what stands beside it; sizes only, no value.

    a, b         A [r, in] and B [out, r]; of an embedding A [r, count] and B [width, r], which add (B A)^T
    scaling      s
    embedding    whether they are of an embedding
    magnitude    m [out] of DoRA: the rows of the sum take these lengths
    bias         [out], times s, added to the bias of the module
    """

    a: Entry
    b: Entry
    scaling: float
    embedding: bool = False
    magnitude: Entry | None = None
    bias: Entry | None = None

    @property
    def rank(self) -> int:
        """The rank r of the product."""
        return self.a.shape[0]


@dataclass(frozen=True)
class Adapter:
    """An adapter of PEFT in a folder: `products` by module, and `replaced` tensors by name, both as the trained model called them."""

    label: str
    folder: Path
    config: AdapterConfig
    header: Header
    products: Mapping[str, LowRank] = field(default_factory=dict)
    replaced: Mapping[str, Entry] = field(default_factory=dict)

    def value(self, entry: Entry) -> Tensor:
        """A tensor of the adapter in float64. WeightError where it is not finite."""
        found = read_tensor(self.folder / WEIGHTS, entry).double()
        if not bool(torch.isfinite(found).all()):
            raise WeightError(
                f"{self.label}: tensor {entry.name!r} of the adapter holds NaN or infinity; train or save it again"
            )
        return found

    def identity(self) -> dict[str, Any]:
        """A fingerprint for JSON: size, header and samples of the weights, and a hash of the settings. No path."""
        return {
            "config": hashlib.sha256((self.folder / ADAPTER).read_bytes()).hexdigest(),
            "size": self.header.file_bytes, "header": self.header.sha256, "samples": sampled(self.folder / WEIGHTS),
        }  # fmt: skip

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer was saved beside it, which then has the chat template that it was trained with."""
        return any((self.folder / name).is_file() for name in _TOKENIZER)

    @property
    def name(self) -> str:
        """The last part of what it was called by."""
        return Path(self.label.rstrip("/")).name or "adapter"

    def about(self) -> str:
        """One line for people, without paths."""
        ranks = sorted({product.rank for product in self.products.values()})
        rank = "" if not ranks else f", rank {ranks[0]}" if len(ranks) == 1 else f", ranks {ranks[0]} to {ranks[-1]}"
        base = "" if self.config.base is None else f", trained on {_without_path(self.config.base)}"
        return f"{self.name} ({'DoRA' if self.config.dora else 'LoRA'}{rank}{base})"


def open_adapter(folder: str | Path) -> Adapter:
    """Read the settings and the header of an adapter, a folder or an id on the hub; no value. SourceError for what is no adapter, or none that lowbit
    computes."""
    path, label = Path(folder), str(folder)
    if hub.claims(folder):
        path = hub.snapshot(label, (ADAPTER, WEIGHTS, *READ_BY_TRANSFORMERS))
    if not path.is_dir():
        raise SourceError(
            f"there is no folder {label!r}; an adapter is a folder with {ADAPTER} and {WEIGHTS}, as save_pretrained of peft writes"
        )
    config = read_adapter_config(path, label)
    if not (path / WEIGHTS).is_file():
        if (path / _PICKLED).is_file():
            raise SourceError(
                f"{label} has its weights in {_PICKLED}, a pickle, which can run any code and is not read; load the adapter in a place that you "
                "trust and save it again: save_pretrained of peft writes safetensors"
            )
        raise SourceError(f"{label} has no {WEIGHTS}; save the adapter again, or copy the whole folder")
    header = read_header(path / WEIGHTS)
    products, replaced = _sorted(header.entries, config, label)
    if not products and not replaced:
        raise SourceError(f"{label}: {WEIGHTS} has no tensor, so the adapter changes nothing; save it again")
    return Adapter(label, path, config, header, products, replaced)


def _sorted(
    entries: Mapping[str, Entry], config: AdapterConfig, label: str
) -> tuple[dict[str, LowRank], dict[str, Entry]]:
    """Products by module and replaced tensors by name. SourceError for tensors that are neither."""
    factors: dict[str, dict[str, Entry]] = {}
    replaced: dict[str, Entry] = {}
    for key, entry in entries.items():
        if _PACKED.fullmatch(key.removeprefix(_PREFIX)):
            continue  # the frozen weight of the base, which peft saves beside an adapter of an embedding
        if entry.dtype not in _FLOATS:
            raise SourceError(
                f"{label}: tensor {key!r} is {entry.dtype}, and adapters are floats; save the adapter again"
            )
        name = key.removeprefix(_PREFIX)
        if found := _FACTOR.fullmatch(name):
            _put(
                factors.setdefault(found[1], {}), found[2] if found[3] == "weight" else f"{found[2]} bias", entry, label
            )
        elif found := _EMBEDDING.fullmatch(name):
            _put(factors.setdefault(found[1], {}), f"embedding {found[2]}", entry, label)
        elif found := _MAGNITUDE.fullmatch(name):
            _put(factors.setdefault(found[1], {}), "magnitude", entry, label)
        else:
            kept = _KEPT.fullmatch(name)
            plain = f"{kept[1]}.{kept[2]}" if kept else name
            if _FOREIGN.search(plain):
                raise SourceError(f"{label}: lowbit does not know what the tensor {key!r} of an adapter does; {_MERGE}")
            _put(replaced, plain, entry, label)
    check_patterns(config, factors, label)
    return {module: _product(module, parts, config, label) for module, parts in factors.items()}, replaced


_MERGE = "merge it with merge_and_unload of peft, and quantize the result"


def _put(into: dict[str, Entry], key: str, entry: Entry, label: str) -> None:
    if key in into:
        raise SourceError(
            f"{label}: tensors {into[key].name!r} and {entry.name!r} mean the same; save the adapter again"
        )
    into[key] = entry


def _product(module: str, parts: Mapping[str, Entry], config: AdapterConfig, label: str) -> LowRank:
    """The product of one module, its sizes checked against each other and against the settings."""
    embedding = "embedding A" in parts or "embedding B" in parts
    keys = ("embedding A", "embedding B") if embedding else ("A", "B")
    for key in keys:
        if key not in parts:
            raise SourceError(
                f"{label}: {module!r} has no lora_{key.replace(' ', '_')}; save the adapter again, or copy the whole file"
            )
    a, b, others = parts[keys[0]], parts[keys[1]], set(parts) - {*keys, "magnitude", "B bias"}
    if others:
        raise SourceError(
            f"{label}: lowbit does not know what the tensor {parts[min(others)].name!r} of an adapter does; {_MERGE}"
        )
    for entry in (a, b):
        if len(entry.shape) != 2:
            what = "of a convolution, which lowbit does not merge" if len(entry.shape) > 2 else "no matrix"
            raise SourceError(
                f"{label}: tensor {entry.name!r} of the adapter has the shape {list(entry.shape)}, and is {what}; {_MERGE}"
            )
    rank = config.rank_of(module)
    if a.shape[0] != rank or b.shape[1] != rank:
        raise SourceError(
            f"{label}: {module!r} has factors {list(a.shape)} and {list(b.shape)}, and the settings say rank {rank}; save the adapter again"
        )
    magnitude, bias = parts.get("magnitude"), parts.get("B bias")
    if embedding and (magnitude is not None or bias is not None):
        raise SourceError(
            f"{label}: {module!r} is an embedding with DoRA or a bias, which lowbit does not merge; {_MERGE}"
        )
    if config.dora != (magnitude is not None):
        has = (
            "has a magnitude, and the settings say use_dora=false"
            if not config.dora
            else "has no magnitude, and the settings say use_dora=true"
        )
        if not (config.dora and embedding):
            raise SourceError(f"{label}: {module!r} {has}; save the adapter again")
        raise SourceError(f"{label}: {module!r} is an embedding with DoRA, which lowbit does not merge; {_MERGE}")
    for vector in (magnitude, bias):
        if vector is not None and vector.shape != (b.shape[0],):
            raise SourceError(
                f"{label}: tensor {vector.name!r} of the adapter has the shape {list(vector.shape)}, and it must be {[b.shape[0]]}; save the adapter again"
            )
    return LowRank(a, b, config.scaling(module), embedding, magnitude, bias)


def _without_path(name: str) -> str:
    """A name of the hub as it is, and of a path its last part, in characters that a line can have."""
    plain = name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else re.split(r"[\\/]", name.rstrip("\\/"))[-1]
    return re.sub(r"[^\w./+-]", "?", plain, flags=re.ASCII)[:96]
