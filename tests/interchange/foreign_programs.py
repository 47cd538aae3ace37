"""Calls of the programs in benchmarks/readers, for the tests and for benchmarks/foreign_readers.py, and a model that all of them take."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import load_file
from torch import Tensor

import lowbit
from tiny import VOCAB

SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "readers"
NEEDS_LOWBIT = ("lm_eval_reader.py",)


class ReaderFailed(Exception):
    """A reader ended without an answer. The message is its own word for why; `said` is the end of its standard error."""

    def __init__(self, said: str) -> None:
        lines = said.splitlines()
        # vLLM's last error is that its engine failed, whatever the reason.
        reasons = [line for line in lines if "Error" in line and "EngineCore" not in line]
        super().__init__((reasons or lines or ["it ended without a word"])[-1].strip()[-300:])
        self.said = said[-2000:]


def wide_llama(width: int) -> transformers.LlamaConfig:
    """A Llama of 2 layers whose rows are as long as the kernels of vLLM want them: `width` is 128 or a multiple of it."""
    return transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def asked(python: str, script: str, *arguments: Any) -> list[dict[str, Any]]:
    """The lines of JSON that a script prints. ReaderFailed when it has none; only a script that needs lowbit is shown where it is."""
    shown = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if script in NEEDS_LOWBIT:
        shown["PYTHONPATH"] = str(Path(lowbit.__file__).parents[1])
    command = [python, str(SCRIPTS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=shown)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not found:
        raise ReaderFailed(done.stderr)
    return found


def read(
    python: str, script: str, rows: Tensor, out: Path, *folders: str
) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    """What a script says of each DTYPE=FOLDER and what it computed, nothing where it says `error`.

    `rows` [rows, tokens] are the ids. Of `out`, ids.json and a file for each folder are left. ReaderFailed as `asked`."""
    out.mkdir(parents=True, exist_ok=True)
    ids = out / "ids.json"
    ids.write_text(json.dumps(rows.tolist()))
    found = asked(python, script, ids, out, *folders)
    return [
        (one, {} if "error" in one else load_file(out / f"{i}.safetensors"))
        for i, one in enumerate(found[-len(folders) :])
    ]


def apart(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def error_of(read: dict[str, Tensor], logits: Tensor) -> float:
    """How far what was read is from `logits` [rows, tokens, vocabulary].

    Log-probabilities of the next token are logits up to a number for each row, so the row's mean is taken off both."""
    if "logits" in read:
        return apart(read["logits"], logits)
    found, last = read["logprobs"], logits[:, -1]
    return apart(found - found.mean(1, True), last - last.mean(1, True))
