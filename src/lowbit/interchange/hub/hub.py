"""A Hugging Face id as a source. The only package that uses the network, and only for a name like `org/name`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lowbit.errors import SourceError
from lowbit.interchange.checks.tensors import check_layers
from lowbit.interchange.companions import MODULES, NOT_FETCHED, READ_BY_TRANSFORMERS, module_weights
from lowbit.interchange.files.adapter import ADAPTER, refuse_adapter
from lowbit.interchange.files.safetensors_reader import DTYPES
from lowbit.interchange.files.safetensors_writer import INDEX
from lowbit.interchange.files.settings import quantization_section, quantized_by, read_config
from lowbit.interchange.files.weights import SINGLE
from lowbit.interchange.hf.conversion import plan_conversion
from lowbit.interchange.hf.loading import load_config, load_tokenizer
from lowbit.interchange.hf.models import meta_model
from lowbit.interchange.hf.section import CACHE_TABLES, as_float
from lowbit.interchange.hub.failures import explained, without_their_words
from lowbit.interchange.inventory import inventory_of
from lowbit.interchange.readers.folder import FolderSource, described
from lowbit.interchange.readers.left_out import left_out
from lowbit.interchange.readers.quantized import Checkpoint, QuantizedWeight, quantized_checkpoint, schemes
from lowbit.interchange.source import Source
from lowbit.interchange.tensors import TensorSpec

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SMALL = ("config.json", ADAPTER, MODULES, *READ_BY_TRANSFORMERS)
_WEIGHTS = (SINGLE, INDEX, "model-*.safetensors", CACHE_TABLES)
_NEVER = ("*.bin", "*.py", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack")


def claims(model: Any) -> bool:
    """Whether `model` looks like `org/name` and no local file or folder has this name."""
    if not isinstance(model, str) or Path(model).suffix in (".gguf", ".safetensors"):
        return False
    return _ID.fullmatch(model) is not None and not Path(model).exists()


def open_model(model: Any, tokenizer: Any = None) -> Source:
    """Download the snapshot of the id `model`, or take it from the cache, and open it as a folder."""
    small = snapshot(model, _SMALL)
    _refuse_unknown(small, model)  # before gigabytes are fetched for nothing
    snapshot(model, None, ignored=NOT_FETCHED)
    weights = (*_SMALL, *_WEIGHTS, *module_weights(small))
    return FolderSource(snapshot(model, weights), label=model, tokenizer=tokenizer, repo=model)


def open_headers(repo: str) -> Source:
    """Open `repo` for planning: config and headers over the network, or offline the snapshot in the cache."""
    try:
        return HubHeaders(repo)
    except SourceError:
        try:
            return FolderSource(snapshot(repo, (*_SMALL, *_WEIGHTS), local_files_only=True), label=repo)
        except SourceError:
            pass
        raise


def snapshot(
    repo: str, patterns: tuple[str, ...] | None, local_files_only: bool = False, ignored: tuple[str, ...] = _NEVER
) -> Path:
    """The local folder with the files of `repo` that match `patterns` (None: all) and none of `ignored`; never pickles or code."""
    from huggingface_hub import snapshot_download

    try:
        with without_their_words():
            return Path(
                snapshot_download(
                    repo,
                    allow_patterns=None if patterns is None else list(patterns),
                    ignore_patterns=list(ignored),
                    local_files_only=local_files_only,
                )
            )
    except Exception as error:
        raise explained(repo, error) from error


class HubHeaders(Source):
    """Config and safetensors headers of an id, fetched without the weights: enough to plan any model."""

    def __init__(self, repo: str) -> None:
        from huggingface_hub import get_safetensors_metadata
        from huggingface_hub.errors import NotASafetensorsRepoError

        self.label = repo
        self.folder = snapshot(repo, _SMALL)
        _refuse_unknown(self.folder, repo)
        self.config = as_float(load_config(self.folder))
        try:
            with without_their_words():
                found = get_safetensors_metadata(repo)
        except Exception as error:
            if isinstance(error, NotASafetensorsRepoError):
                refuse_adapter(self.folder, repo, always=True)
            raise explained(repo, error) from error
        checkpoint = {}
        for file, headers in sorted(found.files_metadata.items()):
            for name, info in headers.tensors.items():
                checkpoint[name] = _spec(name, info, f"{repo}/{file}")
        sizes = {name: spec.nbytes for name, spec in checkpoint.items()}
        self._disk_bytes = sum(sizes.values())
        check_layers(read_config(self.folder), checkpoint, f"{repo}/config.json")
        model = meta_model(self.config, len(checkpoint))
        section = quantization_section(self.folder)
        unused: tuple[str, ...] = ()
        weights: Mapping[str, QuantizedWeight] = {}
        if section is not None:
            packed = quantized_checkpoint(Checkpoint(section, checkpoint, repo), model)
            weights, self.storage, unused = packed.weights, packed.about, packed.unused
            checkpoint = packed.specs(checkpoint)
        # without the values, two names of a tied tensor are taken to hold the same ones
        conversion = plan_conversion(model, checkpoint, repo, same=lambda a, b: True)
        unknown = {name: checkpoint[name] for name in conversion.extra}
        self.tensors, self.inventory = described(conversion, inventory_of(model), unknown)
        self.extra, self.dropped = conversion.extra, (*conversion.dropped, *unused)

        def nbytes(name: str) -> int:
            return sum(sizes[part] for part in (weights[name].parts if name in weights else (name,)))

        kind = self.inventory.model_class
        self.left_out = left_out(self.dropped, nbytes, self.tensors, kind, self.config, frozenset(unused))

    def disk_bytes(self) -> int:
        """Bytes of the tensors as they are stored."""
        return self._disk_bytes

    def read(self, name: str) -> torch.Tensor:
        """Always a SourceError: only headers were fetched."""
        raise SourceError(f"{self.label}: only the headers were fetched, so tensor {name!r} has no values here")

    def identity(self) -> dict[str, Any]:
        """The commit that the config came from."""
        return {"repo": self.label, "commit": self.folder.name}

    def save_assets(self, out: Path) -> None:
        """Always a SourceError: a plan writes no model."""
        raise SourceError(f"{self.label}: only the headers were fetched; open the model itself to save it")

    def tokenizer(self) -> Any:
        """The tokenizer of the repository."""
        return load_tokenizer(self.folder, self.label)


def _spec(name: str, info: Any, where: str) -> TensorSpec:
    """A TensorSpec from what huggingface_hub read of a header."""
    dtype, shape = DTYPES.get(info.dtype), tuple(info.shape)
    if dtype is None or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise SourceError(
            f"{where}: tensor {name!r} has dtype {info.dtype!r} and shape {shape}, which is not known here"
        )
    return TensorSpec(name, shape, dtype)


def _refuse_unknown(folder: Path, repo: str) -> None:
    """SourceError for an adapter, and for a model that was quantized in a way that lowbit does not read."""
    refuse_adapter(folder, repo)
    method = quantized_by(folder)
    if method is not None and method not in schemes():
        raise SourceError(
            f"{repo} is already quantized with {method}, which lowbit cannot read (it reads {', '.join(schemes())}); "
            "give the original float model"
        )
