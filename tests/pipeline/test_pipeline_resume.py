"""A run that is killed at any instant goes on to the same bytes; a run that fails leaves nothing."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import lowbit
from lowbit.errors import LowbitError, OutputError
from lowbit.interchange.files import folder_writer
from lowbit.interchange.files.lock import locked
from quantized_folders import awq_layer, save_quantized
from tiers import mostly_nightly

Float = Callable[[str], Path]
RECIPE = "absmax@int4:g32"
WORKER = Path(__file__).parent / "kill_worker.py"

# A run in a process of its own that kills itself: at a tensor, or in the middle of a call of the writer.
RUN = """
import os, sys
import lowbit
from lowbit.interchange.files import folder_writer
from lowbit.interchange.files.folder_writer import FolderWriter
where, at, flush, model, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
folder_writer._FLUSH = flush
calls = reached = 0
def done(name, at, total):  # a tensor is done; a call that brings no more bytes says that one begins
    global reached
    if at > reached:
        reached = at
        die()
def die(*args, **kwargs):
    global calls
    calls += 1
    if calls > at:
        os.kill(os.getpid(), 9)
def before(cls, name):
    old = getattr(cls, name)
    def new(*args, **kwargs):
        die()
        return old(*args, **kwargs)
    setattr(cls, name, new)
if where == "journal":
    old_fsync = os.fsync
    def fsync(fd):
        die()
        return old_fsync(fd)
    os.fsync = fsync
elif where == "rename":
    old_rename = os.rename
    def rename(*args):
        old_rename(*args)
        die()
    os.rename = rename
elif where in ("flush", "verify", "finish"):
    before(FolderWriter, where)
lowbit.quantize(model, "absmax@int4:g32", out, progress=done if where == "progress" else None, max_shard_bytes=9000, overwrite="over" in sys.argv)
"""


def quantized_llama(room: Path) -> Path:
    """A tiny Llama that another program quantized."""
    config = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
    save_quantized(room / "awq", config, awq_layer)
    return room / "awq"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def run_and_die(where: str, at: int, flush: int, model: Path, out: Path, *more: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN, where, str(at), str(flush), str(model), str(out), *more],
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture(scope="module")
def whole(tiny_folder: Float, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    lowbit.quantize(tiny_folder("llama-tied"), RECIPE, out, max_shard_bytes=9000)
    return files(out)


@pytest.fixture(scope="module")
def killed(tiny_folder: Float, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run left that was killed after a dozen tensors. Copy it."""
    folder = tmp_path_factory.mktemp("killed")
    run_and_die("progress", 12, 1, tiny_folder("llama-tied"), folder / "out")
    return folder / "out.partial"


KILLS = [("progress", 7, 6000), ("journal", 4, 1), ("flush", 3, 1), ("finish", 0, 1 << 30), ("progress", 7, 1 << 30),
         ("journal", 0, 1), ("verify", 0, 1), ("journal", 40, 1)]  # fmt: skip


