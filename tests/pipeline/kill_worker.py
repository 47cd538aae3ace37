"""Runs a job and kills it at one step after the other, each in a fork; whatever was left, the same job must then succeed.

    python kill_worker.py JOB EVERY MODEL ROOM

EVERY: at each step whose number it divides. A step is a call that changes names on the disk or waits for it. Prints how many
there were, and ends with an error where a second run failed, wrote other bytes, or left anything beside the output.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lowbit
from lowbit.convert.quantize_as import prepare, quantized_as
from lowbit.interchange.files import folder_writer

STEPS = ("fsync", "rename", "replace", "unlink", "remove", "mkdir", "rmdir")
TEXT = ["the cat and the hen ate the rat in the tin " * 40]


def quantize_as(model: Path, out: Path) -> None:
    ready = prepare(str(model), "int4:g32", "vllm")
    with quantized_as(str(model), ready, out):
        pass


def replaced(model: Path, out: Path) -> None:
    lowbit.quantize(str(model), "absmax@int8:channel", out, overwrite=True, max_shard_bytes=9000)


JOBS: dict[str, Callable[[Path, Path], Any]] = {
    "quantize": lambda model, out: lowbit.quantize(str(model), "absmax@int4:g32", out, max_shard_bytes=9000),
    "calibrated": lambda model, out: lowbit.quantize(
        str(model), "gptq@int4:g32", out, calibration=TEXT, samples=2, length=32
    ),
    "replace": replaced,
    "dequantize": lambda model, out: lowbit.dequantize_model(model, out),
    "import": lambda model, out: lowbit.import_model(model, out),
    "gguf": lambda model, out: lowbit.export(model, "gguf", out),
    "vllm": lambda model, out: lowbit.export(model, "vllm", out),
    "quantize_as": quantize_as,
}


def in_fork(work: Callable[[], Any]) -> int:
    """The exit code of `work`, done in a fork: 0, or 1 with its error on stderr."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def dying(at: int, work: Callable[[], Any]) -> None:
    """`work`, killed before its step number `at`."""
    left = [at]

    def before(name: str) -> None:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            return real(*args, **kwargs)

        setattr(os, name, call)

    for name in STEPS:
        before(name)
    work()
    if left[0] == 0:  # after the last step
        os._exit(9)


def contents(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def main(job: str, every: int, model: Path, room: Path) -> None:
    torch.set_num_threads(1)
    logging.getLogger("lowbit").setLevel(logging.ERROR)
    folder_writer._FLUSH = 6000
    work, name = JOBS[job], "out.gguf" if job == "gguf" else "out"
    (room / "right").mkdir(parents=True)
    work(model, room / "right" / name)  # in this process, so that forks find all libraries loaded
    right, at = contents(room / "right" / name), 0
    while True:
        place = room / str(at)
        place.mkdir()
        if job == "replace":
            shutil.copytree(model, place / name)
        code = in_fork(lambda: dying(at, lambda: work(model, place / name)))  # noqa: B023  done at once
        if code == 0:
            break
        assert code == 9, (at, code)
        assert in_fork(lambda: work(model, place / name)) == 0, f"killed at step {at}: {sorted(os.listdir(place))}"  # noqa: B023
        assert contents(place / name) == right, f"killed at step {at}: other bytes"
        assert os.listdir(place) == [name], f"killed at step {at}: {os.listdir(place)}"
        shutil.rmtree(place)
        at += every
    sys.stdout.write(f"{at}\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
