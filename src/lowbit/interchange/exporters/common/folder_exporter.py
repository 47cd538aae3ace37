"""Targets that are transformers folders: config.json, safetensors, tokenizer. A format fills in what is its own."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit.errors import ExportError, OutputError
from lowbit.formats import Format, QTensor, parse_format
from lowbit.interchange.exporters.common.fused import FUSED, experts_of, fused_with
from lowbit.interchange.exporters.common.published_experts import PublishedFolder, published
from lowbit.interchange.exporters.common.read_back import levels_of, tensors_of
from lowbit.interchange.exporters.common.relayout import blocks_within, can_be, with_block
from lowbit.interchange.exporters.exporter import Becomes, Exporter, Problem
from lowbit.interchange.files.safetensors_reader import bytes_of
from lowbit.interchange.files.safetensors_writer import INDEX, create, index_bytes, index_json, shards_of
from lowbit.interchange.hf.configs import write_config
from lowbit.interchange.opening import open_source
from lowbit.interchange.progress import Progress
from lowbit.interchange.source import Source
from lowbit.interchange.tensors import Contents, Specs, TensorPlan

if TYPE_CHECKING:
    from lowbit.interchange.readers.lowbit_folder import LowbitFolder

_MAX_SHARD = 5_000_000_000
_TABLES = ("embedding", "head")
_SIZES = (1024, 512, 256, 128, 64, 32, 16)  # of groups that any reader has
_LOGITS = 3e-2


class FolderExporter(Exporter):
    """Embeddings and heads become 16-bit floats, as programs that serve want them; kept tensors stay as they are."""

    experts_note = ""  # for a folder with packed experts
    embed = "keep"
    fuses = tuple(parts for _, parts in FUSED)
    mixed: tuple[str, ...] = ()  # formats that mixed precision chooses from, where they fit the widths

    @abstractmethod
    def problem(self, layer: TensorPlan) -> Problem | None:
        """Why a quantized linear layer cannot be held, or None."""

    @abstractmethod
    def spec(self, layer: TensorPlan) -> Specs:
        """Names after the module's -> (dtype, shape) of what is written for a linear layer."""

    @abstractmethod
    def pack(self, layer: TensorPlan, q: QTensor, model: PublishedFolder) -> dict[str, Tensor]:
        """What `spec` announces, of the weight `q`; `model` is asked for what belongs to its inputs."""

    def extra_tensors(self, model: Contents) -> dict[str, Tensor]:
        """Small tensors that are of no weight, under the names that are written."""
        return {}

    @abstractmethod
    def section(self, model: Contents) -> dict[str, Any]:
        """`quantization_config` of config.json."""

    def problem_of_transposed(self, layer: TensorPlan) -> Problem | None:
        """Why a layer that its module keeps as [in, out] cannot be held [out, in], as all are stored here, or None."""
        return None

    def alike(self, parts: list[TensorPlan]) -> Problem | None:
        """Why layers that the reader runs as one cannot be stored so, or None."""
        first = parts[0]
        for other in parts[1:]:
            if (_plain(other), other.inputs) != (_plain(first), first.inputs):
                names = ", ".join(dict.fromkeys(module_of(p.name).rpartition(".")[2] for p in parts))
                return Problem(
                    other.name,
                    f"{self.reader} runs {names} as one layer, which cannot be stored as {described(other)} and {described(first)}",
                    _more_precise(first, other),
                )
        return None

    def candidates(self, model: Contents) -> tuple[str, ...]:
        linear = [
            t for t in published(model).contents.tensors.values() if t.kind == "linear" and len(t.stored_shape) == 2
        ]
        return tuple(
            f for f in self.mixed if all(self.problem(replace(t, format=parse_format(f))) is None for t in linear)
        )

    def check(self, model: Contents) -> list[Problem]:
        found = published(model)
        return [*found.problems, *found.of_wholes(self.problems(found.contents))]

    def problems(self, model: Contents) -> list[Problem]:
        """What is wrong with a model under its published names, experts apart."""
        found = []
        if model.config is None:
            found.append(Problem("", "is a plain module, and a folder of transformers needs a model with a config", ""))
        if not any(is_packed(t) for t in model.tensors.values()):
            found.append(Problem("", "has no quantized linear layer", ""))
        for t in model.tensors.values():
            problem = self._problem(t)
            if problem is not None:
                found.append(problem)
        if not any(not p.shape for p in found):  # parts of one layer are compared once each of them can be held
            odd = {p.tensor: p for p in found}
            for parts in self._fused(model):
                found += _with_their(parts, odd) or ([] if (p := self.alike(parts)) is None else [p])
        return found

    def _problem(self, t: TensorPlan) -> Problem | None:
        if t.format is None or t.kind in _TABLES:
            return None
        problem = self.problem(t)
        return self.problem_of_transposed(t) if problem is None and t.kind == "conv1d" else problem

    def becomes(self, model: Contents) -> Mapping[str, Becomes]:
        """Layers in groups that the reader has, embeddings and heads as 16-bit floats."""
        found: dict[str, Becomes] = {}
        for name, t in model.tensors.items():
            if t.format is not None and t.kind in _TABLES:
                found[name] = table_dtype(t)
            elif is_packed(t) and self._problem(t) is not None:
                fitting = self.layouts(t)
                if fitting:
                    found[name] = fitting[0]
        return found

    def layouts(self, layer: TensorPlan) -> list[Format]:
        """The formats that have the codes of a layer and that the reader has, the one of the largest groups first."""
        fmt, shape = layer.format, layer.stored_shape
        assert fmt is not None
        found = [with_block(fmt, block) for block in blocks_within(fmt, shape, _SIZES)]
        return [f for f in found if can_be(fmt, f, shape) and self._problem(replace(layer, format=f)) is None]

    def bytes_of(self, t: TensorPlan) -> int:
        if t.kind == "experts":
            return t.bytes_after
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self._written(t).values())

    @staticmethod
    def _fused(model: Contents) -> Iterator[list[TensorPlan]]:
        linear = {module_of(t.name): t for t in model.tensors.values() if t.kind == "linear"}
        for modules in fused_with(linear):
            yield [linear[module] for module in modules]

    def allowed(self, t: TensorPlan) -> float:
        if t.format is None:
            return 0.0
        return self.tolerance

    def logits_allowed(self, model: Contents) -> float:
        rounded = any(self.allowed(t) > 0 for t in model.tensors.values())
        return _LOGITS if rounded else super().logits_allowed(model)

    def notes(self, model: Contents) -> list[str]:
        notes = []
        if any(is_packed(t) and t.kind == "conv1d" for t in model.tensors.values()):
            notes.append(
                "for vLLM: transformers does not load layers whose modules keep [in, out] (Conv1D) in this format"
            )
        if self.experts_note and any(t.kind == "experts" and t.format is not None for t in model.tensors.values()):
            notes.append(self.experts_note)
        return notes

    def weight_bytes(self, model: Contents) -> int:
        """Exact bytes of the weight files, headers and the index of shards included."""
        contents = published(model).contents
        shards = shards_of([(t.name, self._written(t)) for t in contents.tensors.values()], _MAX_SHARD)
        return sum(shard.file_bytes for shard in shards) + index_bytes(shards)

    def reopen(self, out: Path, model: LowbitFolder) -> Source:
        """What was written, its inputs and extra tensors compared already. ExportError where those come back changed."""
        source = open_source(out)
        expected = self.extra_tensors(published(model.contents).contents)
        found = tensors_of(out, set(expected))
        for name, tensor in expected.items():
            if name not in found or not torch.equal(found[name], tensor):
                raise ExportError(
                    f"{out.name}: {name!r} is not read back as it was written; nothing was kept of the export"
                )
        for t in filter(is_packed, model.contents.tensors.values()):
            read = source.stored_as(t.name)
            theirs = None if read is None or read.inputs is None else levels_of(read.inputs, read.input_parts())
            ours = None if t.inputs is None else levels_of(t.inputs, model.read_inputs(t.name))
            if theirs != ours:
                raise ExportError(
                    f"{out.name}: the inputs of {t.name!r} come back as {theirs}, not as {ours}; nothing was kept "
                    "of the export"
                )
        return source

    def write(self, model: LowbitFolder, out: Path, progress: Progress | None = None) -> None:
        """A folder of shards, config.json and the tokenizer's files. ExportError when a value does not fit."""
        folder = PublishedFolder(model)
        contents = folder.contents
        extra = self.extra_tensors(contents)
        specs = {t.name: self._written(t) for t in contents.tensors.values()}
        specs |= {name: {name: (tensor.dtype, tuple(tensor.shape))} for name, tensor in extra.items()}
        shards = shards_of(specs.items(), _MAX_SHARD)
        place = {name: shard for shard in shards for name in shard.spans}
        total, done = sum(end - begin for shard in shards for begin, end in shard.spans.values()), 0
        try:
            out.mkdir(parents=True)
            create(out, shards)
            parts: list[tuple[str, Callable[[], dict[str, Tensor]]]]
            parts = [(t.name, partial(self._tensors, t, folder)) for t in contents.tensors.values()]
            parts += [(name, partial(dict, {name: tensor})) for name, tensor in extra.items()]
            for whole, make in parts:
                if progress is not None:
                    progress(whole, done, total)
                tensors = make()
                for name, tensor in tensors.items():
                    begin, end = place[name].spans[name]
                    raw = bytes_of(tensor.contiguous())
                    assert len(raw) == end - begin and tensor.dtype == specs[whole][name][0], name
                    with (out / place[name].file).open("r+b") as file:
                        file.seek(begin)
                        file.write(raw)
                    done += len(raw)
                if progress is not None:
                    progress(whole, done, total)
            if len(shards) > 1:
                (out / INDEX).write_bytes(index_json(shards))
            config: Any = copy.deepcopy(contents.config)
            config.quantization_config = self.section(contents)
            write_config(config, out)
            model.save_assets(out)
        except OSError as error:
            raise OutputError(
                f"cannot write {out}: {error.strerror or error}; check the path and its permissions"
            ) from error

    def _written(self, t: TensorPlan) -> Specs:
        if t.format is None:
            return {t.name: (t.dtype, t.stored_shape)}
        return {f"{module_of(t.name)}.{part}": spec for part, spec in self.spec(t).items()}

    def _tensors(self, t: TensorPlan, model: PublishedFolder) -> dict[str, Tensor]:
        tensor = model.read(t.name)
        if not isinstance(tensor, QTensor):
            return {t.name: tensor}
        packed = self.pack(t, tensor, model)
        return {f"{module_of(t.name)}.{part}": value for part, value in packed.items()}


