"""lowbit's own `quantization_config`: every packed tensor with its format and shape, and what is tied to what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from lowbit.errors import FormatError, SourceError
from lowbit.formats import Format, Inputs, parse_format, parse_inputs
from lowbit.interchange.checks.config import check_values
from lowbit.interchange.checks.rules import FLAG, NULL, OBJECT, TEXT, Rule, check, list_of, map_of, need, refuse, whole

Parts = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

_AGAIN = "copy the folder again or quantize the model again"
_MOST = 1 << 42  # numbers of one tensor
_NAME = "quantization_config"
SECTION: Mapping[str, Rule] = {
    "quant_method": TEXT,
    "tensors": map_of(OBJECT),
    "tied": map_of(TEXT) | NULL,
    "recipe": TEXT | NULL,
    "version": TEXT | NULL,
    "kv": TEXT | NULL,
}
ENTRY: Mapping[str, Rule] = {
    "format": TEXT,
    "shape": list_of(whole(1, 1 << 31), 2, 3),
    "transposed": FLAG,
    "inputs": TEXT,
}


@dataclass(frozen=True)
class Packed:
    """One packed tensor [.., out, in]. transposed: the module keeps [.., in, out]; inputs: how they are stored at run time."""

    name: str
    format: Format
    shape: tuple[int, ...]
    transposed: bool = False
    inputs: Inputs | None = None

    def weight_parts(self) -> Parts:
        """Part -> (dtype, shape) of what is stored of the weight, without its name in front."""
        return self.format.parts(self.shape)

    def input_parts(self) -> Parts:
        """The same of what is stored for its inputs."""
        return {} if self.inputs is None else self.inputs.parts(self.shape[-1])

    def parts(self) -> Parts:
        """All that is stored of it."""
        return {**self.weight_parts(), **self.input_parts()}

    @property
    def module_shape(self) -> tuple[int, ...]:
        """Its shape as the module has it."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape


@dataclass(frozen=True)
class Section:
    """What a folder says of its packed tensors. tied: alias -> the name of the tensor that it shares.

    kv: the text of the format of its KV cache (see `kv/folder.py`), empty where it says none.
    """

    tensors: Mapping[str, Packed]
    tied: Mapping[str, str]
    recipe: str = ""
    version: str = ""
    kv: str = ""


def read_section(section: Any, where: str) -> Section:
    """The checked section. SourceError names the first field that is missing or of a wrong type, and what it may be."""
    if not isinstance(section, Mapping):
        refuse(where, _NAME, section, "an object")
    check_values(section, where, _NAME)
    need(("tensors",), section, where, f"{_NAME}.", "a folder of lowbit")
    check(SECTION, section, where, f"{_NAME}.")
    unknown = sorted(set(section) - set(SECTION))
    if unknown:
        raise SourceError(f"{where}: {_NAME} has {unknown[0]!r}, which this version of lowbit does not know; update it")
    tensors = {name: _packed(name, entry, where) for name, entry in section["tensors"].items()}
    tied = dict(section.get("tied") or {})
    for alias, name in tied.items():
        if alias in tensors or name in tied:
            raise SourceError(
                f"{where}: {_NAME}.tied says that {alias!r} is {name!r}, and it is another one's; {_AGAIN}"
            )
    return Section(tensors, tied, section.get("recipe") or "", section.get("version") or "", section.get("kv") or "")


def check_parts(section: Section, stored: Parts, where: str) -> None:
    """SourceError where the tensors of a folder are not the parts that its section gives.

    `stored`: every tensor of the files, name -> (dtype, shape). Names a part that is missing, of another type or shape, or
    not known, and a name in `tied` that nothing has.
    """
    for name, packed in section.tensors.items():
        wanted = packed.parts()
        for part, (dtype, shape) in wanted.items():
            found = stored.get(f"{name}.{part}")
            if found is None:
                raise SourceError(f"{where}: lacks tensor '{name}.{part}', which {packed.format} needs; {_AGAIN}")
            if found != (dtype, shape):
                raise SourceError(
                    f"{where}: tensor '{name}.{part}' is {_said(found)} and not {_said((dtype, shape))}, as {packed.format} "
                    f"of shape {list(packed.shape)} has it; {_AGAIN}"
                )
    for name in stored:
        owner = _owner(name, section.tensors)
        if owner is not None and name[len(owner) + 1 :] not in section.tensors[owner].parts():
            raise SourceError(
                f"{where}: tensor {name!r} is no part of a weight in {section.tensors[owner].format}; {_AGAIN}"
            )
    for alias, name in section.tied.items():
        if name not in section.tensors and name not in stored:
            raise SourceError(
                f"{where}: {_NAME}.tied says that {alias!r} is {name!r}, which the folder does not have; {_AGAIN}"
            )


def _packed(name: str, entry: Mapping[str, Any], where: str) -> Packed:
    path = f"{_NAME}.tensors.{name}."
    need(("format", "shape"), entry, where, path, "a packed tensor")
    check(ENTRY, entry, where, path)
    shape = tuple(entry["shape"])
    if prod(shape) > _MOST:
        refuse(where, f"{path}shape", list(shape), f"of at most {_MOST} numbers")
    try:
        fmt = parse_format(entry["format"])
        inputs = parse_inputs(entry["inputs"]) if "inputs" in entry else None
        found = Packed(name, fmt, shape, entry.get("transposed", False), inputs)
        found.parts()
    except (FormatError, ValueError, TypeError, OverflowError, ArithmeticError, RecursionError) as error:
        raise SourceError(
            f"{where}: {path[:-1]} is no packed tensor: {' '.join(str(error).split())[:200]}; {_AGAIN}"
        ) from None
    return found


def _owner(name: str, tensors: Mapping[str, Packed]) -> str | None:
    """The packed tensor that a stored one may be a part of."""
    owner = name.rpartition(".")[0]
    while owner and owner not in tensors:
        owner = owner.rpartition(".")[0]
    return owner or None


def _said(found: tuple[torch.dtype, tuple[int, ...]]) -> str:
    return f"{str(found[0]).removeprefix('torch.')} {list(found[1])}"
