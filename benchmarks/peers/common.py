"""What the adapters share: arguments, windows, time and memory, the result, and quality by lowbit's formulas.

It runs in the environment of a peer, so it needs torch, transformers and safetensors, and nothing of lowbit.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
_STDOUT = 1
RESULT, WEIGHTS = "result.json", "weights"

# Stands between this process and a program, since Linux counts the memory of the process that starts a
# program as the program's own; this one is small.
_LAUNCHER = """
import json, os, subprocess, sys, time
begin = time.perf_counter()
child = subprocess.Popen(sys.argv[2:], stdout=2)
_, status, usage = os.wait4(child.pid, 0)
found = {"code": os.waitstatus_to_exitcode(status), "peak": usage.ru_maxrss * 1024}
found |= {"seconds": time.perf_counter() - begin, "cpu": usage.ru_utime + usage.ru_stime}
with open(sys.argv[1], "w") as file:
    json.dump(found, file)
"""

Steps = dict[str, dict[str, Any]]  # by the name of a step: its "seconds" and "cpu" seconds


@dataclass
class Result:
    """What an adapter reports; README.md describes every field."""

    peer: str
    version: str
    config: str
    peak_resident_bytes: int
    file_bytes: int
    parameters: int
    linear_bits: float
    steps: Steps
    calibration: dict[str, Any] | None = None
    weights: str | None = None
    quality: dict[str, Any] | None = None
    details: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _keep_stdout() -> None:
    """Libraries print what they like: all of it to stderr, so that stdout has the result alone."""
    global _STDOUT
    _STDOUT = os.dup(1)
    os.dup2(2, 1)


def parser(about: str, config: str) -> argparse.ArgumentParser:
    """The arguments that every adapter takes."""
    _keep_stdout()
    made = argparse.ArgumentParser(description=about.split("\n")[0])
    made.add_argument("model", type=Path, help="Hugging Face folder of the float model")
    made.add_argument("calibration", type=Path, help="text to calibrate on")
    made.add_argument("out", type=Path, help="folder to write; it must not exist, or hold an earlier result")
    made.add_argument("--config", default=config, help=f"what to quantize to (default {config})")
    made.add_argument("--windows", type=int, default=32, help="calibration windows (default 32)")
    made.add_argument("--length", type=int, default=1024, help="tokens of a window (default 1024)")
    made.add_argument("--eval", type=Path, help="measure quality here, on this text")
    made.add_argument("--eval-windows", type=int, default=24, help="evaluation windows (default 24)")
    return made


def fresh(out: Path) -> Path:
    """`out`, empty. Only a folder that an adapter wrote is emptied."""
    if out.exists() and any(out.iterdir()):
        if not (out / RESULT).exists():
            raise SystemExit(f"{out} is not empty and holds no {RESULT} of an earlier run: name another folder")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    return out


def windows(model: Path, text: Path, count: int, length: int) -> list[list[int]]:
    """The first `count` windows: the whole text tokenised once without special tokens, and cut without overlap."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < count * length:
        raise SystemExit(f"{text} has {len(ids)} tokens, fewer than {count} windows of {length}")
    return [ids[k * length : (k + 1) * length] for k in range(count)]


def mark(rows: list[list[int]]) -> dict[str, Any]:
    """Which windows they were: the hash is that of their ids as little-endian int32."""
    raw = b"".join(i.to_bytes(4, "little") for row in rows for i in row)
    return {"windows": len(rows), "length": len(rows[0]), "ids_sha256": hashlib.sha256(raw).hexdigest()}


@contextlib.contextmanager
def timed(steps: Steps, name: str) -> Iterator[None]:
    begin, cpu = time.perf_counter(), time.process_time()
    yield
    steps[name] = {"seconds": time.perf_counter() - begin, "cpu": time.process_time() - cpu}


