"""Quality of models that are never whole in memory: windows of text run through one block after the other, read from the model's files.

Both models see the same windows, first the float model and then the other; what their last blocks returned lies in files. Then the
logits of some tokens at a time are computed by both and compared. Masks, positions and everything else between the blocks come from the
model's own code, and every product is computed in float32, so the figures are those of the whole models in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn

from lowbit.blockwise.stored_walk import Stored, StoredWalk
from lowbit.errors import SourceError
from lowbit.interchange.files.undisturbed import temporary_folder
from lowbit.interchange.hf.models import meta_model
from lowbit.interchange.hf.running import check_vocabulary
from lowbit.interchange.readers.lowbit_folder import LowbitFolder
from lowbit.interchange.source import Source
from lowbit.kernels.heap import trim
from lowbit.measure.kept import NOTHING_KEPT, Figures, Kept
from lowbit.measure.quality import Progress, Quality, check_base, compare_logits, quality_of
from lowbit.measure.scoring import kind_of, scored
from lowbit.measure.windows import Windows
from lowbit.planning.measuring import LOGITS, vocabulary_of

PROGRAM = "transformers, float32, block by block"


@dataclass(frozen=True, eq=False)
class Streamed:
    """A model in files that is measured block by block. module: the same without memory for its weights, to be asked what it is."""

    stored: Stored
    module: nn.Module

    @staticmethod
    def of(model: Source | LowbitFolder) -> Streamed:
        """A float model, or a folder that lowbit wrote. SourceError for one without a transformers config."""
        stored = Stored.of_folder(model) if isinstance(model, LowbitFolder) else Stored.of_source(model)
        if stored.source.config is None:
            raise SourceError(f"{stored.source.label} has no transformers config to build a model from")
        return Streamed(stored, meta_model(stored.source.config))

    @property
    def kind(self) -> str:
        """How it is scored: 'causal', 'seq2seq' or 'masked'."""
        return kind_of(self.module)

    def walk(self, windows: Windows, folder: Path) -> StoredWalk:
        """A pass over `windows`; `folder`: of what is kept on the disk."""
        check_vocabulary(self.module, windows.ids)
        return StoredWalk(self.stored, windows.ids, folder, copying=self.kind == "seq2seq")


class StreamedReference:
    """The float model with its windows, which go through its blocks once for all the models that are held against it."""

    def __init__(self, model: Streamed, windows: Windows, folder: Path) -> None:
        self.model, self.windows = model, windows
        self._folder = folder
        self._walk: StoredWalk | None = None
        self._through = False

    def walk(self) -> StoredWalk:
        """The pass, before or behind its blocks."""
        if self._walk is None:
            self._walk = self.model.walk(self.windows, self._folder)
        return self._walk

    @property
    def left(self) -> int:
        """How many blocks are to be run."""
        return 0 if self._through else self.walk().left

    def run(self, on_block: Callable[[], None]) -> StoredWalk:
        """The pass behind its blocks."""
        walk = self.walk()
        if not self._through:
            walk.run_blocks(on_block)
            self._through = True
        return walk

    def end(self) -> None:
        """Remove what is kept on the disk."""
        if self._walk is not None:
            self._walk.end()
        self._walk, self._through = None, False


def stream_quality(
    model: Streamed, windows: Windows, *, base: Streamed | StreamedReference | None = None, progress: Progress | None = None,
    kept: Kept = NOTHING_KEPT,
) -> Quality:  # fmt: skip
    """As `measure_quality` of the whole models in float32, by `stream_figures`."""
    parts = stream_figures(model, windows, base=base, progress=progress, kept=kept)
    return replace(quality_of(model.kind, windows, parts), program=PROGRAM)


def stream_figures(
    model: Streamed, windows: Windows, *, base: Streamed | StreamedReference | None = None, progress: Progress | None = None,
    kept: Kept = NOTHING_KEPT,
) -> list[Figures]:  # fmt: skip
    """The figures of every window. progress: (blocks and windows done, all of both models).

    kept: where finished windows and blocks are kept, from which a run that was killed goes on. base: a StreamedReference is of the same
    windows, and stays for the next model; one of `model` itself is held against itself.
    """
    theirs = base.model if isinstance(base, StreamedReference) else base
    if theirs is not None and theirs.kind != model.kind:
        raise SourceError(f"a {model.kind} model cannot be compared with a {theirs.kind} one: load both alike")
    known = kept.figures(windows.count)
    if len(known) < windows.count:
        with _folder(kept) as folder:
            reference = StreamedReference(base, windows, folder / "float") if isinstance(base, Streamed) else base
            itself = reference is not None and reference.model is model
            walk = reference.walk() if itself and reference is not None else model.walk(windows, folder / "model")
            total = (
                windows.count - len(known) + (0 if itself else walk.left) + (0 if reference is None else reference.left)
            )
            done = iter(range(1, total + 1))

            def step() -> None:
                if progress is not None:
                    progress(next(done), total)

            right = None if reference is None else reference.run(step)
            if not itself:
                walk.run_blocks(step)
            for index, figures in _compared(model.kind, windows, walk, right, frozenset(known)):
                check_base(figures)
                kept.add(index, figures)
                known[index] = figures
                step()
            if not itself:
                walk.end()
            if reference is not None and reference is not base:
                reference.end()
        trim()
    return [known[index] for index in range(windows.count)]


def _compared(
    kind: str, windows: Windows, walk: StoredWalk, right: StoredWalk | None, known: frozenset[int]
) -> Iterator[tuple[int, Figures]]:
    """The figures of every window that is not `known`, by its number. The logits of a few rows of it are in memory at a time."""
    scored_rows = scored(kind, windows.length, windows.frame)
    late = int(kind == "causal")  # row t predicts token t + 1
    every = range(scored_rows.start - late, scored_rows.stop - late)
    first = 0
    for batch, ids in enumerate(walk.batches):
        indices = range(first, first + len(ids))
        first += len(ids)
        if known.issuperset(indices):
            continue
        found: dict[int, list[Figures]] = {index: [] for index in indices}
        for rows in _slices(every, walk, len(ids)):
            logits = walk.logits(batch, rows)
            base = None if right is None else logits if right is walk else right.logits(batch, rows)
            for at, index in enumerate(indices):
                targets = ids[at, rows.start + late : rows.stop + late]
                found[index].append(compare_logits(logits[at], targets, None if base is None else base[at]))
            del logits, base
        for index, parts in found.items():
            if index not in known:
                yield index, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _slices(every: range, walk: StoredWalk, together: int) -> Iterator[range]:
    """Rows of which the logits of so many windows take no more than LOGITS; all of them where the model gives them only so."""
    config = walk.module.config
    vocabulary = vocabulary_of(config) or 1 << 17
    step = max(1, LOGITS // (4 * int(vocabulary) * together)) if walk.slices_logits else len(every)
    return (every[start : start + step] for start in range(0, len(every), step))


@contextmanager
def _folder(kept: Kept) -> Iterator[Path]:
    """Where blocks keep what they return."""
    if kept.folder is not None:
        yield kept.folder
        return
    with temporary_folder() as folder:
        yield folder
