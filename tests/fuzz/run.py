"""Damaged files of every kind through the commands that read them, each in a process of its own with bounds.

    python tests/fuzz/run.py --count 10000 --seed 1 [--door config] [--models FOLDER] [--keep FOLDER] [--only N]

Input n of a door follows from the seed, the door and n alone. A command must end with exit code 0, or with 2 and one line
`error: ...`; a traceback, a signal, more than 10 s or more than 4 GB is what is looked for. Bad inputs are kept in --keep.
This process has the libraries loaded and forks for each input, so that one takes as long as what it does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from doors import DOORS, Door, command  # noqa: F401  Door: for a door of one's own

SECONDS, BYTES = 10, 4 << 30  # of processor time for one command; of address space beyond what is loaded
PATIENCE = 6  # times the seconds by the clock: other programs may have the processor
_NO_MEMORY = ("not enough memory", "DefaultCPUAllocator", "can't allocate memory", "Cannot allocate")


@dataclass
class Bad:
    """A command that ended as none may."""

    door: str
    number: int
    model: str
    command: str
    what: str


@dataclass
class Counts:
    """Of a door: inputs, and how its commands ended."""

    inputs: int = 0
    fine: int = 0
    refused: int = 0
    bad: list[Bad] = field(default_factory=list)
    seconds: float = 0.0


def say(line: str) -> None:
    """A line for whoever runs this."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def load(models: Path) -> None:
    """What the commands import, once, before anything is forked, and what they do first; starts no thread."""
    import gc
    import importlib
    import io
    import pkgutil

    import torch
    import transformers

    import lowbit

    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(lowbit.__path__, "lowbit."):
        if not module.name.endswith("__main__"):
            with contextlib.suppress(ImportError):
                importlib.import_module(module.name)
    for name in ("LlamaForCausalLM", "Qwen2ForCausalLM", "Gemma3ForCausalLM", "SmolLM3ForCausalLM", "GraniteForCausalLM",
                 "Phi3ForCausalLM", "GPT2LMHeadModel", "BertForMaskedLM", "OPTForCausalLM", "MixtralForCausalLM", "AutoTokenizer",
                 "GenerationConfig", "PreTrainedTokenizerFast"):  # fmt: skip
        getattr(transformers, name)
    from lowbit.cli.main import app
    from lowbit.engine.tokenizer import tokenizer_of

    tokenizer_of(models / "float" / "llama").prompt("the")
    for model in ("float/llama", "lowbit/w4", "foreign/gptq", "gguf/blocks/model.gguf"):
        for what in ("plan", "inspect"):
            with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
                app([what, str(models / model)])
    gc.collect()
    gc.freeze()  # so that no collection in a fork touches, and copies, what is here


def make_input(door: str, number: int, seed: int, models: Path, room: Path) -> tuple[str, Path]:
    """(which model, the damaged copy of it in `room`); files that stay whole are links to those of the model."""
    rng, found = random.Random(f"{seed} {door} {number}"), DOORS[door]
    name = rng.choice(found.models)
    target = room / "model"
    target.mkdir()
    chosen = rng.choice([f for f in found.files if (models / name / f).exists()])
    for file in (models / name).iterdir():
        if file.name != chosen:
            os.link(file, target / file.name)
    (target / chosen).write_bytes(found.change((models / name / chosen).read_bytes(), rng))
    return name, target


def become(args: list[str], out: Path, err: Path) -> int:
    """Run `lowbit ARGS` in this process, its streams in files. The exit code; -1 for an error that came through."""
    import traceback

    for stream, file in ((1, out), (2, err)):
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, stream)
        os.close(handle)
    from lowbit.cli.main import main

    sys.argv = ["lowbit", *args]
    rc = -1
    try:
        main()
        rc = 0
    except SystemExit as end:
        rc = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    return rc


def child(commands: list[tuple[str, list[str]]], room: Path, tell: int) -> None:
    """In the fork: run the commands one after another and tell how each ended. Never returns."""
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, size + BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for name, args in commands:
            used = resource.getrusage(resource.RUSAGE_SELF)
            limit = int(used.ru_utime + used.ru_stime) + SECONDS + 1
            resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
            rc = become(args, room / f"{name}.out", room / f"{name}.err")
            os.write(tell, f"{name} {rc}\n".encode())
    finally:
        os._exit(0)


def verdict(name: str, rc: int | None, status: int, room: Path, made: Path | None) -> str | None:
    """What is wrong with the end of a command; None where nothing is, "" where it refused as it should."""
    file = room / f"{name}.err"
    err = file.read_text("utf-8", "replace") if file.exists() else ""
    last = [line for line in err.splitlines() if line.strip()][-1:] or [""]
    if rc is None:
        if os.WIFSIGNALED(status):
            kind = signal.Signals(os.WTERMSIG(status)).name
            return (
                f"longer than {SECONDS} s" if kind in ("SIGXCPU", "SIGKILL") else f"killed by {kind}: {last[0][:200]}"
            )
        return f"ended without a word: {last[0][:200]}"
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    if "Traceback (most recent call last)" in err or rc not in (0, 2):
        return f"traceback: {last[0][:300]}"
    if rc == 0:
        return None
    if len(errors) != 1 or len(errors[0]) > 2000:
        return f"{len(errors)} error lines, of {max(map(len, errors), default=0)} characters: {last[0][:200]}"
    if any(words in errors[0] for words in _NO_MEMORY):
        return f"memory: {errors[0][:200]}"
    if made is not None and made.exists():
        return f"refused, and left {made.name}: {errors[0][:200]}"
    return ""


