"""The driver: a plan carried out, from a source to a folder, one tensor or one block at a time."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path

import torch

from lowbit.blockwise.model_tuner import tune_folder
from lowbit.blockwise.quantizing import BlockwiseQuantizer
from lowbit.blockwise.range_survey import survey_entry
from lowbit.blockwise.walk import STATES
from lowbit.calibration.data import Calibration
from lowbit.interchange.files.folder_writer import FolderWriter
from lowbit.interchange.files.safetensors_reader import bytes_of
from lowbit.interchange.hf.running import fast_dtype
from lowbit.interchange.source import Source
from lowbit.interchange.tensors import TensorPlan
from lowbit.pipeline.manifest import check_loads, origin, write_config
from lowbit.pipeline.options import DEFAULTS, EFFORT, Options
from lowbit.pipeline.overlap import Behind, read_ahead
from lowbit.pipeline.report import Report, make_report, solved_facts
from lowbit.planning.plan import READ_AHEAD, WRITE_BEHIND, Plan
from lowbit.solvers.in_core import made_by
from lowbit.version import __version__
from lowbit.weights.solve import Solved, solve

Results = Iterator[tuple[Solved, str]]  # what weights became, with the SHA-256 of their source bytes


def fingerprint(
    plan: Plan, source: Source, device: torch.device | str = "cpu", calibration: Calibration | None = None
) -> str:
    """What makes two runs the same: model, recipe, calibration text, layout, versions, kind of device."""
    import transformers

    facts = {
        "transformers": transformers.__version__, "device": torch.device(device).type,
        "source": source.identity(), "recipe": str(plan.recipe), "version": __version__,
        "calibration": calibration and calibration.sha256,
        "settings": calibration and {"autocast": fast_dtype() != torch.float32},
        "torch": torch.__version__, "solved_by": made_by(), "headers": [hashlib.sha256(s.header).hexdigest() for s in plan.shards],
    }  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def solved_results(
    plan: Plan, source: Source, options: Options, text: Calibration | None, folder: Path,
    done: frozenset[str] = frozenset(), flush: Callable[[], None] = lambda: None, behind: Behind | None = None,
) -> Results:  # fmt: skip
    """Every tensor of the plan that is not `done`, solved: with `text` block by block, in the order of the model.

    `folder`: of what a run over text keeps on the disk. Of blocks that are done in part all is solved again. `flush` makes
    what was yielded safe. `behind`: where what was yielded waits to be put away, and only then is done.
    """
    reports = _Reports(plan, options, behind)
    if text is None:
        return reports.told(_solved_alone(plan, source, options, done, reports.begins), done)
    run = BlockwiseQuantizer(
        plan, source, text, folder, fast_dtype(), flush, lambda name: reports.begins(f"{name}: reading the text")
    )
    return reports.told(run.results(), run.finished)


def _solved_alone(
    plan: Plan, source: Source, options: Options, done: frozenset[str], begins: Callable[[str], None]
) -> Results:
    def read(tensor: TensorPlan) -> tuple[torch.Tensor, str]:
        weight = source.read(tensor.name)
        return weight, hashlib.sha256(bytes_of(weight)).hexdigest()

    left = [(tensor, tensor.reading_bytes) for tensor in plan.tensors if tensor.name not in done]
    room = max((size for _, size in left), default=0) + READ_AHEAD
    for tensor, found in read_ahead(left, read, room):
        begins(tensor.name)
        weight, digest = found
        yield solve(tensor, weight, plan.recipe, options.device), digest
        del weight, found


class _Reports:
    """What is said of a run to `on_layer` and `progress`, in order: that a tensor is done, not before it is put away."""

    def __init__(self, plan: Plan, options: Options, behind: Behind | None = None) -> None:
        self._plan, self._options, self._behind = plan, options, behind
        self._at = self._done = 0  # bytes, and tensors of this run
        self._unsaid = deque[str | Solved]()  # what begins, and what is done

    def begins(self, what: str) -> None:
        """Work that takes a while begins, and nothing more is done yet."""
        self._unsaid.append(what)
        self._say()

    def told(self, results: Results, done: frozenset[str]) -> Results:
        """The results as they are, each said; `done`: those that do not come any more."""
        self._at = sum(t.bytes_before for t in self._plan.tensors if t.name in done)
        if self._at:
            self.begins("going on")
        for solved, digest in results:
            yield solved, digest
            self._unsaid.append(solved)
            del solved
            self._say()
        self._say(wait=True)

    def _say(self, wait: bool = False) -> None:
        """All that may be said by now, or, with `wait`, all."""
        while self._unsaid:
            what = self._unsaid[0]
            if isinstance(what, Solved):
                if self._behind is not None and not self._behind.has_done(self._done + 1, wait):
                    return
                self._done += 1
                self._at += what.plan.bytes_before
                if self._options.on_layer:
                    self._options.on_layer(what)
            self._unsaid.popleft()
            if self._options.progress:
                name = what if isinstance(what, str) else what.plan.name
                self._options.progress(name, self._at, self._plan.bytes_before)


def _effort_entry(options: Options) -> dict[str, str]:
    """What the journal says of the effort, so that a second run of the same command does not choose another."""
    return {} if options.effort is None else {EFFORT: options.effort}


def write_folder(
    plan: Plan, source: Source, out: str | Path, options: Options = DEFAULTS, text: Calibration | None = None, *,
    key: str | None = None, solved: Results | None = None, again: bool = True,
) -> Report:  # fmt: skip
    """Quantize `source` into the folder `out`, or finish what a killed run left; verified before it gets its name.

    `key`: the run's fingerprint, by which a second run knows what a killed one left; None: that of the plan as it is. `solved`:
    results that are at hand already (a module quantized in memory); computed one by one otherwise. `again`: whether a
    second call has the same.
    """
    check_loads(plan, source)
    key = key or fingerprint(plan, source, options.device, text)
    with FolderWriter(
        out,
        plan.shards,
        key,
        origin(plan, source, text),
        options.overwrite,
        survey_entry(plan.survey) | _effort_entry(options),
        again,
    ) as writer:
        if writer.finished:
            return make_report(plan, writer.journal, text)
        done = frozenset(writer.journal)
        with Behind(WRITE_BEHIND) as behind:
            if solved is not None:
                results = solved
            elif len(done) == len(plan.tensors):
                results = iter(())
                shutil.rmtree(writer.partial / STATES, ignore_errors=True)  # the kill came between the journal and this
            elif text is None:
                results = solved_results(plan, source, options, None, writer.partial, done, behind=behind)
            else:
                results = solved_results(plan, source, options, text, writer.partial, done, writer.flush)
            try:
                for result, digest in results:
                    if result.plan.name in done:
                        continue
                    facts = {"source": digest, **solved_facts(result)}
                    if (
                        text is not None
                    ):  # which asks in between for what was written to be safe, and takes longer than writing
                        writer.write(result.plan.name, result.stored, **facts)
                    else:
                        put = partial(writer.put, result.stored)
                        behind.call(result.plan.bytes_after, put, partial(writer.enter, result.plan.name, facts))
            finally:
                if isinstance(results, Generator):
                    results.close()  # it may still be writing into the folder
        del results  # what it holds of the model
        if solved is None and text is not None:
            tune_folder(plan, source, text, writer, fast_dtype(), options.progress)
        writer.verify()
        source.save_assets(writer.partial)
        write_config(plan, source, writer.partial, writer.journal)
        writer.finish()
    return make_report(plan, writer.journal, text)
