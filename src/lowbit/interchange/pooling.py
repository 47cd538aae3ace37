"""How a folder makes one embedding of a text: what sentence-transformers reads, `modules.json` and the folders that it names.

A text's hidden states [tokens, width] are pooled, may pass linear layers, and may be scaled to length 1. Only what is here is known;
of a chain with another part, the embedding is what comes before that part, which is said.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import LowbitError, SourceError
from lowbit.interchange.companions import MODULES, module_folders
from lowbit.interchange.files.safetensors_reader import read_header, read_tensor
from lowbit.interchange.files.settings import read_json

# A mode -> what it makes of hidden states [tokens, width]. Several are put behind one another, in this order.
_MODES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "cls": lambda h: h[0],
    "max": lambda h: h.amax(0),
    "mean": lambda h: h.mean(0),
    "mean_sqrt_len_tokens": lambda h: h.sum(0) / len(h) ** 0.5,
    "weightedmean": lambda h: (h * _positions(h)).sum(0) / _positions(h).sum(),
    "lasttoken": lambda h: h[-1],
}
_WORDS = {
    "cls": "first token", "max": "maximum over tokens", "mean": "mean over tokens", "lasttoken": "last token",
    "mean_sqrt_len_tokens": "sum over tokens, divided by the root of their number",
    "weightedmean": "mean over tokens, later ones weighing more",
}  # fmt: skip
_FIELDS = {
    "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max", "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}  # fmt: skip
# The end of the name of an activation in the config of a linear layer -> that activation.
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Identity": lambda x: x, "Tanh": torch.tanh, "ReLU": torch.relu, "GELU": torch.nn.functional.gelu,
    "Sigmoid": torch.sigmoid, "SiLU": torch.nn.functional.silu,
}  # fmt: skip


def _positions(h: Tensor) -> Tensor:
    return torch.arange(1, len(h) + 1, dtype=h.dtype, device=h.device)[:, None]


@dataclass(frozen=True, eq=False)
class Dense:
    """y = activation(W x + b), W float32 [out, in], b [out] or None."""

    weight: Tensor
    bias: Tensor | None
    activation: str = "Identity"

    def __call__(self, x: Tensor) -> Tensor:
        """[in] -> [out]."""
        return _ACTIVATIONS[self.activation](torch.nn.functional.linear(x, self.weight.to(x), _to(self.bias, x)))


class Normalize:
    """y = x / |x|."""

    def __call__(self, x: Tensor) -> Tensor:
        """[d] -> [d]."""
        return torch.nn.functional.normalize(x, dim=0)


@dataclass(frozen=True, eq=False)
class Pooling:
    """How hidden states become an embedding: pooled by every mode, which are put behind one another, then what comes `after`.

    longest: the most tokens of a text that the folder asks for. unknown: the part of the chain before which reading ended.
    """

    modes: tuple[str, ...] = ("mean",)
    after: tuple[Dense | Normalize, ...] = ()
    longest: int | None = None
    unknown: str = ""

    def __call__(self, hidden: Tensor) -> Tensor:
        """[tokens, width] -> [embedding], in the type of the hidden states."""
        found = torch.cat([_MODES[mode](hidden) for mode in self.modes])
        for step in self.after:
            found = step(found)
        return found

    @property
    def words(self) -> str:
        """'mean over tokens, scaled to length 1'."""
        parts = [" and ".join(_WORDS[mode] for mode in self.modes)]
        parts += ["a linear layer" if isinstance(step, Dense) else "scaled to length 1" for step in self.after]
        parts += [f"without {self.unknown}, which lowbit does not know"] if self.unknown else []
        return ", ".join(parts)


def pooling_of(folder: Path) -> Pooling | None:
    """What a folder says of its embeddings; None for one without `modules.json`, or whose chain does not begin with a transformer and a
    pooling. SourceError for files that are there and cannot be read."""
    if not (folder / MODULES).is_file():
        return None
    chain = _chain(folder)
    if [kind for kind, _ in chain[:2]] != ["Transformer", "Pooling"]:
        return None
    modes, longest = _modes(_config(folder / chain[1][1]), folder), _longest(folder)
    after: list[Dense | Normalize] = []
    for kind, path in chain[2:]:
        part = _PARTS.get(kind)
        step = None if part is None else part(folder / path)
        if step is None:
            return Pooling(modes, tuple(after), longest, kind)
        after.append(step)
    return Pooling(modes, tuple(after), longest)


def _chain(folder: Path) -> list[tuple[str, str]]:
    """(kind, sub-folder) of every part; those whose path leads out of the folder have none."""
    file, safe = folder / MODULES, set(module_folders(folder))
    try:
        found = [(str(part["type"]).rpartition(".")[2], str(part.get("path", ""))) for part in _read_list(file)]
    except (KeyError, TypeError, AttributeError):
        raise SourceError(
            f"{file} is not a list of parts as sentence-transformers writes it; copy the folder again"
        ) from None
    return [(kind, path if not path or path in safe else "") for kind, path in found]


def _read_list(file: Path) -> list[Any]:
    """A JSON file that holds a list. SourceError."""
    try:
        if file.stat().st_size > 1 << 20:
            raise ValueError("it is too large")
        value = json.loads(file.read_text("utf-8"))
        if not isinstance(value, list):
            raise ValueError("it is no list")
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{file} cannot be read ({str(error)[:80]}); copy the folder again") from None
    return value


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return read_json(file) if file.is_file() else {}


def _modes(config: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    """Of a pooling's config: one field, or as before sentence-transformers 5 a switch for each mode."""
    named = config.get("pooling_mode")
    if named is None:
        return tuple(mode for field, mode in _FIELDS.items() if config.get(field) is True) or ("mean",)
    modes = (named,) if isinstance(named, str) else named
    if (
        not isinstance(modes, (list, tuple))
        or not modes
        or not all(isinstance(mode, str) and mode in _MODES for mode in modes)
    ):
        raise SourceError(f"{folder}: pooling_mode {str(named)[:60]!r} is none of {', '.join(_MODES)}")
    return tuple(modes)


def _longest(folder: Path) -> int | None:
    file = folder / "sentence_bert_config.json"
    longest = read_json(file).get("max_seq_length") if file.is_file() else None
    return longest if isinstance(longest, int) and not isinstance(longest, bool) and longest > 1 else None


def _dense(folder: Path) -> Dense | None:
    """None where its activation or its weights are not known."""
    activation = str(_config(folder).get("activation_function", "Tanh")).rpartition(".")[2]
    file = folder / "model.safetensors"
    if activation not in _ACTIVATIONS or not file.is_file():
        return None
    try:
        entries = read_header(file).entries
        weight = read_tensor(file, entries["linear.weight"]).float()
        bias = read_tensor(file, entries["linear.bias"]).float() if "linear.bias" in entries else None
    except (LowbitError, KeyError, OSError):
        return None
    return Dense(weight, bias, activation) if weight.dim() == 2 else None


# What the end of the name of a part's class stands for; None where the folder has no such part that is known.
_PARTS: Mapping[str, Callable[[Path], Dense | Normalize | None]] = {
    "Dense": _dense,
    "Normalize": lambda folder: Normalize(),
}


def _to(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x)
