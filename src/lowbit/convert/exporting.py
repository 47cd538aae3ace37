"""Export: check, write under another name, read back, compare, and only then give it its name."""

from __future__ import annotations

import filecmp
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.convert.cache_handover import handover
from lowbit.convert.conversions import Conversion, conversions, converted, sentences
from lowbit.convert.instead import command_for_folder
from lowbit.convert.read_back import compared
from lowbit.convert.refusal import check_kv, refuse
from lowbit.display import Displayed
from lowbit.errors import LowbitError, OutputError, RecipeError
from lowbit.interchange.exporters.exporter import Exporter, exporter_named
from lowbit.interchange.files.atomic import replace_file, sync
from lowbit.interchange.files.lock import locked
from lowbit.interchange.files.places import TakenError, check_apart, os_error_of, remove_replaced, replace_folder
from lowbit.interchange.files.undisturbed import temporary_folder
from lowbit.interchange.model_card import README, is_marked, text_of
from lowbit.interchange.progress import Progress, heard
from lowbit.interchange.readers.lowbit_folder import LowbitFolder
from lowbit.interchange.tensors import Contents

_EXTRA = 64 << 20  # bytes of vocabularies and the like in a file of weights
_log = logging.getLogger("lowbit")


@dataclass(frozen=True, repr=False)
class Exported(Displayed):
    """What was written, and how far it is from ours when read back.

    `weights`: the largest |a - b| / |b| of a weight, 0 when all are equal. `logits`: the same of the logits of a few
    tokens; None where the float model would not fit into this machine's memory. `notes`: what else people should know.
    `unequal`: the weights that are not equal. `conversions`: what is not written as the folder has it, and what that cost.
    """

    path: Path
    target: str
    nbytes: int
    weights: float
    logits: float | None
    notes: tuple[str, ...] = ()
    unequal: tuple[str, ...] = ()
    conversions: tuple[Conversion, ...] = ()

    def _brief(self) -> str:
        return f"{self.target}, {self.path}, {self.nbytes:,} bytes"

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            "path": str(self.path), "target": self.target, "bytes": self.nbytes, "weights": self.weights,
            "unequal": list(self.unequal), "logits": self.logits, "notes": list(self.notes),
            "conversions": [each.to_json() for each in self.conversions],
        }  # fmt: skip


def export(
    model: Any, target: str, out: str | Path | None = None, *, kv: str | None = None, calibration: Any = None,
    samples: int | None = None, length: int | None = None, chat: bool = False, overwrite: bool = False,
    progress: Progress | bool | None = None,
) -> Exported:  # fmt: skip
    """Write a quantized model in the format of another program: `target` is a name such as `gguf`.

    `model`: a folder that lowbit wrote, or what `quantize` returned with one. `out`: FOLDER with the exporter's ending
    when left out. What was written is read back and compared with ours before it gets its name.

    `kv`: what the exporter's program shall keep keys and values in, `fp8`; their scales are written, of the largest that the
    quantized model makes of `calibration`, a text as in `quantize` (None: "self"), `samples` windows of `length` tokens, in the chat
    template where `chat` is set. `progress(name, bytes done, bytes in all)`; reading back
    counts again from nothing, and says so in the name.
    ExportError when the exporter cannot hold the model, with the reason for each tensor and the nearest that it can hold.

    >>> lowbit.export(quantized, "gptq", folder / "for-gptq").weights < 1e-3  # what is kept in float is float16 there
    True
    """
    kind = exporter_named(target)
    folder = LowbitFolder(_folder_of(model))
    refuse_folder(kind, folder)
    out = Path(out) if out is not None else default_out(folder.folder, kind)
    check_apart(folder.folder, out)
    text = {"calibration": calibration, "samples": samples, "length": length, "chat": chat}
    if kv is None and (ignored := [name for name, value in text.items() if value]):
        raise RecipeError(
            f"{' and '.join(ignored)} would be ignored: the weights are quantized already, and only kv looks at text in an export"
        )
    with locked(out):
        return written(kind, folder, out, kv, text, overwrite, heard(progress))


