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
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.errors import OutputError, SourceError
from lowbit.interchange.safetensors_file import bytes_of
from lowbit.interchange.safetensors_writer import INDEX, Shard, create, index_json

JOURNAL = "journal.jsonl"
MANIFEST = "lowbit.json"
_FLUSH = 64 << 20  # bytes written between two entries of the journal reaching the disk


class FolderWriter:
    """The folder OUT while it is being made. Use as a context: leaving it without `finish` keeps what can be resumed."""

    def __init__(self, out: str | Path, shards: tuple[Shard, ...], fingerprint: str, overwrite: bool = False) -> None:
        """OutputError when OUT has something in it, cannot be written, or holds an unfinished other run."""
        self.out = Path(out)
        self.partial = self.out.with_name(self.out.name + ".partial")
        self.shards, self.overwrite = shards, overwrite
        self.place = {name: shard for shard in shards for name in shard.spans}
        self.journal: dict[str, dict[str, Any]] = {}
        self._pending: list[dict[str, Any]] = []
        self._pending_bytes = 0
        if self.out.exists() and not self.out.is_dir():
            raise OutputError(f"{self.out} is a file; give a folder to write the model into")
        if self.out.exists() and not overwrite and any(self.out.iterdir()):
            raise OutputError(f"{self.out} is not empty; give another folder, or --overwrite (overwrite=True) to replace it")
        try:
            self._begin(fingerprint)
        except OSError as error:
            raise self._cannot(error) from error

    def _begin(self, fingerprint: str) -> None:
        path = self.partial / JOURNAL
        if path.is_file():
            lines = path.read_text("utf-8").split("\n")
            head = json.loads(lines[0]) if lines[0].endswith("}") else {}
            if head.get("fingerprint") == fingerprint:
                for line in lines[1:]:
                    if line.endswith("}"):  # a line cut short by a kill is not trusted
                        entry = json.loads(line)
                        self.journal[entry["tensor"]] = entry
                create(self.partial, self.shards)
                self._rewrite_journal(head)
                return
            if not self.overwrite:
                raise OutputError(
                    f"{self.partial} holds an unfinished run of another model, recipe or version; finish that one, "
                    "remove the folder, or pass --overwrite (overwrite=True)"
                )
        if self.partial.exists():
            shutil.rmtree(self.partial)
        needed = sum(shard.file_bytes for shard in self.shards)
        self.partial.mkdir(parents=True)
        free = shutil.disk_usage(self.partial).free
        if free < needed:
            self.discard()
            raise OutputError(f"{self.out} needs {needed:,} bytes and the disk has {free:,} free; make room or choose another")
        create(self.partial, self.shards)
        self._rewrite_journal({"fingerprint": fingerprint})

    def _rewrite_journal(self, head: dict[str, Any]) -> None:
        with (self.partial / JOURNAL).open("w", encoding="utf-8") as file:
            for entry in (head, *self.journal.values()):
                file.write(json.dumps(entry, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write(self, name: str, stored: dict[str, Tensor], **facts: Any) -> None:
        """Put the stored tensors of `name` in their places and enter it, with `facts`, in the journal."""
        hashes = {}
        try:
            for part, tensor in stored.items():
                raw = bytes_of(tensor)
                begin, end = self.place[part].spans[part]
                if len(raw) != end - begin:
                    raise OutputError(f"{part} takes {len(raw)} bytes and was planned with {end - begin}")
                hashes[part] = hashlib.sha256(raw).hexdigest()
                with (self.partial / self.place[part].file).open("r+b") as file:
                    file.seek(begin)
                    file.write(raw)
                self._pending_bytes += len(raw)
            self._pending.append({"tensor": name, "sha256": hashes, **facts})
            if self._pending_bytes >= _FLUSH:
                self.flush()
        except OSError as error:
            raise self._cannot(error) from error

    def flush(self) -> None:
        """Make what was written safe on the disk, then say so in the journal."""
        if not self._pending:
            return
        for file_name in {self.place[part].file for entry in self._pending for part in entry["sha256"]}:
            _sync(self.partial / file_name)
        with (self.partial / JOURNAL).open("a", encoding="utf-8") as file:
            for entry in self._pending:
                file.write(json.dumps(entry, sort_keys=True) + "\n")
                self.journal[entry["tensor"]] = entry
            file.flush()
            os.fsync(file.fileno())
        self._pending, self._pending_bytes = [], 0

    def verify(self) -> None:
        """Read every stored tensor back with the safetensors library and compare. SourceError on a difference."""
        from safetensors import safe_open

        self.flush()
        expected = {part: digest for entry in self.journal.values() for part, digest in entry["sha256"].items()}
        for shard in self.shards:
            path = self.partial / shard.file
            with safe_open(path, framework="pt") as file:
                for part in file.keys():  # noqa: SIM118 (safe_open has no __iter__)
                    if hashlib.sha256(bytes_of(file.get_tensor(part))).hexdigest() != expected.pop(part, None):
                        raise SourceError(f"{path}: {part} reads back other than it was written; the disk or memory is failing")
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
                _sync(path)
            _sync(self.partial)
            if self.out.is_dir() and not any(self.out.iterdir()):
                self.out.rmdir()
            old = self.out.with_name(self.out.name + ".replaced")
            if self.out.exists():
                os.rename(self.out, old)
            os.rename(self.partial, self.out)
            if old.exists():
                shutil.rmtree(old)
        except OSError as error:
            raise self._cannot(error) from error

    def discard(self) -> None:
        """Remove what was written: after an error that a second run would meet again."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def _cannot(self, error: OSError) -> OutputError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            self.discard()
            return OutputError(f"the disk is full at {self.partial}; what was written has been removed: make room and repeat")
        return OutputError(f"cannot write {self.partial}: {error.strerror or error}; check the path and its rights")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
