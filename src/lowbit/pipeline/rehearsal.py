"""A rehearsal: small pieces of the work that a run will do, on this machine and with this model, by the code that does it, and timed.

Its pieces are bounded, however large the model: some MiB of files, slices of weights, one block of each kind over one short window of random
tokens, which also shows whether the model can be calibrated on text at all. `forecast.py` carries their times over to a whole run.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from lowbit.errors import LowbitError, OutputError
from lowbit.formats import Format
from lowbit.interchange.files.atomic import sync
from lowbit.interchange.files.folder_writer import FolderWriter
from lowbit.interchange.files.safetensors_reader import bytes_of
from lowbit.interchange.files.safetensors_writer import shards_of
from lowbit.interchange.files.undisturbed import temporary_folder
from lowbit.interchange.source import Source
from lowbit.interchange.tensors import TensorPlan
from lowbit.pipeline.block_rehearsal import BlockRehearsal
from lowbit.pipeline.block_timing import Clock, Unshared
from lowbit.pipeline.forecast import Alone, Bytes, How, Rates, format_of, how_of
from lowbit.pipeline.manifest import check_loads, write_config
from lowbit.planning.plan import MAX_SHARD, Plan, make_plan
from lowbit.planning.tensor import SLAB
from lowbit.recipes.recipe import Recipe
from lowbit.weights.finite import nonfinite
from lowbit.weights.solve import solve

_FILE, _READ = 16 << 20, 32 << 20  # bytes that are written, and about as many as are read
_LARGEST = 64 << 20  # bytes of a tensor that is read for a trial
_TENSORS = 64  # small ones that are written
_FEWEST = 1 << 14  # elements of a weight that is encoded in a trial
_MOST_SECONDS = 0.25  # a trial that would take longer is not made larger


def rehearse(
    plan: Plan, source: Source, recipes: Sequence[Recipe] = (), *, text: bool = True, near: str | Path | None = None,
    clock: Clock | None = None,
) -> Rates:  # fmt: skip
    """What the pieces of quantizing `source` by any of `recipes` take here. Their transforms of the model count as those of `source`.

    recipes those whose times will be asked for; none: the plan's own, and what it stands for when there is text
    text    whether runs over calibration text are forecast too
    near    the folder that will be written, or one beside it: what is written for trial goes to its disk, and is removed again
    clock   seconds; `time.process_time` for those of the processors. None: files by the time on the wall, computing as if alone (`Unshared`)
    """
    computing = Unshared() if clock is None else clock
    clock = time.perf_counter if clock is None else clock
    recipes = list(dict.fromkeys(recipes or (plan.recipe, plan.recipe.calibrated())))
    threads, processors = torch.get_num_threads(), _processors(clock)
    with _folder(near) as folder:
        rates = _bytes(plan, source, folder, clock)
        handling = _handling(folder, clock)
        starting = _starting(plan, source, folder, clock) + handling * len(plan.tensors)
        alone = _encoded(plan, recipes, computing)
        if not text or not any(recipe.uses_calibration for recipe in recipes):
            return Rates(rates, threads, processors, starting, 0.0, alone)
        try:
            blocks = BlockRehearsal(plan, source, recipes, folder, computing)
        except LowbitError as error:
            return Rates(rates, threads, processors, starting, 0.0, alone, problem=str(error))
        except Exception as error:  # somebody else's model
            said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            problem = f"{source.label} cannot be run over text here ({said})"
            return Rates(rates, threads, processors, starting, 0.0, alone, problem=problem)
        return Rates(
            rates, threads, processors, starting, blocks.starting, alone, blocks.names, blocks.kinds, blocks.solvers
        )


@contextmanager
def _folder(near: str | Path | None) -> Iterator[Path]:
    """A temporary folder on the disk of `near`, or where the system keeps such if that cannot be written."""
    try:
        place = None if near is None else Path(near).absolute()
        while place is not None and not place.is_dir():
            place = place.parent
    except OSError:  # a name that no system takes, which is said when it is written
        place = None
    if place is not None and not os.access(place, os.W_OK | os.X_OK):
        place = None
    try:
        with temporary_folder(".lowbit-trial-", place) as folder:
            yield folder
    except OSError as error:
        raise OutputError(
            f"cannot write for a trial to {place or 'the temporary folder'}: {error.strerror or error}; make room, or check permissions"
        ) from error


def _bytes(plan: Plan, source: Source, folder: Path, clock: Clock) -> Bytes:
    reading = checking = 0.0
    count, held = 0, []  # which a run holds while it reads on, so that each needs memory of its own
    for tensor in _usual(plan.tensors):
        if count >= _READ or (count and tensor.bytes_before > _LARGEST):
            break
        start = clock()
        weight = source.read(tensor.name)
        read = clock()
        nonfinite(weight)
        reading, checking, count = reading + read - start, checking + clock() - read, count + tensor.bytes_before
        held.append(weight)
    held.clear()
    data, path = os.urandom(_FILE), folder / "trial"
    hashing = _seconds(lambda: hashlib.sha256(data), clock)

    def write() -> None:
        path.write_bytes(data)
        sync(path)

    writing = _seconds(write, clock)
    back = _seconds(path.read_bytes, clock)
    path.unlink()
    count = max(count, 1)
    return Bytes(reading / count, checking / count, hashing / _FILE, writing / _FILE, back / _FILE)


def _usual(tensors: Sequence[TensorPlan]) -> list[TensorPlan]:
    """Those that inputs are multiplied with first, and of these the largest that are read for trial."""
    return sorted(tensors, key=lambda t: (not t.is_multiplied, t.bytes_before > _LARGEST, -t.bytes_before))


def _starting(plan: Plan, source: Source, folder: Path, clock: Clock) -> float:
    """What is done once a run: the plan is made, its result's config checked and written, the source known by its hash, and what goes with
    its weights written."""
    assets = folder / "assets"
    assets.mkdir()
    start = clock()
    make_plan(source, plan.recipe)
    check_loads(plan, source)
    source.identity()
    source.save_assets(assets)
    write_config(plan, source, assets, {})
    return clock() - start


def _handling(folder: Path, clock: Clock) -> float:
    """What each tensor takes, however small: its place in a file, its hash, and its entries in journal and manifest."""
    tensors = {f"model.layers.{i}.trial.weight": torch.zeros(64) for i in range(_TENSORS)}
    shards = shards_of([(name, {name: (t.dtype, tuple(t.shape))}) for name, t in tensors.items()], MAX_SHARD)
    start = clock()
    with FolderWriter(folder / "written", shards, "trial", {}, again=False) as writer:
        for name, t in tensors.items():
            writer.write(name, {name: t}, source=hashlib.sha256(bytes_of(t)).hexdigest(), error=0.0)
        writer.verify()
        writer.finish()
    return (clock() - start) / _TENSORS


def _encoded(plan: Plan, recipes: Sequence[Recipe], clock: Clock) -> dict[How, Alone]:
    """What encoding takes without text, by format and methods: the largest weight of each stands for the others."""
    largest: dict[How, tuple[TensorPlan, Format, Recipe]] = {}
    for recipe in recipes:
        for tensor in plan.tensors:
            fmt = format_of(tensor, recipe)
            if fmt is None:
                continue
            how = how_of(recipe, fmt, False)
            if how not in largest or tensor.count > largest[how][0].count:
                largest[how] = tensor, fmt, recipe
    return {how: _encoding(tensor, fmt, recipe, clock) for how, (tensor, fmt, recipe) in largest.items()}


def _encoding(tensor: TensorPlan, fmt: Format, recipe: Recipe, clock: Clock) -> Alone:
    """By weights of random values, larger and larger as long as they take little time."""
    width = tensor.out_in[-1]
    rows = tensor.count // width
    generator = torch.Generator().manual_seed(0)

    def seconds(rows: int) -> float:
        shape = (rows, width) if len(tensor.shape) > 1 else (width,)
        weight = torch.randn(shape, generator=generator).mul_(0.02).to(tensor.dtype)
        piece = TensorPlan("trial", shape, "linear", tensor.dtype, False, fmt)
        return _seconds(lambda: solve(piece, weight, recipe), clock)

    few = min(rows, max(1, _FEWEST // width))
    seconds(few)  # what is done once in a process
    small, size = seconds(few), few
    found = small
    most = min(rows, max(1, SLAB // width))
    while size < most and 4 * found < _MOST_SECONDS:
        size = min(most, 4 * size)
        found = seconds(size)
    if size == few:
        return Alone(0.0, small / (few * width))
    element = max(0.0, found - small) / ((size - few) * width)
    return Alone(max(0.0, small - element * few * width), element)


def _processors(clock: Clock) -> float:
    """How many this process has in effect: fewer than it may use where other programs keep them busy; 1 by a clock of processors."""
    data = bytes(_FILE)
    able = getattr(os, "sched_getaffinity", None)
    count = min(torch.get_num_threads() + 2, len(able(0)) if able is not None else os.cpu_count() or 1)
    with ThreadPoolExecutor(count) as threads:
        list(threads.map(time.sleep, [0.001] * count))  # they are started
        alone = _seconds(lambda: hashlib.sha256(data), clock)
        together = _seconds(lambda: list(threads.map(lambda _: hashlib.sha256(data), range(count))), clock)
    return max(1.0, min(float(count), count * alone / max(together, 1e-9)))


def _seconds(work: Callable[[], object], clock: Clock) -> float:
    start = clock()
    work()
    return clock() - start
