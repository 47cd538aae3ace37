"""The exporter `gguf`."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import torch

from lowbit.errors import OutputError, SourceError
from lowbit.interchange.exporters.common.cache_types import LLAMA_CPP, CacheTypes
from lowbit.interchange.exporters.common.published_experts import published
from lowbit.interchange.exporters.exporter import Becomes, Exporter, Mix, Problem, exporter
from lowbit.interchange.exporters.gguf import metadata, rope, vocabulary
from lowbit.interchange.exporters.gguf.layout import Placed, bytes_in_file, names_in_file, place
from lowbit.interchange.exporters.gguf.metadata import family_of, gguf_of
from lowbit.interchange.exporters.gguf.mixes import MIXES, layer_types
from lowbit.interchange.exporters.gguf.reading import Reread
from lowbit.interchange.exporters.gguf.types import nearest_type, text_of, type_of, type_with_codes
from lowbit.interchange.progress import Progress
from lowbit.interchange.readers.gguf.file import GgufSource
from lowbit.interchange.readers.lowbit_folder import LowbitFolder
from lowbit.interchange.source import Source
from lowbit.interchange.tensors import Contents, TensorPlan

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
KEEP = "keep"


@exporter
class Gguf(Exporter):
    """One file in GGUF version 3: our codes in ggml's block types, vocabulary and chat template included."""

    name: ClassVar[str] = "gguf"
    also = ("llama.cpp", "ollama")
    summary: ClassVar[str] = "one file for llama.cpp, Ollama and others built on ggml"
    reader: ClassVar[str] = "llama.cpp"
    caches: ClassVar[CacheTypes] = LLAMA_CPP
    suffix: ClassVar[str] = ".gguf"
    embed: ClassVar[str] = "q8_0"
    recipes: ClassVar[dict[str, tuple[str, str]]] = {
        "w8": ("search@q8_0", "search@q8_0"),
        "w4": ("search@iq4_nl", "qronos@iq4_nl"),
        "w3": ("search@q3_k", "qronos@q3_k"),
        "w2": ("search@q2_k", "qronos@q2_k"),
    }

    def check(self, model: Contents) -> list[Problem]:
        """The family, each tensor's name, format and width, and that no input is in few bits."""
        family = family_of(model.config)
        if family is None or model.config is None:
            has = getattr(model.config, "architectures", None) or ["a module without a config"]
            return [Problem("", f"{has[0]} is not among the models that can be written", metadata.known_classes())]
        why = metadata.refusal(family, model.config.get_text_config())
        problems = [] if why is None else [Problem("", why)]
        known = gguf_of(family)
        if known.tied and not model.tied:
            problems.append(Problem("", f"llama.cpp's {known.architecture} always uses the embedding as its head"))
        whole = {p.tensor: p for p in published(model).problems}
        for name, there in names_in_file(family, model).items():
            t = model.tensors[name]
            if name in whole:
                problems += _problems(t) or [whole[name]]  # of a width that the type is not for, that is said
            elif there is None or not known.reads(there):
                problems.append(Problem(name, f"llama.cpp's {known.architecture} has no such tensor"))
            else:
                problems += _problems(t)
        return problems

    def becomes(self, model: Contents) -> dict[str, Becomes]:
        """Codes in the smallest type of blocks of 32 that has them; embeddings and heads may take a wider one, or float16."""
        found: dict[str, Becomes] = {}
        for name, t in model.tensors.items():
            if t.format is None or not _problems(replace(t, inputs=None)):
                continue
            table = t.kind in ("embedding", "head")
            block = type_with_codes(t.format, t.stored_shape, wider=table)
            if block is not None:
                found[name] = block.format
            elif table:
                found[name] = torch.float16
        return found

    def title(self, becomes: Becomes) -> str:
        block = None if isinstance(becomes, torch.dtype) else type_of(becomes)
        return super().title(becomes) if block is None else block.name

    def check_tokenizer(self, tokenizer: Any, model: Contents) -> list[Problem]:
        """Whether llama.cpp can cut text as this tokenizer does."""
        config: Any = model.config
        why = vocabulary.refusal(tokenizer, int(config.get_text_config().vocab_size))
        return [] if why is None else [Problem("", why)]

    def candidates(self, model: Contents) -> tuple[str, ...]:
        """The types of blocks of 256 where all widths are multiples of it, else those of 32."""
        widths = [t.out_in[-1] for t in model.tensors.values() if t.kind in ("linear", "conv1d", "experts")]
        if all(width % 256 == 0 for width in widths):
            return ("q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0")
        return ("iq4_nl", "q5_0", "q5_1", "q8_0")

    def mixes(self) -> tuple[str, ...]:
        return tuple(MIXES)

    def mix(self, name: str, model: Contents) -> Mix | None:
        """A mix of llama-quantize for this model."""
        family = family_of(model.config)
        if name not in MIXES or family is None:
            return None
        rules = MIXES[name]
        return Mix(rules.base, rules.head, layer_types(rules, names_in_file(family, model)))

    def write(self, model: LowbitFolder, out: Path, progress: Progress | None = None) -> None:
        """Metadata and vocabulary, then the tensors one at a time."""
        import gguf

        contents = model.contents
        family, config = family_of(contents.config), contents.config
        if family is None or config is None:
            raise SourceError(f"{contents.label} is not of a family that GGUF can be written for")
        tensors = place(family, contents)
        writer = gguf.GGUFWriter(out, gguf_of(family).architecture)
        try:
            writer.add_type(gguf.GGUFType.MODEL)
            metadata.describe(family, writer, config)
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            writer.add_file_type(_file_type(tensors))
            writer.add_string("lowbit.recipe", contents.recipe)
            text: Any = config.get_text_config()
            words = vocabulary.vocabulary(model.tokenizer(), int(text.vocab_size), model.dense().end_tokens())
            words.add_to(writer)
            factors = rope.rope_factors(text)
            for p in tensors:
                _announce(writer, p)
            if factors is not None:
                writer.add_tensor_info(
                    "rope_freqs.weight", tuple(factors.shape), factors.numpy().dtype, 4 * len(factors)
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            done, total = 0, sum(p.nbytes for p in tensors)
            for p in tensors:
                if progress:
                    progress(p.tensor.name, done, total)
                writer.write_tensor_data(bytes_in_file(p, model.read(p.tensor.name)))
                done += p.nbytes
                if progress:
                    progress(p.tensor.name, done, total)
            if factors is not None:
                writer.write_tensor_data(factors.numpy())
        except OSError as error:
            raise OutputError(
                f"cannot write {out}: {error.strerror or error}; make room, or name another place"
            ) from error
        finally:
            writer.close()

    def weight_bytes(self, model: Contents) -> int:
        """Bytes of the tensors in the file; metadata and vocabulary, some MB, are not counted."""
        family = family_of(model.config)
        return sum(p.nbytes for p in place(family, model)) if family is not None else super().weight_bytes(model)

    def reopen(self, out: Path, model: LowbitFolder) -> Source:
        """By transformers' rules where it has them, else by our own."""
        family = family_of(model.contents.config)
        assert family is not None
        if gguf_of(family).reader == "own":
            return Reread(out, model, place(family, model.contents))
        return GgufSource(out)


def _problems(t: TensorPlan) -> list[Problem]:
    """What is wrong with one tensor."""
    found = []
    if t.inputs is not None:
        found.append(
            Problem(t.name, f"inputs stored as {t.inputs} have no place in the file: llama.cpp rounds inputs its own way",
                    "the same recipe without a= and without transforms that divide inputs")
        )  # fmt: skip
    if t.format is None:
        if t.dtype not in _FLOATS:
            found.append(Problem(t.name, f"llama.cpp reads no {str(t.dtype).removeprefix('torch.')} weights"))
        return found
    block, width = type_of(t.format), t.stored_shape[-1]
    if block is None:
        kind = nearest_type(t.format)
        return [*found, Problem(t.name, f"GGUF has no type for weights in {t.format}", text_of(kind))]
    if width % block.size:
        near = KEEP if width % 32 else "q8_0" if t.kind in ("embedding", "head") else block.narrow
        found.append(
            Problem(t.name, f"{block.name} needs rows of a multiple of {block.size}, not {width}", near, shape=True)
        )
    return found


def _announce(writer: Any, p: Placed) -> None:
    """Name, shape, type and size of a tensor, ahead of its bytes."""
    import gguf
    import numpy as np

    kind = gguf.GGMLQuantizationType[p.kind]
    if p.block is not None:
        shape = (*p.shape[:-1], p.nbytes // prod(p.shape[:-1]))
        writer.add_tensor_info(p.name, shape, np.dtype(np.uint8), p.nbytes, raw_dtype=kind)
    else:
        dtype = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[p.kind]
        writer.add_tensor_info(p.name, p.shape, np.dtype(dtype), p.nbytes, raw_dtype=kind)


def _file_type(tensors: list[Placed]) -> int:
    """llama.cpp's name for the whole: that of the type that most weights have."""
    import gguf

    weights: Counter[str] = Counter()
    for p in tensors:
        if len(p.shape) > 1:
            weights[p.kind] += int(torch.Size(p.shape).numel())
    kind = weights.most_common(1)[0][0] if weights else "F32"
    known = {t.name.removeprefix("MOSTLY_"): int(t) for t in gguf.LlamaFileType}
    return next((known[n] for n in (kind, f"{kind}_M", f"{kind}_MOE") if n in known), int(gguf.LlamaFileType.ALL_F32))
