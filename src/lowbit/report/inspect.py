"""What is in a model: ranges, outliers and sizes of a float one; formats and bits of a quantized one.

One tensor is in memory at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit.display import Displayed
from lowbit.interchange.checks.section import check_parts, read_section
from lowbit.interchange.checks.tensors import check_layers
from lowbit.interchange.files.settings import read_config
from lowbit.interchange.files.weights import entries_of, remarks_on
from lowbit.interchange.hf.loading import load_config
from lowbit.interchange.inventory import kept_words
from lowbit.interchange.progress import Progress
from lowbit.interchange.source import Source, say_remarks
from lowbit.kv.folder import read_cache_format
from lowbit.measure.card import json_ready
from lowbit.planning.cache_words import CacheFacts, facts_of_folder
from lowbit.report.layout import Lines, table_or_list, wrapped
from lowbit.report.panel import cache_bytes
from lowbit.report.wording import bytes_text, count_text, grouped, pattern_of, shape_text, span_text
from lowbit.report.wording import number_text as num

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

_CHUNK = 1 << 22  # elements in float64 at a time: 32 MiB


@dataclass(frozen=True)
class Moments:
    """Of the finite values: range, mean, standard deviation, largest magnitude over it, excess kurtosis.

    `bad` counts NaN and infinite values. A normal distribution of a million weights has an outlier ratio
    near 5 and a kurtosis of 0.
    """

    low: float
    high: float
    mean: float
    std: float
    outlier: float
    kurtosis: float
    bad: int


@dataclass(frozen=True)
class TensorFacts:
    """One tensor. Of a float model: `moments`, and `keep`, why it stays. Quantized: `format`, `bits`, and how `inputs` are
    stored while the model runs, None for float ones."""

    name: str
    shape: tuple[int, ...]
    kind: str
    dtype: str
    nbytes: int
    share: float
    moments: Moments | None = None
    keep: str | None = None
    format: str | None = None
    bits: float | None = None
    inputs: str | None = None


@dataclass(frozen=True, repr=False)
class Inspection(Displayed):
    """All tensors of a model; `quantized` is the recipe of a quantized one, "" when not known.

    storage, source_bytes: how a float model's source stores its weights, "float" or what a quantized one says of itself, and in how
    many bytes. cache: how a folder says that its KV cache is stored, None where it says nothing.
    """

    label: str
    model_class: str
    tensors: tuple[TensorFacts, ...]
    tied: dict[str, str]
    quantized: str | None = None
    storage: str = "float"
    source_bytes: int | None = None
    cache: CacheFacts | None = None

    def _brief(self) -> str:
        return f"{self.label}, {self.model_class}, {len(self.tensors)} tensors, {self.nbytes:,} bytes"

    @property
    def parameters(self) -> int:
        return sum(math.prod(t.shape) for t in self.tensors)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return json_ready({"parameters": self.parameters, "nbytes": self.nbytes, **dataclasses.asdict(self)})


def moments(values: Tensor) -> Moments:
    """Statistics of a tensor of any float type, in float64 by chunks of bounded size."""
    flat = values.reshape(-1)

    def each() -> Iterator[Tensor]:
        for chunk in flat.split(_CHUNK):
            finite = chunk[chunk.isfinite()].to(torch.float64)
            if finite.numel():
                yield finite

    count, total, low, high = 0, 0.0, math.inf, -math.inf
    for chunk in each():
        count, total = count + chunk.numel(), total + float(chunk.sum())
        low, high = min(low, float(chunk.min())), max(high, float(chunk.max()))
    bad = flat.numel() - count
    if not count:
        return Moments(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, bad)
    mean, second, fourth = total / count, 0.0, 0.0
    for chunk in each():
        square = (chunk - mean).square_()
        second, fourth = second + float(square.sum()), fourth + float(square.square_().sum())
    variance = second / count
    std, peak = math.sqrt(variance), max(abs(low), abs(high))
    outlier = peak / std if std else 0.0
    kurtosis = fourth / count / variance**2 - 3 if variance else 0.0
    return Moments(low, high, mean, std, outlier, kurtosis, bad)


def inspect_source(source: Source, progress: Progress | None = None) -> Inspection:
    """Every tensor of a float model, one after the other. `progress` gets name, bytes done, bytes in all."""
    total = sum(spec.nbytes for spec in source.tensors.values())
    done, facts = 0, []
    for name, spec in source.tensors.items():
        param = source.inventory.params[name]
        found = moments(source.read(name)) if spec.dtype.is_floating_point else None
        dtype = str(spec.dtype).removeprefix("torch.")
        share = spec.nbytes / max(1, total)
        facts.append(TensorFacts(name, spec.shape, param.kind, dtype, spec.nbytes, share, found, param.keep))
        done += spec.nbytes
        if progress is not None:
            progress(name, done, total)
    return Inspection(
        source.label, source.inventory.model_class, tuple(facts), dict(source.inventory.tied), storage=source.storage,
        source_bytes=source.disk_bytes(),
    )  # fmt: skip


def inspect_quantized(folder: Path) -> Inspection:
    """Formats and bits of a folder that lowbit wrote; reads config.json and the safetensors headers."""
    config = read_config(folder)
    section = read_section(config.get("quantization_config"), str(folder / "config.json"))
    table = section.tensors
    entries = {name: entry for name, (_, entry) in entries_of(folder).items()}
    stored = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    check_parts(section, stored, str(folder))
    check_layers(config, stored, str(folder / "config.json"))
    sizes: dict[str, int] = {}
    kept: dict[str, tuple[tuple[int, ...], str]] = {}
    say_remarks(str(folder), remarks_on(folder))
    for name, entry in entries.items():
        owner = next((t for t in _prefixes(name) if t in table), name)
        sizes[owner] = sizes.get(owner, 0) + entry.nbytes
        if owner not in table:
            kept[owner] = (entry.shape, str(entry.dtype).removeprefix("torch."))
    total = max(1, sum(sizes.values()))
    facts = []
    for name, nbytes in sizes.items():
        if name in table:
            shape, inputs = table[name].shape, table[name].inputs
            bits = 8 * nbytes / max(1, math.prod(shape))
            facts.append(
                TensorFacts(
                    name,
                    shape,
                    "packed",
                    "uint8",
                    nbytes,
                    nbytes / total,
                    format=str(table[name].format),
                    bits=bits,
                    inputs=None if inputs is None else str(inputs),
                )
            )
        else:
            shape, dtype = kept[name]
            facts.append(TensorFacts(name, shape, "kept", dtype, nbytes, nbytes / total))
    architecture = (config.get("architectures") or ["model"])[0]
    return Inspection(
        str(folder), architecture, tuple(facts), {}, quantized=section.recipe,
        cache=facts_of_folder(load_config(folder) if section.kv else None, read_cache_format(folder)),
    )  # fmt: skip


def _prefixes(name: str) -> list[str]:
    """The name and all its dotted beginnings, the longest first."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def render_inspection(found: Inspection, *, every: bool = False, width: int = 1000) -> RenderableType:
    """A row for each group of like tensors, or for `every` tensor; then what stands out.

    `width` in characters: columns that matter less are left out until the table fits, and where it does not, it is a list.
    """
    from rich.console import Group
    from rich.text import Text

    sizes = f"{found.model_class}, {len(found.tensors)} tensors, {count_text(found.parameters)} parameters, "
    sizes += bytes_text(found.nbytes)
    if found.quantized is not None:
        sizes += f", {8 * found.nbytes / max(1, found.parameters):.2f} bits per weight"
    line = Text.assemble((found.label, "bold"), "  ", sizes)
    head = [line] if line.cell_len <= width else [Text(found.label, "bold"), *wrapped(f"  {sizes}", width)]
    if found.quantized is not None:
        head += wrapped(Text.assemble(("recipe  ", "cyan"), found.quantized or "not noted"), width)
    if found.cache is not None:
        head += wrapped(
            Text.assemble(("KV cache  ", "cyan"), f"{found.cache.format}; {cache_bytes(found.cache)}"), width
        )
    if found.storage != "float" and found.source_bytes is not None:
        said = (
            f"stored as {found.storage}, {bytes_text(found.source_bytes)}; types and sizes here are of its float values"
        )
        head += wrapped(said, width)
    for alias, name in found.tied.items():
        head += wrapped(Text(f"{alias} is tied to {name}", "dim"), width)
    groups = [[t] for t in found.tensors] if every else grouped(found.tensors, _alike)
    measured, less = (_FLOAT, _LESS) if found.quantized is None else (_PACKED, _LESS_PACKED)
    headings = ["tensor", "shape", "kind", "stored as", *measured, "bytes", "share"]
    rows = [_row(group, found.quantized is None) for group in groups]
    table = table_or_list(headings, rows, width, expendable=less, left=headings[:4])
    elements: list[RenderableType] = [Lines(head), table]
    if found.quantized is None:
        several = any(len(group) > 1 for group in groups)
        elements.append(Lines([*_columns(several, width), *_standing_out(found.tensors, width)]))
    return Group(*elements)


