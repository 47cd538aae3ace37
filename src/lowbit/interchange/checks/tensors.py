"""A config held against the names and shapes of the weights, before a model is built of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lowbit.errors import SourceError
from lowbit.families import decoder_of
from lowbit.interchange.checks.rules import REMEDY

_NUMBERED = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block|blk)\.(\d+)\.")
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_SHARED = (4, 64)  # families that run one layer several times have at most so many times the layers, and some more


def layers_of(names: Iterable[str]) -> int:
    """How many layers the names of tensors have: one more than the largest number of one, 0 where none is numbered."""
    return max((int(number[:9]) + 1 for name in names for number in _NUMBERED.findall(name)), default=0)


def check_layers(config: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    """SourceError where the config has layers of which the weights have no tensor."""
    found = layers_of(names)
    if not found:
        return
    text = config.get("text_config")
    for path, part in (("", config), ("text_config.", text if isinstance(text, Mapping) else {})):
        plain = decoder_of(part) is not None
        for field in _COUNTS:
            said = part.get(field)
            if type(said) is int and said > (found if plain else _SHARED[0] * found + _SHARED[1]):
                raise SourceError(f"{where}: {path}{field} is {said}, and the weights have {found} layers; {REMEDY}")


def fields_with(config: Mapping[str, Any], sizes: Iterable[int]) -> str:
    """` (vocab_size is 272)`: the fields of a config that have one of these sizes, or an empty string."""
    wanted = [size for size in sizes if size > 1]
    found = [
        f"{name} is {value}"
        for part in (config, config.get("text_config"))
        if isinstance(part, Mapping)
        for name, value in part.items()
        if type(value) is int and value in wanted
    ]
    return f" ({', '.join(dict.fromkeys(found[:3]))})" if found else ""


def check_shapes(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, Sequence[int]], config: Mapping[str, Any], where: str
) -> None:
    """SourceError for the first tensor whose shape is not the one that the config gives; an absent one passes."""
    for name, shape in wanted.items():
        if name in found and tuple(found[name]) != shape:
            sizes = [size for i, size in enumerate(shape) if found[name][i : i + 1] != (size,)]
            raise SourceError(
                f"{where}: tensor {name!r} has shape {list(found[name])} but config.json asks for {list(shape)}"
                f"{fields_with(config, sizes)}; the weights and the config are of different models"
            )
