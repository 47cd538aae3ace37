"""llama.cpp, measured by its own benchmark program on GGUF files."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError, RecipeError, SourceError
from lowbit.measure.backends import Backend
from lowbit.measure.interleave import Probe, SpeedSettings
from lowbit.measure.peers.peer import Opener, peer


@peer
def llama_cpp(asked: Mapping[str, Any], threads: int) -> list[Opener]:
    """gguf: a file, or several. llama_bench: the program, that of the PATH when None."""
    given, named = asked["gguf"], asked["llama_bench"]
    files = [Path(file) for file in ([given] if isinstance(given, (str, Path)) else given)]
    program = _llama_bench(files, named)
    return [partial(run_by_llama_bench, program, file, threads) for file in files]


def _llama_bench(files: list[Path], given: str | None) -> str:
    """Where the program is, "" where there is nothing for it."""
    if not files:
        if given is not None:
            raise RecipeError("llama-bench without a GGUF file would be ignored; give gguf=... (--gguf FILE) as well")
        return ""
    for file in files:
        if not file.is_file():
            raise SourceError(f"{file}: no such GGUF file")
    found = shutil.which(given or "llama-bench")
    if found is None:
        where = f"{given}: no such program" if given else "there is no llama-bench on the PATH"
        raise RecipeError(
            f"{where}; build llama.cpp and name its llama-bench (--llama-bench), or leave the GGUF file out"
        )
    return found


def run_by_llama_bench(binary: str, gguf: Path, threads: int) -> Backend:
    """llama.cpp's own benchmark program on a GGUF file: decode and prefill. LowbitError when it fails."""

    def rate(*options: str) -> float:
        command = [binary, "-m", str(gguf), "-t", str(threads), "-ngl", "0", "-r", "1", "-o", "json", *options]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
            rate = float(json.loads(done.stdout)[0]["avg_ts"])
        except OSError as error:
            raise LowbitError(
                f"{binary} cannot be run: {error.strerror or error}; build llama.cpp, or name it"
            ) from None
        except (ValueError, LookupError, TypeError):
            last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            raise LowbitError(f"{binary} on {gguf} ended with {done.returncode}: {last}") from None
        if not (math.isfinite(rate) and rate > 0):
            raise LowbitError(f"{binary} on {gguf} says {rate} tokens/s")
        return rate

    def probes(settings: SpeedSettings) -> dict[str, Probe]:
        return {
            "decode": lambda: rate("-p", "0", "-n", str(settings.new), "-d", str(settings.prompt)),
            "prefill": lambda: rate("-p", str(settings.prefill), "-n", "0"),
        }

    weight_bytes, layers, head = _read_by_llama_cpp(gguf)
    return Backend(f"llama.cpp {gguf.stem}", probes, weight_bytes, lambda n: n * layers + head)


def _read_by_llama_cpp(gguf: Path) -> tuple[int, int, int]:
    """(bytes of weights that a token reads, weights in the layers, weights in the head). SourceError for no GGUF file."""
    from gguf import GGUFReader

    try:
        tensors = {t.name: t for t in GGUFReader(gguf).tensors}
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise SourceError(f"{gguf}: not a GGUF file that can be read ({error})") from None
    nbytes = sum(int(t.n_bytes) for t in tensors.values())
    embedding, head = tensors.get("token_embd.weight"), tensors.get("output.weight")
    if head is not None and embedding is not None:
        nbytes -= int(embedding.n_bytes)
    layers = sum(int(t.n_elements) for name, t in tensors.items() if name.startswith("blk.") and len(t.shape) == 2)
    last = head if head is not None else embedding
    return nbytes, layers, int(last.n_elements) if last is not None else 0
