"""Every example of every help text, as it is typed, in a folder with the demo's model and what the examples before made of it.

The models are tiny ones that stand in the current folder under the names that the examples have: a folder goes before a name of
lowbit's own and before a name of the hub.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import typer.main
from typer.testing import CliRunner, Result

import lowbit
from handmade_adapters import factors, write
from lowbit.calibration import text
from lowbit.cli.main import app
from quantized_folders import gptq_layer, save_quantized
from tiny import tiny_tokenizer

CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
HUB = re.compile(r"[\w.-]+/[\w.-]+")
# What an example may need beside lowbit, and why it is not run where that is missing: a part of its text -> (there?, reason).
NEEDS = {
    "--gguf": (lambda: shutil.which("llama-bench") is not None, "measures llama.cpp, whose llama-bench is not here"),
    "--plot": (lambda: importlib.util.find_spec("matplotlib") is not None, "draws with matplotlib, which is not here"),
    "gguf": (
        lambda: importlib.util.find_spec("gguf") is not None,
        "reads back with the gguf package, which is not here",
    ),
}
TEXT = "the cat and the hen are in the tree, and the rain is in the air. " * 40


def commands() -> dict[str, Any]:
    """Every command by name, as typer makes them."""
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def examples(command: Any) -> list[str]:
    """The lines of a command's epilog that are typed, without what a shell does with their output."""
    found = re.findall(r"^(?:.*?Examples?:)?\s*(lowbit .+)$", command.epilog or "", re.MULTILINE)
    return [line.partition(" > ")[0].partition("   #")[0].strip() for line in found]


EVERY = [(name, line) for name, command in commands().items() for line in examples(command)]
SLOW = ("lowbit bench", "lowbit doctor")  # they measure speed for half a minute or more; other tests run them in short


def test_every_command_has_an_example_of_itself() -> None:
    for name, command in commands().items():
        lines = examples(command)
        assert lines and all(line.startswith(f"lowbit {name}") for line in lines), name
        assert (command.epilog or "").count("lowbit ") == len(lines), (name, command.epilog)


def test_examples_and_messages_name_models_that_anybody_can_download() -> None:
    source = Path(__file__).parents[2] / "src"
    gated = re.compile(r"meta-llama/|google/gemma|mistralai/", re.IGNORECASE)
    assert [file.name for file in source.rglob("*.py") if gated.search(file.read_text("utf-8"))] == []


def float_model(folder: Path) -> None:
    """A tiny Llama that the engine computes, with a tokenizer that has a chat template."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words = tiny_tokenizer()
    words.chat_template = CHAT
    words.save_pretrained(folder)


def small_text() -> Any:
    """In place of Python's manual, which takes a tiny model minutes."""
    return text._make("a short text", (TEXT,))


def run(line: str) -> Result:
    """A command as a shell would give it, with something to say where it asks."""
    return CliRunner().invoke(app, shlex.split(line)[1:], input="hello\n/exit\n")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder: `smollm2`, the models of the hub that examples name, and what `lowbit quantize smollm2` makes."""
    place = tmp_path_factory.mktemp("examples")
    float_model(place / "smollm2")
    for name in {word for _, line in EVERY for word in shlex.split(line) if HUB.fullmatch(word)}:
        if "gptq" in name.lower():
            section = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "desc_act": False}
            save_quantized(place / name, section, gptq_layer)
        else:
            shutil.copytree(place / "smollm2", place / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("COLUMNS", "80")
        patch.setattr(text, "_python_reference", small_text)
        write(place / "my-adapter", factors({"model.layers.0.self_attn.q_proj": (64, 64)}))
        done = run("lowbit quantize smollm2 --windows 1")
        assert done.exit_code == 0, done.output
        yield place


@pytest.mark.parametrize(
    ("name", "line"),
    [
        pytest.param(name, line, id=line, marks=pytest.mark.slow if line.startswith(SLOW) else ())
        for name, line in EVERY
    ],
)
def test_an_example_does_what_it_says(name: str, line: str, room: Path) -> None:
    for part, (there, reason) in NEEDS.items():
        if part in line and not there():
            pytest.skip(f"{line}: {reason}")
    if "--target-size 80MB" in line:  # a middle size of the tiny model, as this is one of the real one
        line = line.replace("80MB", f"{lowbit.plan('smollm2', 'int4:g64').output_bytes}B")
    line = line.replace("--context 8192", "--context 1024")  # as much as the short text has
    again = line == "lowbit quantize smollm2"  # what it makes is there already
    result = run(f"{line} --overwrite" if again else line)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "Traceback" not in result.output and (result.stdout.strip() or "--plots" in line)
    words = shlex.split(line)
    if "--json" in words:
        json.loads(result.stdout)
    for option, out in itertools.pairwise(words):
        if option in ("-o", "--out", "--plots"):
            assert (room / out).exists(), line