@pytest.mark.parametrize("kill", mostly_nightly(KILLS, every=lambda kill: kill in (0, 3)))
def test_a_killed_run_is_finished_to_the_same_bytes(
    kill: tuple[str, int, int], tiny_folder: Float, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    run_and_die(*kill, tiny_folder("llama-tied"), out)
    assert not out.exists() and (tmp_path / "out.partial").is_dir()
    solved = []
    lowbit.quantize(
        tiny_folder("llama-tied"), RECIPE, out, max_shard_bytes=9000, progress=lambda name, *_: solved.append(name)
    )
    assert files(out) == whole
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_what_was_done_is_not_done_again(
    killed: Path, tiny_folder: Float, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(killed, tmp_path / "out.partial")
    from lowbit.pipeline import driver

    read, solve = [], driver.solve
    monkeypatch.setattr(driver, "solve", lambda plan, *rest: read.append(plan.name) or solve(plan, *rest))
    result = lowbit.quantize(tiny_folder("llama-tied"), RECIPE, tmp_path / "out", max_shard_bytes=9000)
    assert len(read) == len(result.plan.tensors) - 13
    assert files(tmp_path / "out") == whole
    again = lowbit.quantize(tiny_folder("llama-tied"), RECIPE, tmp_path / "again", max_shard_bytes=9000)
    assert result.report == again.report


@pytest.mark.parametrize("damage", ["cut", "garbage", "null", "missing file", "short file", "empty journal", "a brace"])
def test_a_damaged_unfinished_run_is_mended(
    damage: str, killed: Path, tiny_folder: Float, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    shutil.copytree(killed, tmp_path / "out.partial")
    partial = tmp_path / "out.partial"
    journal = partial / folder_writer.JOURNAL
    text = journal.read_text()
    shard = sorted(partial.glob("*.safetensors"))[0]
    if damage == "cut":
        journal.write_text(text[:-30])
    elif damage == "garbage":
        journal.write_text(text + '{"tensor": "model.norm.weight", "sha')
    elif damage == "null":  # what some file systems leave of a block that was not written
        journal.write_bytes(text.encode() + b"\0" * 100)
    elif damage == "missing file":
        shard.unlink()
    elif damage == "short file":
        with shard.open("r+b") as file:
            file.truncate(shard.stat().st_size - 5)
    elif damage == "a brace":  # cut where the line looks whole
        journal.write_text(text[: text.rindex("}, ") + 1])
    else:
        journal.write_text("")
    lowbit.quantize(tiny_folder("llama-tied"), RECIPE, tmp_path / "out", max_shard_bytes=9000)
    assert files(tmp_path / "out") == whole


def test_bytes_that_changed_since_they_were_written_are_found(killed: Path, tiny_folder: Float, tmp_path: Path) -> None:
    shutil.copytree(killed, tmp_path / "out.partial")
    shard = sorted((tmp_path / "out.partial").glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(LowbitError, match="reads back other than it was written"):
        lowbit.quantize(tiny_folder("llama-tied"), RECIPE, tmp_path / "out", max_shard_bytes=9000)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_somebody_else_is_not_removed(tiny_folder: Float, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="in the way"):
            lowbit.quantize(tiny_folder("llama"), RECIPE, tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "mine"


def test_an_unfinished_run_of_something_else_is_refused(
    killed: Path, tiny_folder: Float, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    shutil.copytree(killed, tmp_path / "out.partial")
    before = files(tmp_path / "out.partial")
    for model, recipe, size in (
        ("llama", RECIPE, 9000),
        ("llama-tied", "absmax@int4:g16", 9000),
        ("llama-tied", RECIPE, 8000),
    ):
        with pytest.raises(OutputError, match=r"out.partial holds an unfinished run of another .*--overwrite"):
            lowbit.quantize(tiny_folder(model), recipe, tmp_path / "out", max_shard_bytes=size)
    assert files(tmp_path / "out.partial") == before  # a refusal destroys nothing
    lowbit.quantize(tiny_folder("llama-tied"), RECIPE, tmp_path / "out", max_shard_bytes=9000)
    assert files(tmp_path / "out") == whole


def test_killed_while_replacing_a_folder_loses_neither(
    tiny_folder: Float, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    lowbit.quantize(tiny_folder("llama"), RECIPE, out)
    old = files(out)
    run_and_die(
        "rename", 0, 1, tiny_folder("llama-tied"), out, "over"
    )  # the old folder is aside, the new one not yet there
    left = [files(path.parent) for path in tmp_path.rglob("config.json")]
    assert not out.exists() and old in left and whole in left
    lowbit.quantize(tiny_folder("llama-tied"), RECIPE, out, max_shard_bytes=9000, overwrite=True)
    assert files(out) == whole and not (tmp_path / "out.partial").exists()


def test_the_same_command_twice(tiny_folder: Float, tmp_path: Path, whole: dict[str, bytes]) -> None:
    lowbit.quantize(tiny_folder("llama-tied"), RECIPE, tmp_path / "out", max_shard_bytes=9000)
    assert files(tmp_path / "out") == whole
    first = lowbit.quantize(tiny_folder("llama-tied"), RECIPE, tmp_path / "other", max_shard_bytes=9000)
    solved: list[str] = []
    again = lowbit.quantize(
        tiny_folder("llama-tied"),
        RECIPE,
        tmp_path / "out",
        max_shard_bytes=9000,
        progress=lambda n, *_: solved.append(n),
    )
    assert files(tmp_path / "out") == whole and again.report == first.report and not solved  # already done
    shutil.rmtree(tmp_path / "other")
    for model, recipe, size in (
        ("llama", RECIPE, 9000),
        ("llama-tied", "absmax@int4:g16", 9000),
        ("llama-tied", RECIPE, 8000),
    ):
        with pytest.raises(OutputError, match="not empty.*--overwrite"):
            lowbit.quantize(tiny_folder(model), recipe, tmp_path / "out", max_shard_bytes=size)
    assert files(tmp_path / "out") == whole
    (tmp_path / "out" / "other.txt").write_text("x")
    lowbit.quantize(tiny_folder("llama-tied"), RECIPE, tmp_path / "out", max_shard_bytes=9000, overwrite=True)
    assert files(tmp_path / "out") == whole and {p.name for p in tmp_path.iterdir()} == {"out"}


def test_the_manifest_says_where_bytes_came_from(tiny_folder: Float, whole: dict[str, bytes]) -> None:
    import hashlib

    manifest = json.loads(whole["lowbit.json"])
    state = load_file(tiny_folder("llama-tied") / "model.safetensors")
    assert set(manifest["tensors"]) == set(state)
    for name, tensor in state.items():
        assert manifest["tensors"][name]["source"] == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    assert manifest["recipe"]["text"] == RECIPE and manifest["lowbit"] == lowbit.__version__
    assert str(tiny_folder("llama-tied")) not in whole["lowbit.json"].decode() + whole["config.json"].decode()


def test_progress_ends_at_all_bytes(tiny_folder: Float, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    result = lowbit.quantize(tiny_folder("llama"), RECIPE, tmp_path / "out", progress=lambda *a: seen.append(a))
    names = [t.name for t in result.plan.tensors]
    assert seen[0] == (names[0], 0, result.plan.bytes_before), (
        "the first tensor, which may take long, is named as it begins"
    )
    assert [name for (name, at, _), (_, before, _) in zip(seen[1:], seen, strict=False) if at > before] == names
    assert [name for name, _, _ in seen] == [name for name in names for _ in range(2)]
    assert [at for _, at, _ in seen] == sorted(at for _, at, _ in seen)
    assert seen[-1][1] == seen[-1][2] == result.plan.bytes_before


@pytest.mark.parametrize(
    ("job", "every"),
    [("quantize", 5), ("gguf", 9), *(pytest.param(job, 1, marks=pytest.mark.slow) for job in (
        "quantize", "calibrated", "replace", "dequantize", "import", "gguf", "vllm", "quantize_as"))],
)  # fmt: skip
def test_killed_at_every_step(job: str, every: int, tiny_folder: Float, packed_folder: Any, tmp_path: Path) -> None:
    packed = job in ("gguf", "vllm")
    model = (
        packed_folder("llama", "q8_0,embed=q8_0" if job == "gguf" else "int4:g32")
        if packed
        else quantized_llama(tmp_path)
        if job == "import"
        else tiny_folder("llama")
    )
    done = subprocess.run(
        [sys.executable, WORKER, job, str(every), model, tmp_path / "room"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= 5


def test_two_at_once_in_one_process(tiny_folder: Float, tmp_path: Path, whole: dict[str, bytes]) -> None:
    model, out, words = tiny_folder("llama-tied"), tmp_path / "a" / "out", []

    def second(name: str, *_: int) -> None:
        before = {path.name for path in out.parent.iterdir()}
        with pytest.raises(OutputError, match="another run is writing .*out; wait"):
            lowbit.quantize(model, RECIPE, out, overwrite=True)
        thread = threading.Thread(target=lambda: words.append(refused(model, out)))
        thread.start()
        thread.join()
        assert {path.name for path in out.parent.iterdir()} == before

    lowbit.quantize(model, RECIPE, out, max_shard_bytes=9000, progress=second)
    assert files(out) == whole and [path.name for path in out.parent.iterdir()] == ["out"]
    assert set(words) == {"told"}


def refused(model: Path, out: Path) -> str:
    try:
        lowbit.quantize(model, RECIPE, out, overwrite=True)
    except OutputError as error:
        return "told" if "another run" in str(error) else str(error)
    return "not told"


def test_a_lock_outlives_no_process(tmp_path: Path) -> None:
    script = "import os, sys\nfrom lowbit.interchange.files.lock import locked\nwith locked(sys.argv[1]):\n    print(1, flush=True)\n    sys.stdin.read()"
    child = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "new" / "out"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None and child.stdout.readline()
    with pytest.raises(OutputError, match="another run"), locked(tmp_path / "new" / "out"):
        pass
    with locked(tmp_path / "new" / "other"):
        pass
    child.kill()
    child.communicate()
    with locked(tmp_path / "new" / "out"), locked(tmp_path / "new" / "deep" / "out"):
        pass
    assert list((tmp_path / "new").iterdir()) == []


def test_an_interrupted_run_says_what_it_left(tiny_folder: Float, tmp_path: Path, whole: dict[str, bytes]) -> None:
    for error in (KeyboardInterrupt, MemoryError):
        seen: list[str] = []

        def stop(name: str, *_: int, seen: list[str] = seen, error: type[BaseException] = error) -> None:
            seen.append(name)
            if len(seen) == 6:
                raise error

        with pytest.raises(error) as caught:
            lowbit.quantize(tiny_folder("llama-tied"), RECIPE, tmp_path / "out", max_shard_bytes=9000, progress=stop)
        assert "out.partial keeps what was done" in caught.value.__notes__[0]
        assert {path.name for path in tmp_path.iterdir()} == {"out.partial"}
    lowbit.quantize(tiny_folder("llama-tied"), RECIPE, tmp_path / "out", max_shard_bytes=9000)
    assert files(tmp_path / "out") == whole and {path.name for path in tmp_path.iterdir()} == {"out"}
