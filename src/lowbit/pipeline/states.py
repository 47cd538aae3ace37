"""Hidden states between stages: files, so that memory holds one micro-batch and a killed run goes on from them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import TreeSpec, treespec_dumps, treespec_loads

from lowbit.pipeline.folder_writer import sync
from lowbit.pipeline.stages import Saved

_PLAIN = (bool, int, float, str, type(None))


class States:
    """What every stage returned, by stream and micro-batch: `folder/<stage>/<stream>-<batch>.safetensors`.

    A stage's folder gets its name when all its files are on the disk, so a folder that is there is whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def has(self, stage: int) -> bool:
        """Whether all that stage `stage` returned is here."""
        return self._final(stage).is_dir()

    def save(self, stage: int, stream: str, batch: int, value: Any) -> None:
        """Keep what a stage returned for one micro-batch; it counts once `commit` was called."""
        saved = Saved(value)
        room = self._fresh(stage)
        room.mkdir(exist_ok=True)
        tensors = {key: t.detach().contiguous().clone() for key, t in saved.tensors.items()}
        facts = {
            "spec": treespec_dumps(saved.spec),
            "others": json.dumps([o if isinstance(o, _PLAIN) else None for o in saved.others]),
        }
        path = room / f"{stream}-{batch:04d}.safetensors"
        save_file(tensors, path, metadata=facts)
        sync(path)

    def commit(self, stage: int) -> None:
        """Everything of the stage is saved: give its folder the name that counts."""
        shutil.rmtree(self._final(stage), ignore_errors=True)
        sync(self._fresh(stage))
        os.rename(self._fresh(stage), self._final(stage))
        sync(self.folder)

    def load(self, stage: int, stream: str, batch: int) -> Any:
        """What `save` kept, in fresh memory."""
        with safe_open(self._final(stage) / f"{stream}-{batch:04d}.safetensors", framework="pt") as file:
            facts = file.metadata()
            tensors: dict[str, Tensor] = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        spec: TreeSpec = treespec_loads(facts["spec"])
        saved = Saved.__new__(Saved)
        saved.spec, saved.others, saved.tensors = spec, json.loads(facts["others"]), tensors
        return saved.value(tensors)

    def drop(self, stage: int) -> None:
        """Remove what is not needed any more."""
        shutil.rmtree(self._final(stage), ignore_errors=True)

    def clear(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _final(self, stage: int) -> Path:
        return self.folder / f"{stage:05d}"

    def _fresh(self, stage: int) -> Path:
        return self.folder / f"{stage:05d}.new"


class InputFile:
    """The float model's input of one weight (or output of a block), all micro-batches, kept until it is compared."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        self.path, self.dtype, self.count = path, dtype, 0

    def append(self, x: Tensor) -> None:
        """Add the input of the next micro-batch, [..., K]."""
        save_file({"x": x.reshape(-1, x.shape[-1]).to(self.dtype).contiguous()}, self._file(self.count))
        self.count += 1

    def read(self, batch: int) -> Tensor:
        """[tokens, K] of micro-batch `batch`, in the type that it is kept in."""
        with safe_open(self._file(batch), framework="pt") as file:
            return file.get_tensor("x").clone()

    def remove(self) -> None:
        for batch in range(self.count):
            self._file(batch).unlink(missing_ok=True)

    def _file(self, batch: int) -> Path:
        return self.path.with_name(f"{self.path.name}-{batch:04d}.safetensors")
