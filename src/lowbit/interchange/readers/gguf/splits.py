"""A model in several GGUF files, as llama.cpp splits them: NAME-00001-of-00003.gguf, tensors shared out, metadata in the first.

Each part says which it is (`split.no`, from 0), of how many (`split.count`), and how many tensors all have together
(`split.tensors.count`). Source: llama.cpp's `gguf-split.cpp` and `llama-model-loader.cpp`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from lowbit.errors import SourceError
from lowbit.interchange.readers.gguf.header import GgufHeader, GgufTensor, read_gguf_header

_PART = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")


def read_gguf(path: Path) -> tuple[tuple[Path, ...], GgufHeader]:
    """(the files, the first one first, and one header of all their tensors) of the model that `path` is, or is a part of.

    SourceError for a damaged file, and for a split model names the part that is missing or belongs to another.
    """
    header = read_gguf_header(path)
    count = header.metadata.get("split.count", 0)
    if not isinstance(count, int) or count < 2:
        return (path,), header
    name = _PART.match(path.name)
    if name is None or int(name["count"]) != count:
        raise SourceError(
            f"{path} is one of the {count} parts of a split model, and is not called NAME-00001-of-{count:05}.gguf, by which "
            "the others are found; give the files their names back"
        )
    paths = tuple(path.with_name(f"{name['stem']}-{i + 1:05}-of-{count:05}.gguf") for i in range(count))
    missing = next((part for part in paths if not part.is_file()), None)
    if missing is not None:
        raise SourceError(
            f"{path} is one of the {count} parts of a split model, and {missing.name} is not beside it; download that too"
        )
    headers = [header if part == path else read_gguf_header(part) for part in paths]
    tensors: dict[str, GgufTensor] = {}
    for i, (part, found) in enumerate(zip(paths, headers, strict=True)):
        said = (found.metadata.get("split.no"), found.metadata.get("split.count"))
        if said != (i, count):
            raise SourceError(f"{part} says it is part {said[0]} (from 0) of {said[1]}; download the model again")
        twice = next((t for t in found.tensors if t in tensors), None)
        if twice is not None:
            raise SourceError(f"{part} has the tensor {twice!r} of another part; the parts are of different models")
        tensors |= found.tensors
    total = headers[0].metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise SourceError(
            f"{paths[0]} speaks of {total} tensors, and its parts have {len(tensors)}; download them again"
        )
    return paths, replace(headers[0], tensors=tensors)