def written(
    kind: Exporter, folder: LowbitFolder, out: Path, kv: str | None, text: dict[str, Any], overwrite: bool,
    progress: Progress | None = None,
) -> Exported:  # fmt: skip
    """`export` of what was checked, onto an output that nobody else writes."""
    as_written = converted(kind, folder)
    check_free(out, kind, overwrite, as_written.contents)
    cost = handover(kind, folder) if kv is None else []
    if kv is not None:
        from lowbit.convert.kv_ranges import with_kv

        check_kv(kind, kv, folder.contents)
        kind, note = with_kv(kind, folder, kv, text, progress)
        cost = [note]
    place = out.resolve()
    try:
        with temporary_folder(_without_old(place), place.parent) as temporary:
            fresh = temporary / place.name
            kind.write(as_written, fresh, progress)
            apart, logits = compared(kind, folder, as_written, fresh, progress)
            for path in (fresh, *(fresh.rglob("*") if fresh.is_dir() else ())):
                sync(path)
            size = sum(p.stat().st_size for p in ([fresh] if fresh.is_file() else fresh.rglob("*")) if p.is_file())
            _put(fresh, place, out, overwrite)
    except Exception as error:
        system = os_error_of(error)
        if system is None or isinstance(error, LowbitError):
            raise
        raise _cannot(out, system) from error
    changed = conversions(kind, folder, as_written, apart)
    left = () if kind.suffix else folder.left_files()
    notes = (*kind.notes(as_written.contents), *sentences(kind, changed), *cost, *left)
    return Exported(out, kind.name, size, max(apart.values(), default=0.0), logits, notes, tuple(apart), changed)


def _put(fresh: Path, place: Path, out: Path, overwrite: bool) -> None:
    """Give what was written its name. What a run that was killed at its very end put there already is left as it is."""
    if _taken(place) and not overwrite:
        if not _same(fresh, place):
            raise _exists(out)
        _log.info(f"{out} is already done: it has the very bytes that this export writes")
        remove_replaced(place)
    elif fresh.is_file():
        replace_file(fresh, place)
    else:
        replace_folder(fresh, place)


def _same(fresh: Path, place: Path) -> bool:
    """Whether every file of `fresh` is at `place` too, with the same bytes; README.md may be lowbit's there, which comes later."""
    pairs = [(fresh, place)] if fresh.is_file() else [(p, place / p.relative_to(fresh)) for p in fresh.rglob("*")]
    described = place.is_dir() and is_marked(text_of(place / README))
    pairs = [(a, b) for a, b in pairs if not (described and b == place / README)]
    return all(b.is_file() and filecmp.cmp(a, b, shallow=False) for a, b in pairs if a.is_file())


def _without_old(out: Path) -> str:
    """How the name of a folder to write `out` in begins, with the number of this process. Those of processes that were killed
    are removed."""
    name = f"{out.name}.exporting-"
    for old in out.parent.iterdir():
        if old.name.startswith(name) and not _alive(old.name.removeprefix(name).partition("-")[0]):
            shutil.rmtree(old, ignore_errors=True)
    return f"{name}{os.getpid()}-"


def _alive(process: str) -> bool:
    """Whether a process of this number runs; yes where that is not known."""
    if os.name != "posix" or not process.isdecimal():
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


def default_out(folder: Path, kind: Exporter) -> Path:
    """FOLDER.gguf for a file, FOLDER-vllm for a folder."""
    name = folder.resolve().name
    return folder.resolve().with_name(f"{name}{kind.suffix}" if kind.suffix else f"{name}-{kind.name}")


def refuse_folder(kind: Exporter, folder: LowbitFolder) -> None:
    """ExportError when the exporter cannot hold a folder, not even with the tensors converted that it names."""
    contents = converted(kind, folder).contents
    problems = kind.check(contents) or kind.check_tokenizer(folder.tokenizer(), contents)
    if problems:
        refuse(kind, problems, command_for_folder(kind, folder))


def _folder_of(model: Any) -> Path:
    if isinstance(model, (str, Path)):
        return Path(model)
    folder = getattr(model, "folder", None)
    if folder is None:
        raise RecipeError("export takes a folder that lowbit wrote, or the result of quantize with one; save it first")
    return Path(folder)


def check_free(out: Path, kind: Exporter, overwrite: bool, contents: Contents) -> None:
    """OutputError when `out` cannot be given to what is to be written.

    What is there may be what this very export wrote, when it was killed as it ended: then its weights are about as large.
    """
    if kind.suffix and out.suffix != kind.suffix:
        raise OutputError(f"{kind.name} writes one file, whose name ends in {kind.suffix}; {out} does not")
    if kind.suffix and out.is_dir():
        raise OutputError(f"{out} is a folder; give the name of a file")
    if not kind.suffix and out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; give a folder")
    if _taken(out) and not overwrite:
        files = [out] if out.is_file() else list(out.glob("*.safetensors"))
        size, wanted = sum(f.stat().st_size for f in files), sum(t.bytes_after for t in contents.tensors.values())
        if not files or abs(size - wanted) > wanted // 2 + _EXTRA:
            raise _exists(out)


def _taken(out: Path) -> bool:
    return out.exists() and (out.is_file() or any(out.iterdir()))


def _exists(out: Path) -> OutputError:
    return TakenError(f"{out} exists; give another name, or --overwrite (overwrite=True) to replace it")


def _cannot(out: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot write {out}: {error.strerror or error}; check the path, its permissions and the room on the disk; "
        "nothing was kept of the export"
    )
