"""bench: how fast a model answers on this machine, compared with other programs and with what is possible.

Figures are medians of interleaved rounds, each of which measures every program once. Decode is held against reading memory, because a token
must read every weight; prefill against products of bytes. The machine's own limits are measured in every round, and the
best of them counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from lowbit.display import Displayed
from lowbit.engine.fallback import with_cache
from lowbit.engine.generator import choose
from lowbit.engine.runtime_formats import ACTIVATIONS
from lowbit.errors import RecipeError
from lowbit.interchange.progress import heard
from lowbit.kernels.core import core
from lowbit.measure.backends import Backend, of_engine, of_module
from lowbit.measure.environment import environment, usable_cores
from lowbit.measure.interleave import BENCH, SpeedSettings, fit_settings, interleave
from lowbit.measure.peers.peer import openers
from lowbit.measure.quality import Progress
from lowbit.measure.startup import Startup, load_module
from lowbit.measure.token_times import torch_threads
from lowbit.pipeline.loading import as_dtype

PAUSE = 0.3  # seconds before each measurement, where programs that stay loaded are among those measured
Model: TypeAlias = "str | Path | nn.Module"


@dataclass(frozen=True)
class Limits:
    """What this machine did at best: bytes read and products of two bytes, a second."""

    read: float
    products: float


@dataclass(frozen=True)
class BenchRow:
    """One program with one model.

    values: by name what each round found, tokens/s, and seconds for "first_token". weight_bytes: what a token must read
    of the weights, None where not known. read_share: decode against the limit of reading; keys and values are not
    counted. product_share: prefill against the limit of products, one for each weight and token. startup: of the round
    with the median time. note: what is out of the ordinary.
    """

    name: str
    values: dict[str, list[float]]
    weight_bytes: int | None = None
    read_share: float | None = None
    product_share: float | None = None
    startup: Startup | None = None
    note: str = ""

    def median(self, name: str) -> float | None:
        """The figure `name`: decode, prefill, batch or first_token; None where it was not measured."""
        values = self.values.get(name)
        return statistics.median(values) if values else None


@dataclass(frozen=True, repr=False)
class Bench(Displayed):
    """What `bench` found; the first row is the model's. isa and limits: None without the C++ part."""

    rows: list[BenchRow]
    settings: SpeedSettings
    threads: int
    machine: str
    isa: str | None = None
    limits: Limits | None = None

    def _brief(self) -> str:
        return ", ".join(row.name for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        found = asdict(self)
        for row, plain in zip(self.rows, found["rows"], strict=True):
            plain["medians"] = {name: row.median(name) for name in row.values}
        return found

    def to_markdown(self) -> str:
        """The table as Markdown text, with what is to be known of it below."""
        from lowbit.measure.bench_table import markdown_bench

        return markdown_bench(self)


@dataclass
class _Machine:
    """Measures the machine's limits between rounds."""

    pool: Any
    found: list[dict[str, float]] = field(default_factory=list)

    def look(self) -> None:
        module = core()
        assert module is not None
        self.found.append(module.limits(self.pool))

    def best(self) -> Limits:
        return Limits(
            *(max(one[key] for one in self.found) for key in ("read_bytes_per_second", "int8_products_per_second"))
        )


def bench(
    model: Model | Sequence[Model],
    *,
    beside: Model | Sequence[Model] | None = None,
    dtype: str | None = None,
    gguf: Sequence[str | Path] | str | Path = (),
    llama_bench: str | None = None,
    programs: Mapping[str, str] | None = None,
    activations: Sequence[str] | str | None = None,
    cache: str | None = None,
    threads: int | None = None,
    rounds: int = 5,
    settings: SpeedSettings = BENCH,
    progress: Progress | bool | None = None,
) -> Bench:
    """Measure how fast models generate: decode, prefill, a batch, the time to the first token of a fresh process.

    model: one or several folders that lowbit wrote or float models by any name; the engine runs those it knows, else
    transformers. beside: one or several models that transformers runs, in `dtype`, float32 when None. gguf: files for llama.cpp, run by the
    program `llama_bench`, the one of the PATH when None. programs: others, by name, as in `peers.line_program`; only
    with the standard settings. activations, cache: of the engine, as in `Engine.open`; one row for each
    of several activations. threads: of everyone, all cores when None. rounds: after one that warms up. settings: lengths.

    EngineError for an option of the engine that a model would ignore; RecipeError, SourceError for what cannot be, and for
    a `dtype` that nobody computes in.

    >>> found = lowbit.bench(quantized, rounds=1, settings=few)
    >>> found.rows[0].median("decode") > 0  # tokens per second
    True
    """
    if rounds < 1:
        raise RecipeError(f"rounds={rounds}; measure 1 or more")
    if threads is not None and threads < 1:
        raise RecipeError(f"threads={threads}; give 1 or more, or nothing for all cores")
    as_dtype(dtype)
    theirs, count = dtype or "float32", threads or _cores()
    peers = openers({"gguf": gguf, "llama_bench": llama_bench, "programs": programs}, count)
    kinds = _kinds(activations)
    with torch_threads(count), ExitStack() as closing:
        asked = [(one, {"cache": cache, "activations": kind}) for one in _listed(model) for kind in kinds]
        found = [_engine_or_transformers(one, options, count, theirs) for one, options in asked]
        found += [_in_transformers(one, theirs) for one in ([] if beside is None else _listed(beside))]
        # The engine has threads of its own, and a module in memory its own type and no name to open it by again.
        if dtype is not None and not any(each.threads is None and each.first is not None for each in found):
            raise RecipeError(
                f"dtype={dtype} would be ignored, as transformers loads no model here; leave it out, or add beside=..."
            )
        for open_peer in peers:
            found.append(open_peer())
            closing.callback(found[-1].close)
        module = core()
        machine = None if module is None else _Machine(module.ThreadPool(count))
        fitted = fit_settings(settings, [each.positions for each in found])
        if unable := [each.name for each in found if each.fixed not in (None, fitted)]:
            raise RecipeError(
                f"{', '.join(unable)}: programs measure {BENCH}, which is not what was asked for or fits the models"
            )
        pause = PAUSE if any(each.fixed is not None for each in found) else 0.0
        probes = [each.all_probes(fitted) for each in found]
        values = interleave(probes, rounds, heard(progress), None if machine is None else machine.look, pause)
    limits = None if machine is None else machine.best()
    rows = [_row(each, one, fitted, limits) for each, one in zip(found, values, strict=True)]
    return Bench(rows, fitted, count, environment().machine, None if module is None else module.isas()[0], limits)


def _kinds(activations: Sequence[str] | str | None) -> Sequence[str | None]:
    """One or several; None: nothing was said of them."""
    kinds = [activations] if activations is None or isinstance(activations, str) else activations
    if not kinds:
        raise RecipeError(f"no activations; give one or more of {', '.join(ACTIVATIONS)}, or nothing")
    return kinds


def _row(each: Backend, values: dict[str, list[float]], settings: SpeedSettings, limits: Limits | None) -> BenchRow:
    medians = {name: statistics.median(found) for name, found in values.items()}
    read = products = None
    if limits is not None and each.weight_bytes is not None:
        read = medians["decode"] * each.weight_bytes / limits.read
    if limits is not None and each.products is not None:
        products = medians["prefill"] / settings.prefill * each.products(settings.prefill) / limits.products
    middle = sorted(each.startups, key=lambda s: s.seconds)
    return BenchRow(
        each.name, values, each.weight_bytes, read, products, middle[len(middle) // 2] if middle else None, each.note
    )


def _engine_or_transformers(model: Model, options: dict[str, Any], threads: int, dtype: str) -> Backend:
    """options: of the engine, None for those that were not given."""
    engine, reason = choose(model, options, threads=threads, either=("cache",))
    if engine is None:
        return _in_transformers(model, dtype, f"transformers, not the engine: {reason}", options.get("cache"))
    options = {name: value for name, value in options.items() if value is not None}
    again = None if isinstance(model, nn.Module) else {"model": str(model), "threads": threads, **options}
    name = ", ".join([f"lowbit {_label(model)}", *(f"{value} {key}" for key, value in options.items())])
    return of_engine(engine, name, again)


def _in_transformers(model: Model, dtype: str, note: str = "", cache: str | None = None) -> Backend:
    stored = "" if cache is None else f", {cache} cache"
    if isinstance(model, nn.Module):
        own = str(next(model.parameters()).dtype).removeprefix("torch.")
        return of_module(with_cache(model, cache), f"transformers {_label(model)}, {own}{stored}", None, note)
    again = {"model": str(model), "dtype": dtype} | ({} if cache is None else {"cache": cache})
    return of_module(load_module(**again), f"transformers {_label(model)}, {dtype}{stored}", again, note)


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, (str, Path, nn.Module)) else list(value)


def _label(model: Model) -> str:
    if isinstance(model, nn.Module):
        return type(model).__name__
    return Path(model).resolve().name if Path(model).exists() else str(model)


def _cores() -> int:
    module = core()
    return usable_cores() if module is None else int(module.features()["cores"])
