"""Write a model folder so that nothing is ever half there.

Everything goes to `OUT.partial` beside OUT; a journal names the tensors that are safely on disk. A killed run
that is started again with the same model, recipe and version goes on after the last of them, and what it
writes is byte for byte the same. The last step renames the folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.errors import OutputError, SourceError
from lowbit.interchange.safetensors_file import bytes_of, read_header, read_tensor
from lowbit.interchange.safetensors_writer import INDEX, Shard, create, index_json

JOURNAL = "journal.jsonl"
MANIFEST = "lowbit.json"
_NEW_JOURNAL = JOURNAL + ".new"
_FLUSH = 64 << 20  # bytes written between two entries of the journal reaching the disk


class FolderWriter:
    """The folder OUT while it is being made: `write` each tensor, `verify`, `finish`; or `discard`.

    `complete`: everything is written and checked, and only the folder's name is missing.
    """

    def __init__(
        self, out: str | Path, shards: tuple[Shard, ...], fingerprint: str, overwrite: bool = False,
        notes: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """OutputError when OUT has something in it, cannot be written, or holds an unfinished other run.

        `notes` stand in the journal's first line, for `head_of` to find when the run is taken up again.
        """
        if not str(out):
            raise OutputError("the name of the folder to write is empty; give one")
        self.out = Path(out).resolve()
        self.complete = False
        self.partial, self.notes = partial_of(self.out), dict(notes or {})
        self.shards, self.overwrite = shards, overwrite
        self.place = {name: shard for shard in shards for name in shard.spans}
        self.journal: dict[str, dict[str, Any]] = {}
        self._pending: list[dict[str, Any]] = []
        self._pending_bytes = 0
        if self.out.exists() and not self.out.is_dir():
            raise OutputError(f"{self.out} is a file; give a folder to write the model into")
        if os.path.ismount(self.out):
            raise OutputError(
                f"{self.out} is a mount point, which cannot be put in place by rename; give a folder inside it"
            )
        if self.out.exists() and not overwrite and any(self.out.iterdir()):
            raise OutputError(
                f"{self.out} is not empty; give another folder, or --overwrite (overwrite=True) to replace it"
            )
        try:
            self._begin(fingerprint)
        except OSError as error:
            raise self.cannot(error) from error

    def _begin(self, fingerprint: str) -> None:
        path = self.partial / JOURNAL
        if path.is_file():
            head, *entries = _readable(path) or [{}]
            if head.get("fingerprint") == fingerprint:
                intact = {s.file for s in self.shards if _is_size(self.partial / s.file, s.file_bytes)}
                for entry in entries:
                    if all(self.place[part].file in intact for part in entry["sha256"]):
                        self.journal[entry["tensor"]] = entry
                create(self.partial, self.shards)
                self._write_journal(head)
                return
            if head and not self.overwrite:
                raise OutputError(
                    f"{self.partial} holds an unfinished run of another model, recipe or version; finish that one, "
                    "remove the folder, or pass --overwrite (overwrite=True)"
                )
        elif self.partial.exists() and not _ours(self.partial):
            raise OutputError(
                f"{self.partial} is in the way and not of a run of lowbit; move it, or give another folder"
            )
        if self.partial.exists():
            shutil.rmtree(self.partial)
        needed = sum(shard.file_bytes for shard in self.shards)
        self.partial.mkdir(parents=True)
        free = shutil.disk_usage(self.partial).free
        if free < needed:
            self.discard()
            raise OutputError(
                f"{self.out} needs {needed:,} bytes and the disk has {free:,} free; make room or choose another"
            )
        self._write_journal({"fingerprint": fingerprint, **self.notes})  # first of all: it says that the folder is ours
        create(self.partial, self.shards)

    def _write_journal(self, head: dict[str, Any]) -> None:
        """The journal as a whole, put in its place by rename: a kill leaves the old one or the new one."""
        fresh = self.partial / _NEW_JOURNAL
        with fresh.open("w", encoding="utf-8") as file:
            for entry in (head, *self.journal.values()):
                file.write(json.dumps(entry, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self.partial / JOURNAL)

    def write(self, name: str, stored: dict[str, Tensor], **facts: Any) -> None:
        """Put the stored tensors of `name` in their places and enter it, with `facts`, in the journal."""
        try:
            hashes = {part: self._put(part, tensor) for part, tensor in stored.items()}
            self._enter({"tensor": name, "sha256": hashes, **facts})
        except OSError as error:
            raise self.cannot(error) from error

    def rewrite(self, name: str, stored: dict[str, Tensor], **facts: Any) -> None:
        """Replace some of the stored tensors of `name`, which is in the journal, and add `facts` to its entry.

        A kill in between leaves new bytes under an old hash, so that the caller must be able to repeat it.
        """
        try:
            hashes = {part: self._put(part, tensor) for part, tensor in stored.items()}
            entry = self.journal[name]
            self._enter({**entry, "sha256": entry["sha256"] | hashes, **facts})
        except OSError as error:
            raise self.cannot(error) from error

    def read(self, part: str) -> Tensor:
        """A stored tensor that was written, as it is on the disk now."""
        path = self.partial / self.place[part].file
        return read_tensor(path, read_header(path).entries[part])

    def _put(self, part: str, tensor: Tensor) -> str:
        """Write a stored tensor to its place; returns its SHA-256."""
        raw = bytes_of(tensor)
        begin, end = self.place[part].spans[part]
        if len(raw) != end - begin:
            raise OutputError(f"{part} takes {len(raw)} bytes and was planned with {end - begin}")
        with (self.partial / self.place[part].file).open("r+b") as file:
            file.seek(begin)
            file.write(raw)
        self._pending_bytes += len(raw)
        return hashlib.sha256(raw).hexdigest()

    def _enter(self, entry: dict[str, Any]) -> None:
        self._pending.append(entry)
        if self._pending_bytes >= _FLUSH:
            self.flush()

    def flush(self) -> None:
        """Make what was written safe on the disk, then say so in the journal."""
        if not self._pending:
            return
        for file_name in {self.place[part].file for entry in self._pending for part in entry["sha256"]}:
            sync(self.partial / file_name)
        with (self.partial / JOURNAL).open("a", encoding="utf-8") as file:
            for entry in self._pending:
                file.write(json.dumps(entry, sort_keys=True) + "\n")
                self.journal[entry["tensor"]] = entry
            file.flush()
            os.fsync(file.fileno())
        self._pending, self._pending_bytes = [], 0

    def verify(self) -> None:
        """Read every stored tensor back, one at a time and not by mapping, and compare. SourceError on a difference."""
        self.flush()
        expected = {part: digest for entry in self.journal.values() for part, digest in entry["sha256"].items()}
        for shard in self.shards:
            path = self.partial / shard.file
            for part, entry in read_header(path).entries.items():
                if hashlib.sha256(bytes_of(read_tensor(path, entry))).hexdigest() != expected.pop(part, None):
                    raise SourceError(
                        f"{path}: {part} reads back other than it was written; the disk or memory is failing"
                    )
        if expected:
            raise SourceError(f"{self.partial}: {next(iter(expected))} was written and cannot be read back")

    def finish(self, manifest: dict[str, Any]) -> None:
        """Write index and manifest, then give the folder its name."""
        try:
            self.flush()
            if len(self.shards) > 1:
                (self.partial / INDEX).write_bytes(index_json(self.shards))
            text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
            (self.partial / MANIFEST).write_text(text, "utf-8")
            (self.partial / JOURNAL).unlink()
            for path in self.partial.iterdir():
                sync(path)
            sync(self.partial)
            self.complete = True
            replace_folder(self.partial, self.out)
        except OSError as error:
            raise self.cannot(error) from error

    def discard(self) -> None:
        """Remove what was written: after an error that a second run would meet again."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def cannot(self, error: OSError) -> OutputError:
        """What to say of an error of the disk; a full one is freed of what was written."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            self.discard()
            return OutputError(
                f"the disk is full at {self.partial}; what was written has been removed: make room and repeat"
            )
        return OutputError(f"cannot write {self.partial}: {error.strerror or error}; check the path and its rights")


def partial_of(out: Path) -> Path:
    """Where the folder `out` is made."""
    return out.with_name(out.name + ".partial")


def head_of(out: str | Path) -> dict[str, Any]:
    """The first line of the journal of an unfinished run; empty where there is none."""
    path = partial_of(Path(out).resolve()) / JOURNAL
    return next(iter(_readable(path)), {}) if path.is_file() else {}


def _readable(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal; one that was cut short by a kill, or never reached the disk, is left out."""
    entries = []
    for line in path.read_bytes().split(b"\n"):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


