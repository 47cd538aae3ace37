"""Hidden states between blocks: files, so that memory holds one micro-batch and a killed run goes on from them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import TreeSpec, treespec_dumps, treespec_loads

from lowbit.blockwise.block_runner import Saved
from lowbit.interchange.files.atomic import sync

_PLAIN = (bool, int, float, str, type(None))


class HiddenStates:
    """What every block returned, by stream and micro-batch: `folder/<block>/<stream>-<batch>.safetensors`.

    A block's folder gets its name when all its files are on the disk, so a folder that is there is whole. A thread waits for the
    disk meanwhile: until then its files are read under the folder's first name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._aside = ThreadPoolExecutor(1)
        self._committing: Future[None] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def has(self, block: int) -> bool:
        """Whether all that block `block` returned is here for good."""
        return self._final(block).is_dir()

    def save(self, block: int, stream: str, batch: int, value: Any) -> None:
        """Keep what a block returned for one micro-batch; it counts some time after `commit` was called."""
        saved = Saved(value)
        folder = self._fresh(block)
        folder.mkdir(exist_ok=True)
        tensors = {key: t.detach().contiguous().clone() for key, t in saved.tensors.items()}
        facts = {
            "spec": treespec_dumps(saved.spec),
            "others": json.dumps([o if isinstance(o, _PLAIN) else None for o in saved.others]),
        }
        save_file(tensors, folder / f"{stream}-{batch:04d}.safetensors", metadata=facts)

    def commit(self, block: int, passed: Sequence[int] = ()) -> None:
        """Everything of the block is saved: once it is on the disk, its folder gets the name that counts, and those of the blocks
        `passed` are removed. Returns before that, but not before an earlier call has come to its end."""
        self.wait()
        self._committing = self._aside.submit(self._commit, block, passed)

    def _commit(self, block: int, passed: Sequence[int]) -> None:
        fresh = self._fresh(block)
        for path in sorted(fresh.iterdir()):
            sync(path)
        sync(fresh)
        shutil.rmtree(self._final(block), ignore_errors=True)
        os.rename(fresh, self._final(block))
        sync(self.folder)
        for other in passed:
            shutil.rmtree(self._final(other), ignore_errors=True)

    def wait(self) -> None:
        """Until all that was committed counts. OSError when the disk has failed."""
        if self._committing is not None:
            self._committing.result()
            self._committing = None

    def load(self, block: int, stream: str, batch: int) -> Any:
        """What `save` kept of a block that was committed, in fresh memory."""
        name = f"{stream}-{batch:04d}.safetensors"
        if not self.has(block):
            try:
                return _loaded(self._fresh(block) / name)
            except (OSError, RuntimeError, SafetensorError):
                self.wait()  # it got its name in between, or while it was read, which opens the file twice
        return _loaded(self._final(block) / name)

    def clear(self) -> None:
        """Remove all of it."""
        self.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _final(self, block: int) -> Path:
        return self.folder / f"{block:05d}"

    def _fresh(self, block: int) -> Path:
        return self.folder / f"{block:05d}.new"


def _loaded(path: Path) -> Any:
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
        tensors: dict[str, Tensor] = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    spec: TreeSpec = treespec_loads(facts["spec"])
    saved = Saved.__new__(Saved)
    saved.spec, saved.others, saved.tensors = spec, json.loads(facts["others"]), tensors
    return saved.value(tensors)


class TensorFile:
    """Tensors one after another in a file without a name, which is gone when the process is, however it ends.

    Read into fresh memory, not mapped: mapped pages would count as the process's own. What is written after `rewind` goes to
    the places that the file has, which is several times as fast as new ones are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: FileIO | None = None
        self._placed: list[tuple[int, torch.Size, torch.dtype]] = []  # where each begins, and what it is
        self._end = 0

    def __len__(self) -> int:
        return len(self._placed)

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return self._end

    def append(self, x: Tensor) -> int:
        """Add a tensor; returns its number."""
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = TemporaryFile(buffering=0, dir=self.folder)  # noqa: SIM115
        data = _bytes(x.detach().contiguous())
        self._file.seek(self._end)
        while data:
            data = data[self._file.write(data) :]
        self._placed.append((self._end, x.shape, x.dtype))
        self._end = self._file.tell()
        return len(self._placed) - 1

    def read(self, number: int) -> Tensor:
        """The tensor of this number."""
        begin, shape, dtype = self._placed[number]
        assert self._file is not None
        out = torch.empty(shape, dtype=dtype)
        left = _bytes(out)
        self._file.seek(begin)
        while left:
            count = self._file.readinto(left)
            if not count:
                raise OSError(f"a file of tensors in {self.folder} ends too early; another program has cut it short")
            left = left[count:]
        return out

    def rewind(self) -> None:
        """What is appended next is the first again, in the same file."""
        self._placed.clear()
        self._end = 0

    def remove(self) -> None:
        """Remove the file; what is appended next is the first again."""
        self.rewind()
        if self._file is not None:
            self._file.close()
            self._file = None


class InputFile:
    """The float model's input of one weight (or output of a block), all micro-batches, kept until it is compared."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        self.file, self.dtype = TensorFile(folder), dtype

    def append(self, x: Tensor) -> None:
        """Add the input of the next micro-batch, [..., K]."""
        self.file.append(x.reshape(-1, x.shape[-1]).to(self.dtype))

    def read(self, batch: int) -> Tensor:
        """[tokens, K] of micro-batch `batch`, in the type that it is kept in."""
        return self.file.read(batch)

    def rewind(self) -> None:
        """The input that is appended next is that of the first micro-batch again."""
        self.file.rewind()

    def remove(self) -> None:
        self.file.remove()


def _bytes(x: Tensor) -> memoryview:
    return memoryview(x.reshape(-1).view(torch.uint8).numpy())
