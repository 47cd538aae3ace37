"""An adapter in place of a model: every command names its base and what to type."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lowbit.cli.main import app
from lowbit.errors import SourceError
from lowbit.interchange.files.adapter import refuse_adapter
from lowbit.interchange.opening import open_source

BASE = "HuggingFaceTB/SmolLM2-135M"


def adapter(folder: Path, content: Any = None, tokenizer: bool = False) -> Path:
    """A folder such as peft writes; content: of its settings, as text or as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"peft_type": "LORA", "base_model_name_or_path": BASE, "r": 8} if content is None else content
    (folder / "adapter_config.json").write_text(values if isinstance(values, str) else json.dumps(values))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    if tokenizer:
        (folder / "tokenizer.json").write_text("{}")
    return folder


def said_of(folder: Path) -> str:
    with pytest.raises(SourceError) as found:
        open_source(folder)
    text = str(found.value)
    assert "\n" not in text and len(text) < 1200
    return text


COMMANDS = (
    "quantize {}", "quantize {} w4 --as gguf", "quantize {} --target-bits 4", "plan {}", "evaluate {}", "compare {} w4",
    "generate {} hello", "chat {}", "bench {}", "import {} -o out", "dequantize {} -o out", "export {} --as gguf", "inspect {}",
    "explain {}:q_proj",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_to_do(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    adapter(tmp_path / "my-lora")
    result = CliRunner().invoke(app, shlex.split(command.format("my-lora")), input="")
    line = result.stderr.strip().split("\n")[-1]
    assert result.exit_code == 2, (result.output, result.exception)
    assert line.startswith("error: my-lora is a LoRA adapter for the base model 'HuggingFaceTB/SmolLM2-135M'"), line
    assert line.endswith(f"lowbit quantize {BASE} --adapter my-lora")
    assert [p.name for p in tmp_path.iterdir()] == ["my-lora"]


def the_program(message: str) -> str:
    """The Python that the message tells to run, as a shell reads it."""
    words = shlex.split(message[message.index("python -c") :])
    assert words[:2] == ["python", "-c"] and words[3:6] == ["&&", "lowbit", "quantize"]
    compile(words[2], "message", "exec")
    return words[2]


def test_the_command_is_one_that_runs(tmp_path: Path) -> None:
    loha = {"peft_type": "LOHA", "base_model_name_or_path": BASE}
    program = the_program(said_of(adapter(tmp_path / "loha", loha)))
    merged = re.search(r'save_pretrained\("([^"]+)"\)', program)
    assert merged is not None and merged[1] == "loha-merged"
    assert f'AutoTokenizer.from_pretrained("{BASE}")' in program
    own = the_program(said_of(adapter(tmp_path / "with words", loha, tokenizer=True)))
    assert f'AutoTokenizer.from_pretrained("{tmp_path}/with words")' in own


def test_beside_a_config_and_as_a_file(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    both = adapter(tmp_path / "both")
    shutil.copy(tiny_folder("llama") / "config.json", both)
    assert "is a LoRA adapter" in said_of(both)
    alone = adapter(tmp_path / "alone")
    assert "is a LoRA adapter" in said_of(alone / "adapter_model.safetensors")
    whole = adapter(tmp_path / "whole")
    shutil.copytree(tiny_folder("llama"), whole, dirs_exist_ok=True)
    assert open_source(whole).tensors  # a model beside an adapter is a model


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "prompt_tuning"])
def test_what_cannot_be_merged_is_not_told_to_be(kind: str, tmp_path: Path) -> None:
    text = said_of(adapter(tmp_path / "a", {"peft_type": kind, "base_model_name_or_path": BASE}))
    assert "cannot be merged" in text and BASE in text and "merge_and_unload" not in text


@pytest.mark.parametrize(
    "content",
    [
        "", "null", "[]", "{", "[" * 100_000, '{"a": 1' + " " * (2 << 20) + "}", "{}",
        {"peft_type": 3, "base_model_name_or_path": ["x"]},
        {"peft_type": "\x1b[2J", "base_model_name_or_path": "\x1b[31m\nerror: fake"},
        {"peft_type": "LORA", "base_model_name_or_path": "x" * 100_000},
        {"peft_type": "LORA", "base_model_name_or_path": "'; rm -rf ~ #$(reboot)`reboot`\"\\"},
        {"peft_type": "LORA", "base_model_name_or_path": "   "},
        {"peft_type": "ＬＯＲＡ", "base_model_name_or_path": "a\u202eb"},
    ],
)  # fmt: skip
def test_hostile_settings_are_a_line_and_a_command_that_runs_none_of_them(content: Any, tmp_path: Path) -> None:
    text = said_of(adapter(tmp_path / "a", content))
    assert text.isprintable()
    assert "is a" in text and "adapter" in text
    if "--adapter" in text:
        words = shlex.split(text[text.index("lowbit quantize") :])
        base = content["base_model_name_or_path"]
        named = base if base.strip() and len(base) < 100 else "BASE"
        assert words == ["lowbit", "quantize", named, "--adapter", str(tmp_path / "a")]
        return
    program = the_program(text)
    called = set(re.findall(r"\b(\w+)\(", re.sub(r'"(?:[^"\\]|\\.)*"', '""', program)))
    assert called <= {"from_pretrained", "merge_and_unload", "save_pretrained"}


def test_a_folder_of_a_model_is_let_pass(tmp_path: Path) -> None:
    refuse_adapter(tmp_path, "x")
    adapter(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text("{}")
    refuse_adapter(tmp_path / "a", "x")
    with pytest.raises(SourceError, match="^x is a LoRA adapter"):
        refuse_adapter(tmp_path / "a", "x", always=True)