def _ours(partial: Path) -> bool:
    """Whether a folder without a journal can be of a killed run: before it had one, or when it was complete."""
    return partial.is_dir() and (
        (partial / MANIFEST).is_file() or {p.name for p in partial.iterdir()} <= {_NEW_JOURNAL}
    )


def _is_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def check_apart(model: Path, out: Path) -> None:
    """OutputError when writing `out` would replace the model that is read."""
    if model.exists() and out.resolve() in (model.resolve(), *model.resolve().parents):
        raise OutputError(f"{out} holds the model that is read; give another name")


def replace_folder(fresh: Path, out: Path) -> None:
    """Give the finished folder `fresh` the name `out`. What was there is set aside as OUT.replaced, and removed last.

    OutputError when something else has that name; what a killed run set aside is removed.
    """
    aside = out.with_name(out.name + ".replaced")
    if aside.exists() and (aside / MANIFEST).is_file():
        shutil.rmtree(aside)
    replaced = out.exists()
    if replaced:
        if aside.exists():
            raise OutputError(f"{aside} is in the way of replacing {out}; move it. The new model is in {fresh}")
        os.rename(out, aside)
    os.rename(fresh, out)
    sync(out.parent)
    if replaced:
        shutil.rmtree(aside)


def sync(path: Path) -> None:
    """What is written of a file, or a name in a folder, reaches the disk; Windows can do neither from outside."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