def peak_resident() -> int:
    """The most bytes that this process has had resident (Linux)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def run(command: list[Any], scratch: Path) -> dict[str, Any]:
    """Run a program, its output on stderr; its seconds, CPU seconds and peak resident bytes."""
    report = scratch / "launcher.json"
    arguments = [str(part) for part in command]
    subprocess.run([sys.executable, "-S", "-c", _LAUNCHER, str(report), *arguments], check=True)
    found = json.loads(report.read_text())
    report.unlink()
    if found["code"]:
        raise SystemExit(f"{arguments[0]} ended with status {found['code']}: its output is above")
    return {name: found[name] for name in ("seconds", "cpu", "peak")}


def load_float(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def write_weights(source: Path, out: Path, tensors: dict[str, Any]) -> None:
    """A Hugging Face folder like `source`, with float32 `tensors` by name; what is absent stays as in `source`."""
    import torch

    model = load_float(source)
    known = dict(model.named_parameters())
    if unknown := sorted(set(tensors) - set(known)):
        raise SystemExit(f"the quantized file has tensors that the model lacks: {', '.join(unknown[:5])}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            known[name].copy_(tensor)
    model.save_pretrained(out)
    for file in source.iterdir():
        if not (out / file.name).exists() and file.suffix in {".json", ".jinja", ".txt", ".model"}:
            shutil.copy(file, out)


def linear_names(model: Any) -> set[str]:
    """Names of the weights of linear layers, the head left out."""
    import torch

    head = model.get_output_embeddings()
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }


def measure(base: Any, model: Any, rows: list[list[int]]) -> dict[str, Any]:
    """Quality of `model` beside `base`: the same formulas as lowbit.measure.quality, in float64."""
    import torch

    figures: dict[str, list[Any]] = {"nll": [], "base_nll": [], "kl": [], "top1": []}
    for done, row in enumerate(rows):
        ids = torch.tensor([row])
        with torch.inference_mode():
            pairs = base(input_ids=ids).logits[0, :-1], model(input_ids=ids).logits[0, :-1]
            of_row: dict[str, list[Any]] = {name: [] for name in figures}
            for first in range(0, len(row) - 1, 64):
                p, q = (torch.log_softmax(x[first : first + 64].double(), -1) for x in pairs)
                target = ids[0, 1:][first : first + 64, None]
                of_row["nll"].append(-q.gather(1, target)[:, 0])
                of_row["base_nll"].append(-p.gather(1, target)[:, 0])
                of_row["kl"].append((p.exp() * (p - q)).sum(-1))
                of_row["top1"].append((p.argmax(-1) == q.argmax(-1)).double())
        for name, chunks in of_row.items():
            figures[name].append(torch.cat(chunks))
        print(f"window {done + 1} of {len(rows)}: KL {float(figures['kl'][-1].mean()):.5f}", file=sys.stderr)
    all_of = {name: torch.stack(values) for name, values in figures.items()}
    perplexity, base_perplexity = (_exp(_mean(all_of[name])) for name in ("nll", "base_nll"))
    return {
        **mark(rows),
        "perplexity": perplexity,
        "base_perplexity": base_perplexity,
        "kl_mean": _mean(all_of["kl"]),
        "kl_p99": {"value": float(all_of["kl"].flatten().quantile(0.99)), "stderr": None},
        "top1": _mean(all_of["top1"]),
    }


def _mean(values: Any) -> dict[str, Any]:
    """Mean of [windows, tokens] and its standard error over windows."""
    means = values.mean(1)
    stderr = float(means.std()) / math.sqrt(len(means)) if len(means) > 1 else None
    return {"value": float(means.mean()), "stderr": stderr}


def _exp(mean: dict[str, Any]) -> dict[str, Any]:
    value = math.exp(mean["value"])
    return {"value": value, "stderr": mean["stderr"] and value * mean["stderr"]}


def finish(
    result: Result, arguments: argparse.Namespace, model: Callable[[], Any] | None = None, base: Any | None = None
) -> None:
    """Measure quality where asked for, write OUT/result.json, and print it.

    `model` gives the quantized model; without it the dequantized folder is loaded.
    """
    if arguments.eval:
        rows = windows(arguments.model, arguments.eval, arguments.eval_windows, arguments.length)
        quantized = model() if model else load_float(arguments.out / WEIGHTS)
        result.quality = measure(base or load_float(arguments.model), quantized, rows)
    record = {"schema": SCHEMA, **asdict(result)}
    record |= {
        "steps": {name: {k: v for k, v in step.items() if k != "key"} for name, step in result.steps.items()},
        "seconds": sum(step["seconds"] for step in result.steps.values()),
        "cpu_seconds": sum(step["cpu"] for step in result.steps.values()),
        "bits_per_weight": 8 * result.file_bytes / result.parameters,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
    }
    text = json.dumps(record, indent=1)
    (arguments.out / RESULT).write_text(text + "\n")
    os.write(_STDOUT, f"{text}\n".encode())
