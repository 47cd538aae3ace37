"""Other programs keep keys and values in fp8 with the scales that lowbit wrote. Environments as in `test_foreign_readers.py`."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_programs import ReaderFailed, error_of, read, wide_llama
from gguf_models import save_model
from safetensors.torch import load_file
from torch import Tensor

import lowbit
from lowbit.calibration.decoding import cache_name
from lowbit.convert.kv_ranges import _Watched
from lowbit.interchange.exporters.common.kv_ranges import stored
from tiny import VOCAB

pytestmark = pytest.mark.peer
ROWS = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
TEXT = torch.randint(3, VOCAB, (1, 64), generator=torch.Generator().manual_seed(1))


def python_of(reader: str, package: str) -> str:
    named = os.environ.get(f"LOWBIT_PEER_{reader.upper()}")
    if named is None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed here, and LOWBIT_PEER_{reader.upper()} names no environment")
    return named or sys.executable


def asked(python: str, script: str, dtype: str, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        ((said, found),) = read(python, script, ROWS, folder.parent, f"{dtype}={folder}")
    except ReaderFailed as failed:
        pytest.fail(failed.said)
    assert "error" not in said, said
    return said, found


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ours`, a Llama that lowbit quantized, and `theirs`, its export with scales of an fp8 cache."""
    folder = tmp_path_factory.mktemp("kv")
    save_model(wide_llama(128), folder / "llama")
    lowbit.quantize(folder / "llama", "int4:g32", folder / "ours")
    lowbit.export(folder / "ours", "vllm", folder / "theirs", kv="fp8", calibration=[TEXT])
    return folder


def pairs(room: Path) -> list[list[float]]:
    """Scales of keys and values, a layer each."""
    tensors = load_file(room / "theirs" / "model.safetensors")
    return [[float(tensors[f"model.layers.{i}.self_attn.{p}_scale"]) for p in "kv"] for i in range(2)]


def logits(room: Path, kept: Callable[[Tensor, float], Tensor]) -> Tensor:
    """Of lowbit's folder, with keys and values as `kept(x, scale)` has them."""
    model: Any = lowbit.load(room / "ours", torch.float32, kernel="expand")
    scales = pairs(room)

    def seen(keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return kept(keys, scales[layer][0]), kept(values, scales[layer][1])

    with torch.inference_mode():
        cache = {str(cache_name(model)): _Watched(model.config, seen)}
        found: Tensor = model(input_ids=ROWS, use_cache=True, **cache).logits
    return found


def plain(x: Tensor, scale: float) -> Tensor:
    return x


def nearest(x: Tensor, scale: float) -> Tensor:
    return stored(x, "fp8", scale)


def towards_zero(x: Tensor, scale: float) -> Tensor:
    """vLLM 0.32's kernel for CPUs cuts the digits off instead of rounding to the nearest."""
    x = (x.bfloat16().float() / scale).clamp(-448, 448)
    codes = x.to(torch.float8_e4m3fn)
    beyond = (codes.float().abs() > x.abs()).to(torch.uint8)
    return (codes.view(torch.uint8) - beyond).view(torch.float8_e4m3fn).float() * scale


def test_vllm_keeps_an_fp8_cache_with_our_scales(room: Path) -> None:
    python = python_of("vllm", "vllm")
    said, found = asked(python, "vllm_reader.py", "auto", room / "theirs")
    assert said["cache"]["kind"] == "fp8"
    assert torch.allclose(torch.tensor(said["cache"]["scales"]), torch.tensor(pairs(room)), rtol=1e-6)
    assert error_of(found, logits(room, plain)) < 6e-2
    cut, rounded = (error_of(found, logits(room, kept)) for kept in (towards_zero, nearest))
    assert min(cut, rounded) < 1.5e-2  # it computes in bfloat16


def test_transformers_loads_the_folder(room: Path) -> None:
    """With its cache in fp8 where compressed-tensors knows the attention's argument, else in floats."""
    python = python_of("transformers", "compressed_tensors")
    _, found = asked(python, "transformers_reader.py", "float32", room / "theirs")
    floats, rounded = (error_of(found, logits(room, kept)) for kept in (plain, nearest))
    assert floats < 1e-3 or rounded < 5e-3
