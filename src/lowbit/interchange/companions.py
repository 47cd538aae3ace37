"""The files of a model folder that are no weights: which of them go with the model, and which are left, and why.

A folder that was downloaded whole comes out whole: tokenizer, chat templates, processors, what sentence-transformers and other
libraries read, licence and model card, sub-folders too. Left are weights in any form, code, what is written anew, what
described an older quantization, a README that lowbit wrote, and links that lead out of the folder. Nothing is opened but
`modules.json` and README.md; files are only copied.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lowbit.interchange.hf.section import CACHE_TABLES
from lowbit.interchange.model_card import BASE_README, README, is_marked, text_of

_MOST_FILES, _DEEPEST, _LARGEST = 10_000, 8, 256 << 20
_NAMED = 3  # names that a sentence shows
WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".h5", ".hdf5", ".keras", ".msgpack", ".onnx",
    ".onnx_data", ".data", ".gguf", ".ggml", ".ot", ".tflite", ".litertlm", ".pb", ".pdparams", ".mlmodel", ".mlpackage", ".nemo",
    ".engine", ".plan", ".tar", ".gz", ".tgz", ".zip", ".7z",
)  # fmt: skip
_WEIGHT_FILES = ("*.safetensors.index.json", "*.bin.index.json", "*.onnx.data", "openvino_*.xml")
_CODE = (".py", ".pyc", ".so", ".dll", ".pyd", ".sh", ".exe")
_ANEW = (
    "config.json",
    "model.safetensors.index.json",
    "lowbit.json",
    CACHE_TABLES,
    "card.json",
    "journal.jsonl",
    "journal.jsonl.new",
    "states",
)
_QUANTIZATION = ("quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json")
# Files that transformers reads wherever they lie: a link to one elsewhere is followed where the file has the same name.
READ_BY_TRANSFORMERS = (
    "tokenizer*", "*tokenizer.json", "vocab.*", "vocab-*.json", "merges.txt", "*.model", "*.tiktoken", "tekken.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template*", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
MODULES = "modules.json"
# What is not asked of a hub, where a folder's contents are not seen before it is fetched.
NOT_FETCHED = (
    *(f"*{suffix}" for suffix in (*WEIGHTS, *_CODE)), *_WEIGHT_FILES, ".*", "*/.*", "onnx/*", "openvino/*", "original/*",
    "coreml/*", "gguf/*", "mlx/*", "checkpoint-*/*", "runs/*",
)  # fmt: skip


@dataclass(frozen=True)
class Companions:
    """`taken`: names under the folder, with `/`, in order. `left`: why -> names of files and folders (with `/` at the end)."""

    taken: tuple[str, ...]
    left: Mapping[str, tuple[str, ...]]

    def sentences(self) -> tuple[str, ...]:
        """What is left, a line for each reason; no paths but names of the folder."""
        return tuple(f"not copied: {_some(names)} ({why})" for why, names in self.left.items())


def companions_of(folder: Path) -> Companions:
    """Look through a folder. May raise OSError."""
    taken: list[str] = []
    left: dict[str, list[str]] = {}
    for name, why in _judged(folder, module_folders(folder)):
        if why is None:
            taken.append(name)
        elif why:
            left.setdefault(why, []).append(name)
    return Companions(tuple(taken), {why: tuple(names) for why, names in left.items()})


def copy_companions(folder: Path, out: Path) -> Companions:
    """Copy them into the folder `out`, with their sub-folders. May raise OSError.

    In a folder that has lowbit's README, that of the model it was made from becomes README.md again.
    """
    found = companions_of(folder)
    for name in found.taken:
        place = out / (README if name == BASE_README and README not in found.taken else name)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, place)
    return found


def module_folders(folder: Path) -> tuple[str, ...]:
    """Sub-folders that sentence-transformers reads as parts of the model, such as `2_Dense`; their weights belong to it."""
    try:
        modules = json.loads((folder / MODULES).read_text("utf-8"))
        paths = [module["path"] for module in modules]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ()
    plain = [PurePosixPath(p) for p in paths if isinstance(p, str) and p.strip("./") and "\\" not in p]
    return tuple(str(p) for p in plain if not p.is_absolute() and ".." not in p.parts)


def module_weights(folder: Path) -> tuple[str, ...]:
    """Patterns of the weights of these sub-folders."""
    return tuple(f"{name}/*.safetensors" for name in module_folders(folder))


def _judged(folder: Path, modules: tuple[str, ...]) -> Iterator[tuple[str, str | None]]:
    """(name, why it is left) of every file; None where it is taken, "" where there is nothing to say."""
    root, seen = folder.resolve(), 0
    described = is_marked(text_of(folder / README))  # a README of what lowbit wrote is of this folder and no other
    whole: dict[str, str] = {}  # sub-folder -> why it is left as a whole
    for name, entry in _files(folder, ""):
        seen += 1
        if seen > _MOST_FILES:
            yield name, f"more than {_MOST_FILES:,} files"
            return
        top = name.partition("/")[0]
        inside = any(name.startswith(f"{module}/") for module in modules)
        if "/" in name and not inside:
            if top not in whole:
                own = any(_is_weights(n) for n, _ in _files(folder / top, f"{top}/"))
                whole[top] = "weights of their own, another form of the model" if own else ""
                if own:
                    yield f"{top}/", whole[top]
            if whole[top]:
                continue
        yield name, "" if name == README and described else _why(name, entry, root, inside)


def _files(folder: Path, before: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Everything below that is no hidden name and no real folder, in order; links to folders as themselves."""
    if before.count("/") > _DEEPEST:
        return
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda e: e.name)
    for entry in found:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            if before or entry.name not in _ANEW:
                yield from _files(Path(entry.path), f"{before}{entry.name}/")
        else:
            yield f"{before}{entry.name}", entry


