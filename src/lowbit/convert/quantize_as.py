"""Straight from a float model to another program's format, through a folder of lowbit where a killed run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowbit.calibration.data import SELF, load_calibration
from lowbit.convert.cache_handover import check_cache
from lowbit.convert.exporting import Exported, check_free, refuse_folder, written
from lowbit.convert.instead import MODEL, base_of, command
from lowbit.convert.preparing import Prepared, contents_of, planned
from lowbit.errors import ExportError, LowbitError, OutputError
from lowbit.interchange.exporters.exporter import exporter_named
from lowbit.interchange.files.finished import MANIFEST
from lowbit.interchange.files.lock import locked
from lowbit.interchange.files.places import TakenError, remove_folder
from lowbit.interchange.opening import check_output, open_source
from lowbit.interchange.progress import READ_BACK, Progress, heard
from lowbit.interchange.readers.lowbit_folder import LowbitFolder
from lowbit.pipeline.api import Quantized, quantize
from lowbit.pipeline.choosing import decided
from lowbit.pipeline.effort import NONE, Decision
from lowbit.pipeline.options import Options
from lowbit.recipes.recipe import Recipe

_TEXT = ("calibration", "samples", "length", "chat")


def prepare(
    model: Any, recipe: str | Recipe, target: str, *, calibrated: bool = False, tokenizer: Any = None,
    kv: str | None = None,
) -> Prepared:  # fmt: skip
    """What `recipe` means for an exporter and a float model, checked; no weight is read.

    `calibrated`: whether calibration text is at hand. `kv` as in `export`. ExportError when the exporter cannot hold it, with the nearest.
    """
    kind, source = exporter_named(target), open_source(model, tokenizer=tokenizer)
    try:
        ready = planned(kind, source, recipe, calibrated, kv)
    except ExportError as error:
        name, base = base_of(recipe)
        named = str(model) if isinstance(model, (str, Path)) else MODEL
        instead = command(kind, source, named, name, base, calibrated) if kv is None else ""
        raise (ExportError(f"{error}; this works: {instead}") if instead else error) from None
    check_cache(kind, ready.recipe.cache)
    return ready


def prepare_for(
    model: Any, recipe: str | Recipe, target: str, effort: str, options: Options, place: str | Path | None = None,
    kv: str | None = None, told: bool = False,
) -> tuple[Prepared, Decision]:  # fmt: skip
    """The same where the effort decides whether there is text, and what is done about it; see `decided`. place: where lowbit's folder goes."""
    looks = options.calibration is not None
    ready = {looks: prepare(model, recipe, target, calibrated=looks, tokenizer=options.tokenizer, kv=kv)}
    if effort != NONE.name or looks:
        ready[not looks] = prepare(model, recipe, target, calibrated=not looks, tokenizer=options.tokenizer, kv=kv)
    plain, solved = ready[False].recipe, ready.get(True, ready[False]).recipe
    decision = decided(model, plain, effort, options, place, calibrated=solved, told=told)
    return ready[decision.recipe == solved] if len(ready) > 1 else ready[looks], decision


@contextmanager
def quantized_as(
    model: Any, ready: Prepared, out: str | Path, *, keep: str | Path | None = None, overwrite: bool = False,
    tokenizer: Any = None, **options: Any,
) -> Iterator[tuple[Quantized, Exported]]:  # fmt: skip
    """Quantize a float model into the format of another program, by what `prepare` made of the recipe.

    The folder of lowbit that stands between is OUT.lowbit, where a killed run goes on; it can be measured inside the
    `with`, and is removed at its end. `keep` names one to keep instead. Other options are those of `quantize`. Calibration
    text serves a KV cache that was asked for too, and alone where the recipe does not look at it.
    """
    out = Path(out)
    check_output(model, out)
    folder = work_folder(out) if keep is None else Path(keep)
    if folder.resolve() == out.resolve():
        raise OutputError(f"--keep and --out (keep and out) both name {out}; give two names")
    if keep is None and folder.exists() and not (folder / MANIFEST).is_file():
        raise OutputError(
            f"{folder} is in the way, and lowbit did not write it; move it, or give another name than {out}"
        )
    text: dict[str, Any] = {}
    if isinstance(options.get("calibration"), Iterator):
        options["calibration"] = list(options["calibration"])  # it may be read twice
    if ready.kv is not None:
        text = {name: options[name] for name in _TEXT if name in options}
        if not ready.recipe.uses_calibration:
            options = {name: value for name, value in options.items() if name not in _TEXT}
            if text.get("calibration") is not None and not _is_self(text["calibration"]):
                # A text that cannot be used is better known now than after the work.
                load_calibration(tokenizer=tokenizer, model=open_source(model, tokenizer=tokenizer), **_source(text))
    with locked(out):
        check_free(out, ready.exporter, overwrite, contents_of(ready.plan, open_source(model, tokenizer=tokenizer)))
        options |= {"tokenizer": tokenizer}
        try:
            made = quantize(model, ready.recipe, folder, overwrite=overwrite and keep is not None, **options)
        except TakenError:
            if keep is not None:
                raise
            made = quantize(model, ready.recipe, folder, overwrite=True, **options)  # of another run that was killed
        except KeyboardInterrupt as error:
            if (folder / MANIFEST).is_file() and not getattr(error, "__notes__", ()):
                error.add_note(_goes_on(folder))
            raise
        try:
            yield made, _exported(ready, folder, out, text, overwrite, heard(options.get("progress")))
        except BaseException as error:
            if any(note.startswith(str(folder)) for note in getattr(error, "__notes__", ())):
                keep = folder
            raise
        finally:
            if keep is None:
                remove_folder(folder)


def _exported(
    ready: Prepared, folder: Path, out: Path, text: dict[str, Any], overwrite: bool, progress: Progress | None
) -> Exported:
    """The folder of lowbit that stands between, exported. An error that mending the place mends notes that it is kept."""

    def tell(name: str, done: int, total: int) -> None:
        if progress is not None:
            progress(name if name.startswith(READ_BACK) else f"writing for {ready.exporter.name}: {name}", done, total)

    try:
        packed = LowbitFolder(folder)
        refuse_folder(ready.exporter, packed)
        given = {"calibration": None, "samples": None, "length": None, "chat": False} | text
        return written(ready.exporter, packed, out, ready.kv, given, overwrite, tell)
    except BaseException as error:
        if not isinstance(error, LowbitError) or type(error) is OutputError:
            error.add_note(_goes_on(folder))
        raise


def _goes_on(folder: Path) -> str:
    return f"{folder} is done, and the same command goes on from it"


def _is_self(calibration: Any) -> bool:
    return isinstance(calibration, str) and calibration == SELF


def _source(text: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `quantize` as those of `load_calibration`."""
    return {"source" if name == "calibration" else name: value for name, value in text.items()}


def work_folder(out: Path) -> Path:
    """Where the folder of lowbit stands while `out` is made."""
    return out.with_name(out.name + ".lowbit")
