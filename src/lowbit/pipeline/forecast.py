"""How long quantizing will take on this machine: what a rehearsal measured (`rehearsal.py`), carried over to the whole run.

The laws are those of the work itself. Reading, hashing, writing and encoding grow with bytes or elements. A block's forward grows with the tokens,
and its attention also with the length of a window. Statistics of an input [tokens, K] are products of tokens * K^2. A solver with error feedback
factorizes one matrix for each input, K^3, and then costs each row of a weight K^2, and what finds its scales K.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from lowbit.errors import RecipeError, SourceError
from lowbit.formats import Format
from lowbit.interchange.tensors import TensorPlan
from lowbit.planning.memory import MICRO_BATCH
from lowbit.planning.plan import Plan
from lowbit.recipes.recipe import Recipe
from lowbit.recipes.rewriting import group_transforms

STARTING, READING, SOLVING, WRITING, VERIFYING = "starting", "reading", "solving", "writing", "verifying"
FLOAT_MODEL, QUANTIZED_MODEL, STATISTICS, TUNING = "float model", "quantized model", "statistics", "tuning"
_BACKWARD = 3  # forwards that a forward and its backward pass take together, and the update of what is tuned
_CHUNK = 512  # tokens of a step of a tuner of the whole model

Kind = tuple[tuple[str, tuple[int, ...]], ...]  # a block's tensors without its own name, with their shapes
How = tuple[str, str, str]  # format, fit and solver: what encoding a weight costs depends on these


@dataclass(frozen=True)
class Forecast:
    """Seconds that a run will take, and those of its phases, whose sum they are: of what is done at the same time each counts by its share."""

    seconds: float
    phases: dict[str, float]


@dataclass(frozen=True)
class Bytes:
    """Seconds a byte. read: of the source's tensors. check: for numbers that are none. hash: SHA-256. write: to the output's disk, safely.
    read_back: of what was written."""

    read: float
    check: float
    hash: float
    write: float
    read_back: float


@dataclass(frozen=True)
class Alone:
    """Encoding a weight without text: seconds for each weight, and for each element."""

    once: float
    element: float

    def seconds(self, count: int) -> float:
        return self.once + self.element * count


@dataclass(frozen=True)
class Stream:
    """A block run over text: seconds a token, and seconds for each pair of tokens of a window (attention)."""

    token: float
    pair: float = 0.0

    def seconds(self, tokens: int, length: int) -> float:
        """Of `tokens` tokens in windows of `length`."""
        return tokens * (self.token + self.pair * length)


@dataclass(frozen=True)
class BlockRates:
    """A block over text.

    groups      its weights that share an input, each by its name without the block's
    forward     the block alone; `float_stream` with what is kept of it; `quantized` with all passes up to the last, statistics apart
    statistics  seconds a token for all inputs of the block, without and with those of the float model
    finish      seconds for the moments of all its inputs, once
    """

    groups: tuple[tuple[str, ...], ...]
    forward: Stream
    float_stream: Stream
    quantized: Stream
    statistics: Mapping[bool, float]
    finish: float


@dataclass(frozen=True)
class SolverRates:
    """Weights that share an input of `width` columns, given its statistics: seconds for their input, and for each row of a weight."""

    width: int
    once: float
    row: float
    row_squared: float = 1.0  # share of `row` that grows with the square of the width; the rest grows with the width
    once_cubed: float = 1.0  # share of `once` that grows with its cube; the rest with its square

    def seconds(self, rows: int, width: int) -> float:
        """Of `rows` rows in all with `width` columns."""
        wider = width / self.width
        once = self.once * (self.once_cubed * wider**3 + (1 - self.once_cubed) * wider**2)
        return once + rows * self.row * (self.row_squared * wider**2 + (1 - self.row_squared) * wider)


@dataclass(frozen=True)
class Rates:
    """What a rehearsal measured, from which runs are forecast.

    threads         of a solver; `processors` in effect, which these share with the threads that read and write beside it
    starting        seconds of what every run does once; `starting_text` of a run over text
    alone           by format, fit and solver
    blocks          the name of every block with its tensors; `kinds` what was measured of each kind of them, `solvers` of each way to solve
    problem         why the model cannot be calibrated on text, as a sentence; empty where it can
    """

    bytes: Bytes
    threads: int
    processors: float
    starting: float
    starting_text: float
    alone: Mapping[How, Alone]
    blocks: Sequence[tuple[str, tuple[str, ...]]] = ()
    kinds: Mapping[Kind, BlockRates] = field(default_factory=dict)
    solvers: Mapping[tuple[How, int], SolverRates] = field(default_factory=dict)
    problem: str = ""

    def seconds(self, plan: Plan, recipe: Recipe, tokens: int = 0, length: int = 1024) -> Forecast:
        """What quantizing by `recipe` will take with `tokens` tokens of text in windows of `length`; 0 for none.

        Only the tensors of `plan` count, not its recipe. SourceError where the model cannot be calibrated on text; RecipeError
        for a recipe that was not rehearsed.
        """
        if tokens and self.problem:
            raise SourceError(self.problem)
        if tokens and not self.kinds:
            raise RecipeError(f"{recipe} was not rehearsed over text, so its time cannot be forecast")
        before, after = plan.bytes_before, sum(_bytes_after(t, recipe) for t in plan.tensors)
        rates = self.bytes
        reading, writing = before * (rates.read + rates.hash), after * (rates.write + rates.hash)
        phases = {STARTING: self.starting + (self.starting_text if tokens else 0.0)}
        if tokens:
            looked_at = before * (rates.read + rates.check)  # all of it, before the model is run
            phases |= {
                READING: looked_at + reading,
                **self._over_text(plan, recipe, tokens, min(length, tokens)),
                WRITING: writing,
            }
        else:
            solving = sum(self._alone(t, recipe) for t in plan.tensors)
            busy = (reading + writing + min(self.threads, self.processors) * solving) / self.processors
            beside = max(reading, solving, writing, busy) / max(1e-9, reading + solving + writing)
            phases |= {READING: reading * beside, SOLVING: solving * beside, WRITING: writing * beside}
        phases[VERIFYING] = after * (rates.read_back + rates.hash) / min(self.threads, self.processors)
        return Forecast(sum(phases.values()), phases)

    def _alone(self, tensor: TensorPlan, recipe: Recipe) -> float:
        fmt = format_of(tensor, recipe)
        if fmt is None:
            return tensor.bytes_before * self.bytes.check
        how = how_of(recipe, fmt, False)
        if how not in self.alone:
            raise RecipeError(f"{recipe} was not rehearsed for {fmt}, so its time cannot be forecast")
        return self.alone[how].seconds(tensor.count)

    def _over_text(self, plan: Plan, recipe: Recipe, tokens: int, length: int) -> dict[str, float]:
        tensors = {t.name: t for t in plan.tensors}
        batch = min(tokens, max(length, MICRO_BATCH // length * length))
        drift = compares(recipe)
        found = dict.fromkeys((SOLVING, FLOAT_MODEL, QUANTIZED_MODEL, STATISTICS), 0.0)
        inside: set[str] = set()
        forward = 0.0
        for name, names in self.blocks:
            inside.update(names)
            kind = self._kind(name, [tensors[n] for n in names])
            grouped = {f"{name}.{own}" if name else own for group in kind.groups for own in group}
            found[SOLVING] += sum(self._alone(tensors[n], recipe) for n in names if n not in grouped)
            found[SOLVING] += kind.finish
            for group in kind.groups:
                members = [tensors[n] for own in group if (n := f"{name}.{own}" if name else own) in tensors]
                found[SOLVING] += sum(self._solved(members, recipe))
            if drift:
                found[FLOAT_MODEL] += kind.float_stream.seconds(tokens, length)
            found[QUANTIZED_MODEL] += kind.quantized.seconds(tokens, length)
            found[QUANTIZED_MODEL] += kind.forward.seconds(batch, length)  # which weights share an input
            found[STATISTICS] += kind.statistics[drift] * tokens
            forward += kind.forward.seconds(tokens, length) / tokens
        found[SOLVING] += sum(self._alone(t, recipe) for t in plan.tensors if t.name not in inside)
        return found | _tuning(recipe, found, forward, len(self.blocks), tokens, batch)

    def _kind(self, name: str, tensors: Sequence[TensorPlan]) -> BlockRates:
        """Of a block, or of the kind that is nearest to it in size where there were too many kinds to try them all."""
        kind = kind_of(name, tensors)
        if kind in self.kinds:
            return self.kinds[kind]

        def size(other: Kind) -> int:
            return sum(math.prod(shape) for _, shape in other)

        return self.kinds[min(self.kinds, key=lambda other: abs(size(other) - size(kind)))]

    def _solved(self, members: Sequence[TensorPlan], recipe: Recipe) -> Iterator[float]:
        """Of weights that share an input. Those of one format are solved together, experts each on their own."""
        together: dict[tuple[How, int], int] = {}
        for t in members:
            fmt = format_of(t, recipe)
            if fmt is None:
                yield self._alone(t, recipe)
                continue
            *experts, rows, width = t.out_in
            key = how_of(recipe, fmt, True), width
            if experts:
                yield math.prod(experts) * self._solver(*key).seconds(rows, width)
            else:
                together[key] = together.get(key, 0) + rows
        for (how, width), rows in together.items():
            yield self._solver(how, width).seconds(rows, width)

    def _solver(self, how: How, width: int) -> SolverRates:
        known = {w: rates for (other, w), rates in self.solvers.items() if other == how}
        if not known:
            raise RecipeError(f"{how[2]} was not rehearsed for {how[0]}, so its time cannot be forecast")
        return known[min(known, key=lambda w: abs(w - width))]


def kind_of(name: str, tensors: Sequence[TensorPlan]) -> Kind:
    """Blocks of one kind have tensors of the same names and shapes."""
    return tuple(sorted((t.name.removeprefix(f"{name}."), t.shape) for t in tensors))


def format_of(tensor: TensorPlan, recipe: Recipe) -> Format | None:
    """What a tensor of a plan becomes by another recipe."""
    return None if tensor.format is None else recipe.format_for(tensor.name, tensor.kind)


def how_of(recipe: Recipe, fmt: Format, with_stats: bool) -> How:
    """By what a weight is encoded."""
    fit = str(recipe.fit_for(fmt)) if fmt.scale is not None else ""
    return str(fmt), fit, str(recipe.solver_for(fmt, with_stats))


def compares(recipe: Recipe) -> bool:
    """Whether the float model is run beside the quantized one."""
    tuner = recipe.tuner_of("block")
    tuned = tuner is not None and bool({**tuner.method.options, **dict(tuner.options)}.get("drift"))
    return tuned or (recipe.solver is not None and recipe.solver.method.needs == "drift")


def _bytes_after(tensor: TensorPlan, recipe: Recipe) -> int:
    fmt = format_of(tensor, recipe)
    if fmt is None:
        return tensor.bytes_before
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in fmt.parts(tensor.out_in).values())


def _tuning(
    recipe: Recipe, found: Mapping[str, float], forward: float, blocks: int, tokens: int, batch: int
) -> dict[str, float]:
    """What is counted in forwards of the model rather than tried: tuners, transforms of inputs, token weights.

    `forward`: seconds a token of all blocks.
    """
    seconds = 0.0
    if recipe.weighting is not None:
        seconds += _BACKWARD * forward * tokens
    if calls := group_transforms(recipe):
        points = sum(int({**c.method.options, **dict(c.options)}.get("points", 0)) for c in calls)
        passes = 4 if points else 1  # what is to be returned, statistics of all inputs, and two errors
        seconds += passes * forward * tokens + found[STATISTICS] + points * found[SOLVING]
    if (tuner := recipe.tuner) is not None:
        steps = int({**tuner.method.options, **dict(tuner.options)}.get("steps", 0))
        whole = recipe.tuner_of("model") is not None
        seconds += steps * forward * ((_BACKWARD + 1) * _CHUNK if whole else _BACKWARD * batch)
    return {TUNING: seconds} if seconds else {}
