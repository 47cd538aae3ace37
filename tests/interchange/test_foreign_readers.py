"""Other programs load what lowbit writes, without lowbit, and compute the same.

Each runs in an environment of its own where one is named, LOWBIT_PEER_TRANSFORMERS, _GPTQMODEL, _VLLM or _LM_EVAL being the Python
in it, else in this one; where the program is in neither, the test is skipped.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lowbit
from tiny import VOCAB, tiny_tokenizer

READERS = Path(__file__).parents[2] / "benchmarks" / "readers"
PACKAGES = {"transformers": "compressed_tensors", "gptqmodel": "gptqmodel", "vllm": "vllm", "lm_eval": "lm_eval"}
pytestmark = pytest.mark.peer
ROWS = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))


def python_of(reader: str) -> str:
    named = os.environ.get(f"LOWBIT_PEER_{reader.upper()}")
    if named is None and importlib.util.find_spec(PACKAGES[reader]) is None:
        pytest.skip(f"{PACKAGES[reader]} is not installed here, and LOWBIT_PEER_{reader.upper()} names no environment")
    return named or sys.executable


def run(reader: str, script: str, *arguments: Any) -> dict[str, Any]:
    shown = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" or reader == "lm_eval"}
    if reader == "lm_eval":
        shown["PYTHONPATH"] = str(Path(lowbit.__file__).parents[1])
    command = [python_of(reader), str(READERS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=shown)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for the kernels of vLLM: heads of 32, rows of 128."""
    import transformers

    folder = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def written(llama: Path, recipe: str, target: str, out: Path) -> tuple[Path, Tensor]:
    """The exported folder, and lowbit's own logits."""
    static = {"calibration": "self", "samples": 1, "length": 64} if "a=minmax" in recipe else {}
    lowbit.quantize(llama, recipe, out / "ours", **static)  # type: ignore[arg-type]
    made = lowbit.export(out / "ours", target, out / "theirs")
    with torch.inference_mode():
        logits: Tensor = lowbit.load(out / "ours", torch.float32, kernel="expand")(input_ids=ROWS).logits
    return made.path, logits


def read(reader: str, script: str, folder: Path, dtype: str) -> dict[str, Tensor]:
    (folder.parent / "ids.json").write_text(json.dumps(ROWS.tolist()))
    said = run(reader, script, folder.parent / "ids.json", folder.parent, f"{dtype}={folder}")
    assert "error" not in said, said
    found: dict[str, Tensor] = load_file(folder.parent / "0.safetensors")
    return found


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


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
    assert apart(read("transformers", "transformers_reader.py", folder, dtype)["logits"], ours) < within


@pytest.mark.parametrize(
    ("target", "recipe"),
    [("gptq", "int4:g32"), ("gptq", "int8:channel"), ("gptq", "int3:g32"), ("gptq", "uint4:g64:asym"),
     ("awq", "int4:g32"), ("awq", "uint4:g64:asym")],
)  # fmt: skip
def test_gptqmodel(llama: Path, tmp_path: Path, target: str, recipe: str) -> None:
    python_of("gptqmodel")
    folder, ours = written(llama, recipe, target, tmp_path)
    assert apart(read("gptqmodel", "transformers_reader.py", folder, "float16")["logits"], ours) < 1e-2


@pytest.mark.parametrize(
    ("target", "recipe"),
    [("vllm", "int4:g64"), ("vllm", "int4:g32"), ("vllm", "uint4:g64:asym"), ("vllm", "int8:channel,a=int8:token"),
     ("vllm", "int8:channel,a=minmax@int8:tensor,fallback=never"), ("gptq", "int4:g32"), ("awq", "uint4:g64:asym")],
)  # fmt: skip
def test_vllm(llama: Path, tmp_path: Path, target: str, recipe: str) -> None:
    python_of("vllm")
    folder, ours = written(llama, recipe, target, tmp_path)
    found, last = read("vllm", "vllm_reader.py", folder, "auto")["logprobs"], ours[:, -1]
    # In bfloat16; log-probabilities are logits up to a number for each row.
    assert apart(found - found.mean(1, True), last - last.mean(1, True)) < 4e-2


@pytest.mark.parametrize(("target", "recipe"), [("vllm", "int4:g32"), ("gptq", "int4:g32"), ("awq", "uint4:g32:asym")])
def test_vllm_reads_layers_that_modules_keep_turned(tmp_path: Path, target: str, recipe: str) -> None:
    import transformers

    python_of("vllm")
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=256, n_embd=128, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        architectures=["GPT2LMHeadModel"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    folder, ours = written(tmp_path / "gpt2", recipe, target, tmp_path)
    found, last = read("vllm", "vllm_reader.py", folder, "auto")["logprobs"], ours[:, -1]
    assert apart(found - found.mean(1, True), last - last.mean(1, True)) < 4e-2


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
