"""Write a model folder so that nothing is ever half there.

Everything goes to `OUT.partial` beside OUT; a journal names the tensors that are safely on disk. A run that was
killed, at whatever instant, and is started again with the same model, recipe and version goes on after the last of
them, and what it writes is byte for byte the same. The last step renames the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from lowbit.errors import LowbitError, OutputError
from lowbit.interchange.files.atomic import replace_file, sync
from lowbit.interchange.files.finished import MANIFEST, check_written, manifest_text, recorded
from lowbit.interchange.files.places import (
    FULL,
    TakenError,
    os_error_of,
    partial_of,
    remove_folder,
    remove_replaced,
    replace_folder,
)
from lowbit.interchange.files.safetensors_reader import bytes_of, read_header, read_tensor
from lowbit.interchange.files.safetensors_writer import INDEX, Shard, create, index_json
from lowbit.interchange.files.undisturbed import undisturbed

JOURNAL = "journal.jsonl"
_NEW_JOURNAL = JOURNAL + ".new"
_FLUSH = 64 << 20  # bytes written between two entries of the journal reaching the disk
_log = logging.getLogger("lowbit")


class FolderWriter:
    """The folder OUT while it is being made, in a `with`: `write` each tensor, `verify`, `finish`.

    An error that a second run would meet again removes what was written; any other leaves what such a run goes on from,
    and says so in a note. `complete`: everything is written and checked, and only the folder's name is missing.
    `finished`: a run before this one wrote all of it, `journal` is what it had, and nothing is to be done.
    """

    def __init__(
        self, out: str | Path, shards: tuple[Shard, ...], fingerprint: str, origin: Mapping[str, Any],
        overwrite: bool = False, notes: Mapping[str, Any] | None = None, again: bool = True,
    ) -> None:  # fmt: skip
        """OutputError when OUT has something in it, cannot be written, or holds an unfinished other run.

        `origin`: what the manifest says of where the weights came from, by which a finished folder is known. `notes` stand
        in the journal's first line, for `head_of` to find when the run is taken up again. again: whether a second run
        writes the same, so that it may go on from what a first one left.
        """
        if not str(out):
            raise OutputError("the name of the folder to write is empty; give one")
        self.out = Path(out).resolve()
        self.complete = self.finished = self._begun = self._told = False
        self.partial, self.notes, self.origin = partial_of(self.out), dict(notes or {}), dict(origin)
        self.shards, self.overwrite, self._again = shards, overwrite, again
        self.place = {name: shard for shard in shards for name in shard.spans}
        self.journal: dict[str, dict[str, Any]] = {}
        self._pending: list[dict[str, Any]] = []
        self._pending_bytes = self._unsafe = 0  # written and not in the journal; written and perhaps not on the disk
        if self.out.exists() and not self.out.is_dir():
            raise OutputError(f"{self.out} is a file; give a folder to write the model into")
        if os.path.ismount(self.out):
            raise OutputError(
                f"{self.out} is a mount point, which cannot be put in place by rename; give a folder inside it"
            )
        try:
            if self.out.exists() and not overwrite and any(self.out.iterdir()):
                self._take(self.out)
                if not self.finished:
                    raise TakenError(
                        f"{self.out} is not empty; give another folder, or --overwrite (overwrite=True) to replace it"
                    )
                remove_replaced(self.out)
                return
            self._begin(fingerprint)
        except OSError as error:
            raise self.cannot(error) from error

    def _begin(self, fingerprint: str) -> None:
        path = self.partial / JOURNAL
        if path.is_file():
            head, *entries = _readable(path) or [{}]
            if head.get("fingerprint") == fingerprint and self._again:
                intact = {s.file for s in self.shards if _is_size(self.partial / s.file, s.file_bytes)}
                for entry in entries:
                    if all(self.place[part].file in intact for part in entry["sha256"]):
                        self.journal[entry["tensor"]] = entry
                self._begun = True
                create(self.partial, self.shards)
                self._write_journal(head)
                return
            if head and not self.overwrite and head.get("fingerprint") != fingerprint:
                raise TakenError(
                    f"{self.partial} holds an unfinished run of another model, recipe or version; finish that one, "
                    "remove the folder, or pass --overwrite (overwrite=True)"
                )
        elif self.partial.exists():
            if not _ours(self.partial):
                raise OutputError(
                    f"{self.partial} is in the way, and lowbit did not write it; move it, or give another folder"
                )
            self._take(self.partial)
            if self.finished:
                self.complete = True
                replace_folder(self.partial, self.out)
                return
        remove_folder(self.partial)
        needed = sum(shard.file_bytes for shard in self.shards)
        self.partial.mkdir(parents=True)
        self._begun = True
        free = shutil.disk_usage(self.partial).free
        if free < needed:
            self.discard()
            raise OutputError(
                f"{self.out} needs {needed:,} bytes and the disk has {free:,} free; make room or choose another"
            )
        self._write_journal({"fingerprint": fingerprint, **self.notes})  # first of all: it says that the folder is ours
        create(self.partial, self.shards)

    def _take(self, folder: Path) -> None:
        """Be `finished` if `folder` is what this run would write."""
        found = recorded(folder, self.shards, self.origin) if self._again else None
        if found is not None:
            self.journal, self.finished = found, True
            _log.info(f"{self.out} is already done: the same model, recipe and version; every weight was read back")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave only what a second run goes on from, and say so."""
        if error is None or self.finished or self._told:
            return
        with undisturbed():
            self._leave(error)

    def _leave(self, error: BaseException) -> None:
        system = os_error_of(error.__cause__ if isinstance(error, OutputError) else error)
        if system is not None:
            raise self.cannot(system) from error
        if self.complete and not self.partial.exists():
            error.add_note(f"{self.out} is written and whole")
        elif self.complete:
            error.add_note(f"{self.partial} is whole, and the same command puts it in its place")
        elif isinstance(error, LowbitError) or not self._worth_keeping():
            self.discard()
        else:
            error.add_note(f"{self.partial} keeps what was done, and the same command goes on from it")

    def _worth_keeping(self) -> bool:
        """Whether a second run would find work that is done; what was written and not yet said is said now."""
        with contextlib.suppress(OSError):
            self.flush()
        files = {shard.file for shard in self.shards} | {JOURNAL, _NEW_JOURNAL}
        return bool(self.journal) or (
            self.partial.is_dir() and any(p.name not in files for p in self.partial.iterdir())
        )

    def _write_journal(self, head: dict[str, Any]) -> None:
        """The journal as a whole, put in its place by rename: a kill leaves the old one or the new one."""
        fresh = self.partial / _NEW_JOURNAL
        with fresh.open("w", encoding="utf-8") as file:
            for entry in (head, *self.journal.values()):
                file.write(json.dumps(entry, sort_keys=True) + "\n")
        replace_file(fresh, self.partial / JOURNAL)

    def write(self, name: str, stored: dict[str, Tensor], **facts: Any) -> None:
        """Put the stored tensors of `name` in their places and enter it, with `facts`, in the journal."""
        try:
            self.enter(name, facts, self.put(stored))
        except OSError as error:
            raise self.cannot(error) from error

    def put(self, stored: Mapping[str, Tensor]) -> dict[str, str]:
        """The first half of `write`, which may run in another thread: the bytes; returns the SHA-256 of each. OSError."""
        hashes = {part: self._put(part, tensor) for part, tensor in stored.items()}
        self._unsafe += sum(tensor.nbytes for tensor in stored.values())
        if self._unsafe >= _FLUSH:  # so that `flush` has little left to wait for
            self._unsafe = 0
            for file_name in {self.place[part].file for part in stored}:
                sync(self.partial / file_name)
        return hashes

    def enter(self, name: str, facts: Mapping[str, Any], hashes: Mapping[str, str]) -> None:
        """The second half: the entry in the journal. OSError."""
        self._pending_bytes += sum(end - begin for begin, end in (self.place[p].spans[p] for p in hashes))
        self._enter({"tensor": name, "sha256": dict(hashes), **facts})

    def rewrite(self, name: str, stored: dict[str, Tensor], **facts: Any) -> None:
        """Replace some of the stored tensors of `name`, which is in the journal, and add `facts` to its entry.

        A kill in between leaves new bytes under an old hash, so that the caller must be able to repeat it.
        """
        try:
            hashes = {part: self._put(part, tensor) for part, tensor in stored.items()}
            self._pending_bytes += sum(tensor.nbytes for tensor in stored.values())
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
        sync(self.partial / JOURNAL)
        self._pending, self._pending_bytes = [], 0

    def verify(self) -> None:
        """Read every stored tensor back and compare. SourceError on a difference."""
        self.flush()
        check_written(self.partial, self.shards, self.journal)

    def finish(self) -> None:
        """Write index and manifest, then give the folder its name."""
        try:
            self.flush()
            if len(self.shards) > 1:
                (self.partial / INDEX).write_bytes(index_json(self.shards))
            (self.partial / MANIFEST).write_text(manifest_text(self.origin, self.journal), "utf-8")
            for path in self.partial.iterdir():
                sync(path)
            (self.partial / JOURNAL).unlink()  # from here on the manifest says what the folder is
            self.complete = True
            sync(self.partial)
            replace_folder(self.partial, self.out)
        except OSError as error:
            raise self.cannot(error) from error

    def discard(self) -> None:
        """Remove what was written: after an error that a second run would meet again."""
        remove_folder(self.partial)

    def cannot(self, error: OSError) -> OutputError:
        """What to say of an error of the system; what was done before it is kept, and where nothing was, nothing is."""
        self._told = True
        full, reason = error.errno in FULL, error.strerror or str(error)
        what = f"the disk is full at {self.partial} ({reason})" if full else f"cannot write {self.partial}: {reason}"
        remedy = "make room" if full else "check the path and its permissions"
        if self.complete:
            return OutputError(f"{what}; it is whole: {remedy}, and the same command puts it in its place")
        if self._begun and self._worth_keeping():
            return OutputError(f"{what}; what was done is kept there: {remedy}, and the same command goes on from it")
        if self._begun:
            self.discard()
        return OutputError(
            f"{what}; nothing was kept: {remedy} and repeat" if self._begun or full else f"{what}; {remedy}"
        )


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
