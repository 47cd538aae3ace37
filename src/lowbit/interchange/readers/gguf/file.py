"""A GGUF file as a source: config, tokenizer and weights in transformers naming, one tensor at a time.

transformers knows how llama.cpp renames, permutes and shifts the tensors of each architecture; its
rules are run here for one tensor instead of the whole file. Values come out as float32.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowbit.errors import OutputError, SourceError
from lowbit.interchange.checks.config import check_config
from lowbit.interchange.checks.gguf import check_gguf
from lowbit.interchange.end_tokens import ends_of_gguf
from lowbit.interchange.files.safetensors_reader import bytes_of, sampled
from lowbit.interchange.hf.calls import one_line
from lowbit.interchange.hf.configs import write_tokenizer
from lowbit.interchange.hf.conversion import plan_conversion
from lowbit.interchange.hf.gguf import gguf_rules
from lowbit.interchange.hf.loading import load_config, load_tokenizer
from lowbit.interchange.hf.models import meta_model, model_class
from lowbit.interchange.inventory import inventory_of
from lowbit.interchange.model_card import BaseFacts, facts_of_gguf
from lowbit.interchange.readers.folder import described, untie
from lowbit.interchange.readers.gguf.blocks import float_type, is_quantized, stored_weight, type_name
from lowbit.interchange.readers.gguf.config import completed
from lowbit.interchange.readers.gguf.rope import FACTOR_TENSORS
from lowbit.interchange.readers.gguf.splits import read_gguf
from lowbit.interchange.readers.left_out import BUFFERS, SEVERAL_TOKENS, left_out
from lowbit.interchange.readers.quantized import ReadPart
from lowbit.interchange.readers.quantized_tensor import QuantizedTensor, tensor_of
from lowbit.interchange.source import Source

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_CHUNK = 1 << 22  # values unpacked at a time; bounds the unpacker's own buffers


def claims(model: Any) -> bool:
    """Whether `model` is the path of a .gguf file."""
    return isinstance(model, (str, Path)) and Path(model).suffix == ".gguf" and Path(model).is_file()


def open_model(model: Any, tokenizer: Any = None) -> Source:
    """Open the .gguf file `model`: reads its metadata and tensor table."""
    return GgufSource(model, tokenizer=tokenizer)


class GgufSource(Source):
    """Weights read and unpacked from a GGUF file, or the files of a split model, by byte range.

    `config` replaces what transformers makes of the file's metadata, which does not have all of every model.
    """

    def __init__(
        self, path: str | Path, label: str | None = None, tokenizer: Any = None, config: PretrainedConfig | None = None,
        repo: str | None = None,
    ) -> None:  # fmt: skip
        """repo: the name on the hub of the model that the file holds, where it is known."""
        self.paths, header = read_gguf(Path(path))
        self.path = self.paths[0]
        self.label = label or str(path)
        self._tokenizer, self._repo = tokenizer, repo
        check_gguf(header.architecture, header.metadata, header.tensors, str(self.path))
        self._stored, self._metadata = header.tensors, header.metadata
        used: frozenset[str] = frozenset(FACTOR_TENSORS)
        if config is None:
            read = load_config(self.path.parent, gguf_file=self.path.name)
            config, used = completed(read, header, self._values, self.label)
        self.config = config
        check_config(self.config.to_dict(), f"{self.path}: what transformers makes of its metadata")
        self.config.architectures = [model_class(self.config).__name__]
        model = meta_model(self.config, len(self._stored))
        shapes = {name: tensor.shape for name, tensor in self._stored.items()}
        self._rules = gguf_rules(header.architecture, model, shapes, self.label)
        self._conversion = plan_conversion(model, self._rules.specs, self.label, transforms=self._rules.transforms)
        inventory = inventory_of(model, self._conversion.untied)
        self.tensors, self.inventory = described(self._conversion, inventory)
        self._weights = {
            t.name: stored_weight(t.name, t.ggml_type, t.shape)
            for t in self._stored.values()
            if is_quantized(t.ggml_type)
        }
        kinds = sorted({type_name(t.ggml_type) for t in self._stored.values() if len(t.shape) > 1})
        self.storage = f"gguf, {' and '.join(kinds)}"
        lost = [name for name in (*self._rules.unused, *self._conversion.extra) if name not in used]
        sizes = {tensor.name: tensor.nbytes for tensor in self._stored.values()}
        self.dropped = (*lost, *self._conversion.dropped)
        self.left_out = left_out(
            self.dropped, lambda n: sizes.get(n, 0), self.tensors, self.inventory.model_class, self.config
        )
        harmless = {name for each in self.left_out if each.why in (SEVERAL_TOKENS, BUFFERS) for name in each.members}
        lost = [name for name in lost if name not in harmless]
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise SourceError(
                f"{self.label}: its tensor {lost[0]!r}{more} has no place in transformers' {type(model).__name__}, and without "
                "it this would be another model; use the model's original safetensors folder"
            )
        untie(self.config, self.inventory, self._conversion.untied)

    def read(self, name: str) -> torch.Tensor:
        """One tensor as float32 in fresh memory."""
        self.spec(name)
        return self._conversion.read(name, lambda part: self._rules.part(part, self._values))

    def stored_as(self, name: str) -> QuantizedTensor | None:
        """A quantized tensor with the integers and scales of its blocks in the file, None where it is float."""
        self.spec(name)

        def rules(read: ReadPart) -> torch.Tensor:
            return self._conversion.read(name, lambda part: self._rules.part(part, read))

        parts = [file for part in self._conversion.parts(name) for file in self._rules.files[part]]
        transposed = self.inventory.params[name].transposed
        return tensor_of(rules, self._weights, parts, self._raw, transposed, renamed=False)

    def float_type(self, name: str) -> torch.dtype:
        """The type of a float tensor in the file, where all that it is made of have the same."""
        files = [file for part in self._conversion.parts(name) for file in self._rules.files[part]]
        types = {float_type(self._stored[file].ggml_type) for file in files}
        return types.pop() if len(types) == 1 else torch.float32

    def identity(self) -> dict[str, Any]:
        """Of each file: size, SHA-256 of everything before the weights and of 64 evenly spaced samples."""
        return {"files": {path.name: self._identity(path) for path in self.paths}}

    def _identity(self, path: Path) -> dict[str, Any]:
        size = path.stat().st_size
        start = min((t.offset for t in self._stored.values() if t.path == path), default=size)
        with path.open("rb") as file:
            header = hashlib.sha256(file.read(start)).hexdigest()
        return {"size": size, "header": header, "samples": sampled(path)}

    def disk_bytes(self) -> int:
        """Size of the file, or of all its parts."""
        return sum(path.stat().st_size for path in self.paths)

    def save_assets(self, out: Path) -> None:
        """Write the tokenizer that the file holds, its chat template, and the special tokens for generation."""
        from transformers import GenerationConfig

        tokenizer = self.tokenizer()
        try:
            write_tokenizer(tokenizer, out)
            ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "pad_token_id")}
            GenerationConfig(**ids, **self.generation()).save_pretrained(out)
        except OSError as error:
            raise OutputError(f"cannot write the tokenizer of {self.label} to {out}: {error}") from error

    def facts(self) -> BaseFacts:
        """By the file's metadata, and the name on the hub that was given."""
        found = facts_of_gguf(self._metadata)
        return replace(found, base_model=self._repo or found.base_model)

    def generation(self) -> dict[str, Any]:
        """The tokens that end a text, as llama.cpp takes them from the file: one id, or a list that begins with eos."""
        try:
            words = self.tokenizer()
        except SourceError:
            return {}
        first, size = words.eos_token_id, self.config.get_text_config().vocab_size  # type: ignore[union-attr]
        ends = ends_of_gguf(self._metadata, words.get_vocab()) | ({first} if isinstance(first, int) else set())
        found = sorted((i for i in ends if i < size), key=lambda i: (i != first, i))
        return {"eos_token_id": found[0] if len(found) == 1 else found} if found else {"eos_token_id": None}

    def tokenizer(self) -> Any:
        """The tokenizer given at opening, else the one in the file, which is read once."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.path.parent, self.label, gguf_file=self.path.name)
        return self._tokenizer

    def _raw(self, name: str) -> torch.Tensor:
        """The bytes of a tensor: uint8 [rows, bytes of a row]."""
        stored = self._stored[name]
        rows = prod(stored.shape[:-1])
        data = torch.empty((rows, stored.nbytes // max(rows, 1)), dtype=torch.uint8)
        try:
            with stored.path.open("rb") as file:
                file.seek(stored.offset)
                if file.readinto(bytes_of(data)) != data.numel():
                    raise SourceError(f"{self.label}: the file ends inside tensor {name!r}; download it again")
        except OSError as error:
            raise SourceError(f"{self.label}: cannot read tensor {name!r}: {one_line(error)}") from error
        return data

    def _values(self, name: str) -> torch.Tensor:
        """The tensor `name` of the file as float32, in the layout of the file."""
        import numpy as np
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        stored = self._stored[name]
        columns = stored.shape[-1] if stored.shape else 1
        rows = prod(stored.shape) // max(columns, 1)
        values: Any = np.empty((rows, columns), dtype=np.float32)
        step = max(1, _CHUNK // max(columns, 1))
        row_bytes = stored.nbytes // max(rows, 1)
        try:
            with stored.path.open("rb") as file:
                file.seek(stored.offset)
                for first in range(0, rows, step):
                    count = min(step, rows - first)
                    raw = np.frombuffer(file.read(count * row_bytes), dtype=np.uint8).reshape(count, row_bytes)
                    values[first : first + count] = dequantize(raw, GGMLQuantizationType(stored.ggml_type))
        except (OSError, ValueError, NotImplementedError) as error:
            raise SourceError(
                f"{self.label}: cannot read tensor {name!r}: {one_line(error)}; download the file again"
            ) from error
        return torch.from_numpy(values).reshape(stored.shape)