def _columns(several: bool, width: int) -> list[Text]:
    """What the columns of numbers are, as lines."""
    from rich.text import Text

    said = [
        "max/std: the largest magnitude in standard deviations; a million values of a normal distribution reach about 5. kurtosis: "
        "how much of the spread comes from rare large values (excess kurtosis); 0 for a normal distribution."
    ]
    if several:
        said.insert(
            0,
            "A row of several tensors has their bytes together, and the numbers of the one with the largest max/std; --all lists "
            "each by itself.",
        )
    return [line for text in said for line in wrapped(Text(text, "dim"), width)]


_FLOAT = ("min", "max", "std", "max/std", "kurtosis")
_PACKED = ("bits/\nweight",)
# What a table in few columns can do without, the least missed first.
_LESS = ("bytes", "stored as", "kurtosis", "std", "shape")
_LESS_PACKED = ("bytes", "shape", "kind", "share")


def _alike(t: TensorFacts) -> Any:
    return pattern_of(t.name), t.shape, t.dtype, t.keep, t.format, t.inputs


def _row(group: Sequence[TensorFacts], is_float: bool) -> list[str]:
    """The cells of one group: the numbers of the tensor with the farthest outlier, and the bytes of all."""
    first = group[0]
    kind = f"stays: {kept_words(first.name, first.keep)}" if first.keep else first.kind
    cells = [span_text([t.name for t in group]), shape_text(first.shape), kind, first.format or first.dtype]
    cells[-1] += f", inputs {first.inputs}" if first.inputs else ""
    known = [t.moments for t in group if t.moments is not None]
    if is_float and known:
        most = max(known, key=lambda m: m.outlier)
        cells += [num(value, 3) for value in (most.low, most.high, most.std, most.outlier, most.kurtosis)]
    elif is_float:
        cells += [""] * len(_FLOAT)
    else:
        cells.append("" if first.bits is None else f"{first.bits:.2f}")
    return [*cells, bytes_text(sum(t.nbytes for t in group)), f"{100 * sum(t.share for t in group):.1f} %"]


def _standing_out(tensors: Sequence[TensorFacts], width: int, most: int = 5) -> list[Text]:
    """The quantizable tensors with the farthest outliers, and every one with values that are not finite, as lines."""
    from rich.text import Text

    lines = list[Text]()
    wide = sorted(
        (t for t in tensors if t.moments is not None and t.keep is None),
        key=lambda t: -t.moments.outlier if t.moments else 0.0,
    )
    if wide:
        why = ("  (such tensors want small groups, or more bits)", "dim")
        lines += wrapped(Text.assemble(("farthest outliers", "cyan"), why), width)
    for t in wide[:most]:
        if t.moments is not None:
            lines += wrapped(f"  {t.name}  {num(t.moments.outlier, 3)} standard deviations", width)
    for t in tensors:
        if t.moments is not None and t.moments.bad:
            lines += wrapped(Text(f"{t.name}: {t.moments.bad} values are NaN or infinite", "red"), width)
    return lines