def _with_their(parts: list[TensorPlan], odd: Mapping[str, Problem]) -> list[Problem]:
    """Where the shape of one part is not for its format, the others take the nearest format with it."""
    first = next((odd[p.name] for p in parts if p.name in odd), None)
    if first is None:
        return []
    reason = f"is run as one layer with {module_of(first.tensor).rpartition('.')[2]}, which {first.reason}"
    return [Problem(p.name, reason, first.nearest, shape=True) for p in parts if p.name not in odd]


def module_of(name: str) -> str:
    """The module that a weight belongs to."""
    return name.removesuffix(".weight")


def is_packed(t: TensorPlan) -> bool:
    """Whether a tensor is a linear layer that is written in few bits."""
    return t.format is not None and t.kind in ("linear", "conv1d")


def float_modules(model: Contents) -> list[str]:
    """The linear layers that are written as floats, heads and routers included; experts of a layer by one name."""
    kept = [
        t.name
        for t in model.tensors.values()
        if (t.kind in ("linear", "conv1d", "head") and not is_packed(t)) or is_router(t)
    ]
    tied = [a for a, n in model.tied.items() if n in model.tensors and model.tensors[n].kind in (*_TABLES, "linear")]
    embeddings = {module_of(t.name) for t in model.tensors.values() if t.kind == "embedding"}
    modules = [experts_of(m) or m for m in map(module_of, [*kept, *tied]) if m not in embeddings]
    return list(dict.fromkeys(modules))


def is_router(t: TensorPlan) -> bool:
    """Whether a kept tensor is a matrix that is no layer's to transformers and may be one to servers, as routers are."""
    return t.kind == "other" and len(t.stored_shape) == 2 and t.name.endswith(".weight")


def table_dtype(t: TensorPlan) -> torch.dtype:
    """The 16-bit type that an embedding or head is written in: the model's own, float16 where that is wider."""
    return t.dtype if t.dtype.itemsize == 2 else torch.float16


def described(t: TensorPlan) -> str:
    """A layer's format and inputs as a recipe writes them."""
    text = "float" if t.format is None else str(t.format)
    return text if t.inputs is None else f"{text} with a={t.inputs}"


def _plain(t: TensorPlan) -> Format | None:
    """The format without its exponent, which is part of the scales that are written."""
    return None if t.format is None else t.format.plain


def _more_precise(one: TensorPlan, two: TensorPlan) -> str:
    """The format text of the layer that takes more bits, for both."""
    if one.format is None or two.format is None:
        return "keep"
    bits = {str(s.format): s.format.bits_per_weight(s.shape) for s in (one, two) if s.format is not None}
    return max(bits, key=lambda text: bits[text])