def _why(name: str, entry: os.DirEntry[str], root: Path, module: bool) -> str | None:
    last = name.rpartition("/")[2]
    if name in _ANEW:
        return ""
    if not os.path.isfile(entry.path):  # False too for a link to itself, where DirEntry raises
        return "a link that is not followed" if entry.is_symlink() else "no plain file"
    if entry.is_symlink() and not _stays(Path(entry.path), root):
        return "a link out of the folder"
    if name in _QUANTIZATION:
        return "of an older quantization"
    if last.endswith(_CODE):
        return "code, which is never run"
    if _is_weights(last):
        return (
            None if module and _wanted_of_module(Path(entry.path)) else "weights" if "/" in name else _why_weights(last)
        )
    return None if module or entry.stat().st_size <= _LARGEST else "taken for weights by its size"


def _why_weights(name: str) -> str:
    """Silence of what is read itself; the reason for another form."""
    if fnmatch.fnmatch(name, "model*.safetensors") or name.endswith(".safetensors.index.json"):
        return ""
    return "weights in another form"


def _is_weights(name: str) -> bool:
    return name.lower().endswith(WEIGHTS) or any(fnmatch.fnmatch(name.rpartition("/")[2], p) for p in _WEIGHT_FILES)


def _wanted_of_module(file: Path) -> bool:
    """Of the weights of a small module the safetensors file, else what there is; it is copied unopened."""
    return file.suffix == ".safetensors" or (
        file.name == "pytorch_model.bin" and not (file.parent / "model.safetensors").exists()
    )


def _stays(link: Path, root: Path) -> bool:
    """Whether a link leads to a file of the folder, of the hub's cache around it, or to one that is read anyway."""
    target = link.resolve()
    cache = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if target.is_relative_to(root) or target.is_relative_to(cache):
        return True
    return target.name == link.name and any(fnmatch.fnmatch(link.name, p) for p in READ_BY_TRANSFORMERS)


def _some(names: tuple[str, ...]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
