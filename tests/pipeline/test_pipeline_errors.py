"""A run that cannot end well says why in one line and leaves nothing behind."""

from __future__ import annotations

import errno
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.errors import OutputError, WeightError
from lowbit.interchange.files import folder_writer
from tiny import save_tiny

Float = Callable[[str], Path]
RECIPE = "absmax@int4:g32"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_folder_that_exists(tiny_folder: Float, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    lowbit.quantize(tiny_folder("llama"), "w8", tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        lowbit.quantize(tiny_folder("llama"), "w8", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    lowbit.quantize(tiny_folder("llama"), "w8", tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c" / "config.json").is_file()
    with pytest.raises(OutputError, match="cannot write"):
        lowbit.quantize(tiny_folder("llama"), "w8", tmp_path / "file" / "below")


def test_a_source_is_never_its_own_output(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    before = files(tmp_path / "model")
    with pytest.raises(OutputError):
        lowbit.quantize(tmp_path / "model", "w8", tmp_path / "model", overwrite=True)
    assert files(tmp_path / "model") == before and {p.name for p in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_number_is_named_and_nothing_is_left(value: float, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(state, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    what = "1 NaN and 0 infinite" if value != value else "0 NaN and 1 infinite"
    with pytest.raises(WeightError, match=f"'model.layers.1.mlp.up_proj.weight' has {what}") as error:
        lowbit.quantize(tmp_path / "model", RECIPE, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"model"}
    advice = str(error.value).rpartition("recipe ending in ")[2]
    lowbit.quantize(tmp_path / "model", RECIPE + advice, tmp_path / "out")  # what it advises works
    kept = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(kept.isfinite(), state["model.layers.1.mlp.up_proj.weight"].isfinite())


def test_huge_finite_weights_are_no_infinities(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    state["lm_head.weight"][:, 0] = 3e38  # their sum is infinite
    save_file(state, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    lowbit.quantize(tmp_path / "model", "absmax@int8:channel", tmp_path / "out")
    packed = lowbit.load(tmp_path / "out").lm_head.weight.dequantize()
    assert torch.allclose(packed[:, 0], state["lm_head.weight"][:, 0], rtol=1e-5)


def goes_on(caught: pytest.ExceptionInfo[OutputError], model: Path, room: Path, clean: Path) -> None:
    """Nothing is left of a run, or the error says what is, and that the same command goes on from it; which is true."""
    left = {path.name for path in room.iterdir()}
    assert left <= {"out.partial"} and bool(left) == ("the same command" in str(caught.value))
    lowbit.quantize(model, RECIPE, room / "out")
    lowbit.quantize(model, RECIPE, clean / "out")
    assert {p.name: p.read_bytes() for p in (room / "out").iterdir()} == {
        p.name: p.read_bytes() for p in (clean / "out").iterdir()
    }
    assert [path.name for path in room.iterdir()] == ["out"]


def test_a_full_disk_keeps_what_was_done_and_says_so(
    tiny_folder: Float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))
        with pytest.raises(OutputError, match=r"needs [\d,]+ bytes and the disk has 1,000 free"):
            lowbit.quantize(tiny_folder("llama"), RECIPE, tmp_path / "a" / "b" / "out")
    assert not list(tmp_path.iterdir())

    written, real = [], Path.open

    def full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "r+b":
            written.append(self)
            if len(written) > 6:
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(OutputError, match="disk is full.*what was done is kept") as caught:
            lowbit.quantize(tiny_folder("llama"), RECIPE, tmp_path / "room" / "out")
    goes_on(caught, tiny_folder("llama"), tmp_path / "room", tmp_path / "clean")


@pytest.mark.parametrize("stage", ["create", "assets", "config", "sync", "rename"])
def test_a_disk_that_fills_late(
    stage: str, tiny_folder: Float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    targets = {
        "create": (folder_writer, "create"), "assets": (shutil, "copyfile"), "sync": (folder_writer, "sync"),
        "config": ("lowbit.interchange.hf.configs.write_config",), "rename": (folder_writer.os, "rename"),
    }  # fmt: skip
    (tmp_path / "room").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(*targets[stage], full)
        with pytest.raises(OutputError, match="disk is full") as caught:
            lowbit.quantize(tiny_folder("llama"), RECIPE, tmp_path / "room" / "out")
    goes_on(caught, tiny_folder("llama"), tmp_path / "room", tmp_path / "clean")


def test_an_error_on_the_way_to_a_temporary_folder_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    save_tiny("llama", tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    state["lm_head.weight"][0, 0] = float("nan")
    save_file(state, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with pytest.raises(WeightError, match="lm_head"):
        lowbit.quantize(tmp_path / "model", RECIPE)
    assert not list((tmp_path / "temporary").iterdir())


def test_an_interrupted_run_into_a_temporary_folder_promises_nothing(tiny_folder: Float) -> None:
    seen: list[str] = []

    def stop(name: str, *_: int) -> None:
        seen.append(name)
        if len(seen) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        lowbit.quantize(tiny_folder("llama-tied"), RECIPE, max_shard_bytes=9000, progress=stop)
    assert not getattr(caught.value, "__notes__", [])  # the folder is removed, and with it what was done