def one(
    door: str, number: int, seed: int, models: Path, counts: Counts, keep: Path | None, every: bool = False
) -> None:
    """Make an input, run its commands, count how they ended."""
    room = Path(tempfile.mkdtemp(prefix="fuzz-", dir=models.parent))
    try:
        name, model = make_input(door, number, seed, models, room)
        chosen = (
            DOORS[door].commands
            if every
            else random.Random(f"{seed} {door} {number} commands").sample(
                DOORS[door].commands, min(2, len(DOORS[door].commands))
            )
        )
        planned = {what: command(what, model, room) for what in chosen}
        counts.inputs += 1
        left = list(planned)
        found: list[Bad] = []
        while left:
            ended, status = _forked([(what, planned[what][0]) for what in left], room)
            for what in left[: len(ended) + 1]:
                said = verdict(what, ended.get(what), status, room, planned[what][1])
                if said:
                    found.append(Bad(door, number, name, what, said))
                elif said is None:
                    counts.fine += 1
                else:
                    counts.refused += 1
            left = left[len(ended) + 1 :]
        counts.bad += found
        if found and keep is not None:
            place = keep / f"{door}-{seed}-{number}"
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(room, place)
            (place / "bad.json").write_text(json.dumps([vars(b) for b in found], indent=1))
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _forked(commands: list[tuple[str, list[str]]], room: Path) -> tuple[dict[str, int], int]:
    """(exit code of each command that came to an end, status of the process that ran them)."""
    read, write = os.pipe()
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        os.close(read)
        child(commands, room, write)
    os.close(write)
    ended: dict[str, int] = {}
    os.set_blocking(read, False)
    text, since = b"", time.monotonic()
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        with contextlib.suppress(BlockingIOError):
            text += os.read(read, 65536)
        lines = text.decode().splitlines()
        if len(lines) > len(ended):
            since = time.monotonic()
            ended = {what: int(rc) for what, rc in map(str.split, lines)}
        if done:
            break
        if time.monotonic() - since > PATIENCE * SECONDS:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)  # what it may have started
    os.close(read)
    return ended, status


def fuzz(
    door: str,
    numbers: range,
    seed: int,
    models: Path,
    keep: Path | None = None,
    show: bool = False,
    every: bool = False,
) -> Counts:
    """Run the inputs `numbers` of a door."""
    counts, start = Counts(), time.monotonic()
    for number in numbers:
        before = len(counts.bad)
        one(door, number, seed, models, counts, keep, every)
        for bad in counts.bad[before:] if show else ():
            say(f"  {bad.door} {bad.number} {bad.model} {bad.command}: {bad.what}")
    counts.seconds = time.monotonic() - start
    return counts


def prepared(models: Path | None, room: Path) -> Path:
    """The folder of whole models, made in a process of its own where there is none: making them starts threads."""
    found = models or room / "models"
    if not (found / "made.json").exists():
        subprocess.run(
            [sys.executable, str(Path(__file__).parent / "models.py"), str(found)], check=True, capture_output=True
        )
    return found


def main(given: list[str]) -> int:
    for name, value in {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1",
                        "TRANSFORMERS_VERBOSITY": "error", "COLUMNS": "200"}.items():  # fmt: skip
        os.environ.setdefault(name, value)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="inputs in all, shared by the doors")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--door", action="append", choices=sorted(DOORS), help="only this one; may be given again")
    parser.add_argument("--all", action="store_true", help="every command of a door on each input, not two by lot")
    parser.add_argument("--only", type=int, help="one input by its number, and keep it")
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each door")
    parser.add_argument("--models", type=Path, help="folder of the whole models; made where it is not there")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-found"), help="folder for inputs that end badly")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON, and nothing else")
    options = parser.parse_args(given)
    room = Path(tempfile.mkdtemp(prefix="fuzz-models-"))
    try:
        models = prepared(options.models, room)
        load(models)
        doors = options.door or list(DOORS)
        each = -(-options.count // len(doors))
        numbers = (
            range(options.first, options.first + each)
            if options.only is None
            else range(options.only, options.only + 1)
        )
        results: dict[str, Counts] = {}
        for door in doors:
            results[door] = c = fuzz(door, numbers, options.seed, models, options.keep, not options.json, options.all)
            if not options.json:
                say(
                    f"{door:12} {c.inputs:6} inputs  {c.refused:6} refused  {c.fine:6} fine  {len(c.bad):4} bad  {1000 * c.seconds / max(1, c.inputs):5.0f} ms an input",
                )
    finally:
        shutil.rmtree(room, ignore_errors=True)
    return _report(results, options)


def _report(results: dict[str, Counts], options: Any) -> int:
    bad = [b for c in results.values() for b in c.bad]
    if options.json:
        counts = {door: [c.inputs, c.refused, c.fine] for door, c in results.items()}
        say(json.dumps({"counts": counts, "bad": [vars(b) for b in bad]}))
        return 0
    kinds = Counter(b.what.split(":")[0] for b in bad)
    say(
        f"seed {options.seed}: {sum(c.inputs for c in results.values())} inputs, {len(bad)} bad"
        + (f" ({', '.join(f'{n} {k}' for k, n in kinds.items())}), kept in {options.keep}" if bad else "")
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
