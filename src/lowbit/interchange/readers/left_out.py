"""What of a source's weights is not read or not carried over, in few words: other files of weights, tensors without a place."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowbit.interchange.files.adapter import refuse_adapter
from lowbit.interchange.hf.section import CACHE_TABLES
from lowbit.interchange.hf.text_config import text_config

_SHOWN = 3
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_COMPUTED = re.compile(
    r"(inv_freq|position_ids|masked_bias|attn\.bias|attention\.bias|relative_position_index|\.version|num_batches_tracked)$"
)
_SEVERAL = re.compile(r"(^|\.)(mtp|nextn|multi_token)")
_NUMBER = re.compile(r"^(.*?\.)(\d{1,9})\.")
SEVERAL_TOKENS = (
    "layers for multi-token prediction, which transformers does not run; for speculative decoding take the original's"
)
BUFFERS = "buffers that the model computes itself"
OF_THE_PROGRAM = "of the program that quantized the source, such as scales of a KV cache"


@dataclass(frozen=True)
class LeftOut:
    """Tensors of the source that are not in the model: their names in short, how many, bytes in the source, and why.

    `members`: their names in full.
    """

    names: str
    tensors: int
    nbytes: int
    why: str
    members: tuple[str, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        plural = "" if self.tensors == 1 else "s"
        return f"left out: {self.names}, {self.tensors:,} tensor{plural} of {self.nbytes:,} bytes ({self.why})"

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {"names": self.names, "tensors": self.tensors, "bytes": self.nbytes, "why": self.why}


def left_out(
    dropped: Iterable[str], nbytes: Callable[[str], int], known: Iterable[str], model: str, config: Any,
    unused: Collection[str] = (),
) -> tuple[LeftOut, ...]:  # fmt: skip
    """Tensors that a `model` of transformers has no place for, those of one kind together.

    dropped  their checkpoint names; `unused` are those that a quantized source has beside its weights
    known    names of the model's tensors, by whose first words strange ones are told
    """
    first_words = {name.partition(".")[0] for name in known}
    layers = getattr(text_config(config), "num_hidden_layers", None) if hasattr(config, "get_text_config") else None
    groups: dict[tuple[str, str], list[str]] = {}
    for name in dropped:
        groups.setdefault(_kind(name, first_words, layers, model, unused), []).append(name)
    return tuple(
        LeftOut(names, len(members), sum(map(nbytes, members)), why, tuple(members))
        for (names, why), members in groups.items()
    )


def _kind(name: str, first_words: set[str], layers: int | None, model: str, unused: Collection[str]) -> tuple[str, str]:
    """(names in short, why)."""
    word, number = name.partition(".")[0], _NUMBER.match(name)
    every = ".".join("*" if part.isdigit() else part for part in name.split("."))
    if name in unused:
        return every, OF_THE_PROGRAM
    if _COMPUTED.search(name):
        return every, BUFFERS
    beyond = number is not None and layers is not None and int(number[2]) >= layers and number[1].endswith("layers.")
    short = f"{word}.*" if word not in first_words | {"blk"} else f"{number[1]}{number[2]}.*" if number else name
    if beyond or _SEVERAL.search(name):
        return short, SEVERAL_TOKENS
    return short, f"transformers leaves it unread in a {model}"


def unread_weights(folder: Path, read: Collection[Path], shards: Collection[str], index: str) -> tuple[str, ...]:
    """What to say of files of weights beside those that are `read`, in names without paths; empty where there are none.

    `shards`: what the index names, whether it was followed or not.
    """
    chosen = {file.name for file in read}
    names = sorted(file.name for file in folder.iterdir())
    others = [n for n in names if n.endswith(".safetensors") and n not in chosen and not n.startswith("adapter_")]
    others = [n for n in others if n != CACHE_TABLES]  # read when the model is run
    remarks = []
    if set(shards) - chosen and (second := [n for n in others if n in shards]):
        remarks.append(
            f"two sets of weights are in this folder: {_some(sorted(chosen))} is read, as transformers does, and {index} with "
            f"its {len(shards)} shards ({_some(second)}) is not; remove the one that is not meant"
        )
    stray = [n for n in others if n not in shards]
    if stray:
        what = f"{index} does not name" if set(shards) == chosen else f"{_some(sorted(chosen))} stands before"
        remarks.append(f"not read: {_some(stray)}, which {what}")
    pickles = [n for n in names if any(fnmatch.fnmatch(n, p) for p in _PICKLES) and n != "training_args.bin"]
    if pickles:
        remarks.append(
            f"not read: {_some(pickles)}; a pickle can run code when it is read, and the safetensors are here"
        )
    return tuple(remarks)


def no_weights(folder: Path, single: str, index: str) -> str:
    """Why a folder has no usable weights, and what to do. SourceError where it holds an adapter."""
    names = sorted(file.name for file in folder.iterdir())
    refuse_adapter(folder, str(folder), always=True)
    others = [n for n in names if n.endswith(".safetensors")]
    if others:
        return f"{folder}: has {', '.join(others[:3])} but neither {single} nor {index}; rename or save it again"
    pickles = [n for n in names if any(fnmatch.fnmatch(n, p) for p in _PICKLES)]
    if pickles:
        return (
            f"{folder}: has its weights only as a pickle ({pickles[0]}), which can run code when it is read; convert "
            "it where you trust it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    ggufs = [n for n in names if n.endswith(".gguf")]
    if ggufs:
        return f"{folder}: has no safetensors; to use its GGUF file give {folder / ggufs[0]}"
    return f"{folder}: has no weights; looked for {single} and {index}; download the model again"


def to_json(found: Iterable[LeftOut], files: Iterable[str]) -> Mapping[str, Any]:
    """For lowbit.json: what is not in the folder."""
    return {"tensors": [each.to_json() for each in found], "files": list(files)}


def _some(names: Collection[str]) -> str:
    shown = list(names)[:_SHOWN]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
