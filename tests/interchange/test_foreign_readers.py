"""Other programs load what lowbit writes, without lowbit, and compute the same.

Each runs in an environment of its own where one is named, LOWBIT_PEER_TRANSFORMERS, _GPTQMODEL, _VLLM or _LM_EVAL being the Python
in it, else in this one; where the program is in neither, the test is skipped.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from foreign_programs import ReaderFailed, asked, error_of, read, wide_llama
from gguf_models import save_model
from torch import Tensor

import lowbit
from tiny import VOCAB, tiny_tokenizer

PACKAGES = {"transformers": "compressed_tensors", "gptqmodel": "gptqmodel", "vllm": "vllm", "lm_eval": "lm_eval"}
pytestmark = pytest.mark.peer
ROWS = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))


def python_of(reader: str) -> str:
    named = os.environ.get(f"LOWBIT_PEER_{reader.upper()}")
    if named is None and importlib.util.find_spec(PACKAGES[reader]) is None:
        pytest.skip(f"{PACKAGES[reader]} is not installed here, and LOWBIT_PEER_{reader.upper()} names no environment")
    return named or sys.executable


def run(reader: str, script: str, *arguments: Any) -> dict[str, Any]:
    """The last line of JSON that a reader's script prints."""
    try:
        return asked(python_of(reader), script, *arguments)[-1]
    except ReaderFailed as error:
        pytest.fail(error.said)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_model(wide_llama(128), folder)
    return folder


def written(llama: Path, recipe: str, target: str, out: Path) -> tuple[Path, Tensor]:
    """The exported folder, and lowbit's own logits."""
    static = {"calibration": "self", "samples": 1, "length": 64} if "a=minmax" in recipe else {}
    lowbit.quantize(llama, recipe, out / "ours", **static)  # type: ignore[arg-type]
    made = lowbit.export(out / "ours", target, out / "theirs")
    with torch.inference_mode():
        logits: Tensor = lowbit.load(out / "ours", torch.float32, kernel="expand")(input_ids=ROWS).logits
    return made.path, logits


def error(reader: str, script: str, folder: Path, dtype: str, ours: Tensor) -> float:
    """How far a reader's logits are from lowbit's own."""
    try:
        ((said, found),) = read(python_of(reader), script, ROWS, folder.parent, f"{dtype}={folder}")
    except ReaderFailed as failed:
        pytest.fail(failed.said)
    assert "error" not in said, said
    return error_of(found, ours)


@pytest.mark.parametrize(
    ("recipe", "dtype", "within"),
    [
        ("int4:g32", "float32", 1e-3), ("int8:channel", "float32", 1e-3), ("fp8", "float32", 1e-3),
        ("int4:g32,*.down_proj=int8:channel,*.layers.0.self_attn.o_proj=keep", "float32", 1e-3),
        # It divides by 127.5 where a symmetric range is rounded to 127, and a rounding that tips over is a step.
        ("int8:channel,a=int8:token", "float32", 3e-2), ("e4m3:channel,a=fp8:token", "float32", 3e-2),
        ("int8:tensor,a=minmax@int8:tensor:asym,fallback=never", "float32", 3e-2),
        # It expands these to bfloat16, whatever it is asked for.
        ("mxfp4", "bfloat16", 3e-2), ("mxfp8", "bfloat16", 3e-2), ("nvfp4", "bfloat16", 5e-2),
    ],
)  # fmt: skip
def test_compressed_tensors(llama: Path, tmp_path: Path, recipe: str, dtype: str, within: float) -> None:
    python_of("transformers")
    folder, ours = written(llama, recipe, "vllm", tmp_path)
    assert error("transformers", "transformers_reader.py", folder, dtype, ours) < within


@pytest.mark.parametrize(
    ("target", "recipe"),
    [("gptq", "int4:g32"), ("gptq", "int8:channel"), ("gptq", "int3:g32"), ("gptq", "uint4:g64:asym"),
     ("awq", "int4:g32"), ("awq", "uint4:g64:asym")],
)  # fmt: skip
def test_gptqmodel(llama: Path, tmp_path: Path, target: str, recipe: str) -> None:
    python_of("gptqmodel")
    folder, ours = written(llama, recipe, target, tmp_path)
    assert error("gptqmodel", "transformers_reader.py", folder, "float16", ours) < 1e-2


@pytest.mark.parametrize(
    ("target", "recipe"),
    [("vllm", "int4:g64"), ("vllm", "int4:g32"), ("vllm", "uint4:g64:asym"), ("vllm", "int8:channel,a=int8:token"),
     ("vllm", "int8:channel,a=minmax@int8:tensor,fallback=never"), ("gptq", "int4:g32"), ("awq", "uint4:g64:asym")],
)  # fmt: skip
def test_vllm(llama: Path, tmp_path: Path, target: str, recipe: str) -> None:
    python_of("vllm")
    folder, ours = written(llama, recipe, target, tmp_path)
    assert error("vllm", "vllm_reader.py", folder, "auto", ours) < 4e-2  # it computes in bfloat16


@pytest.mark.parametrize(("target", "recipe"), [("vllm", "int4:g32"), ("gptq", "int4:g32"), ("awq", "uint4:g32:asym")])
def test_vllm_reads_layers_that_modules_keep_turned(tmp_path: Path, target: str, recipe: str) -> None:
    python_of("vllm")
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=256, n_embd=128, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        architectures=["GPT2LMHeadModel"],
    )  # fmt: skip
    save_model(config, tmp_path / "gpt2")
    folder, ours = written(tmp_path / "gpt2", recipe, target, tmp_path)
    assert error("vllm", "vllm_reader.py", folder, "auto", ours) < 4e-2


@pytest.mark.parametrize("recipe", ["int4:g64", "int8:channel,a=int8:token"])
def test_vllm_serves_it_and_the_openai_client_is_answered(llama: Path, tmp_path: Path, recipe: str) -> None:
    python_of("vllm")
    folder, _ = written(llama, recipe, "vllm", tmp_path)
    found = run("vllm", "openai_client.py", folder, "the and", "--tokens", 4)
    tokenizer = tiny_tokenizer()
    ids = tokenizer("the and", return_tensors="pt")["input_ids"]
    model = lowbit.load(tmp_path / "ours", torch.float32, kernel="expand")
    with torch.inference_mode():
        first = int(model(input_ids=ids).logits[0, -1].argmax())
    assert found["text"].strip().startswith(tokenizer.decode([first]).strip())


def test_lm_eval_measures_a_lowbit_folder(llama: Path, tmp_path: Path) -> None:
    python_of("lm_eval")
    lowbit.quantize(llama, "int4:g32", tmp_path / "ours")
    words = "the and in her then an anther " * 4
    (tmp_path / "text.txt").write_text(words)
    found = run("lm_eval", "lm_eval_reader.py", tmp_path / "ours", tmp_path / "text.txt")
    tokenizer = tiny_tokenizer()
    ids = torch.tensor([[1, *tokenizer(words, add_special_tokens=False)["input_ids"]]])
    model = lowbit.load(tmp_path / "ours", torch.float32, kernel="expand")
    with torch.inference_mode():
        scores = model(input_ids=ids[:, :-1]).logits.log_softmax(-1)
    nats = -float(scores[0].gather(1, ids[0, 1:, None]).sum())
    assert math.isclose(found["bits_per_byte"], nats / math.log(2) / len(words.encode()), rel_tol=1e-3)
