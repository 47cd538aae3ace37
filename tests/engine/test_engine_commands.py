"""`lowbit generate` and `lowbit chat`, on the engine and on what it does not know."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from lowbit import Engine
from lowbit.cli.main import app
from lowbit.engine.generation import Generated
from lowbit.errors import EngineError
from lowbit.kernels.core import core
from tiny import save_tiny

Folder = Callable[..., Path]


def run(*words: object, lines: str | None = None) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], input=lines)


@pytest.fixture(scope="module")
def folder(packed_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("commands") / "model"
    shutil.copytree(packed_folder("llama", "int4:g32"), path)
    (path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role[0] }} {{ m.content }}\n{% endfor %}a ")
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("commands") / "gpt2"
    save_tiny("gpt2", path)
    return path


@pytest.mark.parametrize("raw", [False, True])
def test_generate_is_that_of_the_engine_and_says_so(raw: bool, folder: Path) -> None:
    found = run("generate", folder, "the cat", "--max-new-tokens", 9, "--threads", 1, *["--raw"] * raw)
    right = Engine.open(folder, threads=1).generate("the cat", max_new_tokens=9, raw=raw)
    assert found.exit_code == 0 and found.stdout == right.text + "\n"
    assert re.fullmatch(r"engine \(\w+, 1 thread\)\n", found.stderr)


def test_every_option_reaches_the_engine(folder: Path) -> None:
    options = {
        "temperature": 0.9, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 5,
        "max_new_tokens": 12,
    }  # fmt: skip
    words = [w for key, value in options.items() for w in ("--" + key.replace("_", "-"), value)]
    more = ["--stop", "x", "--stop", "yz", "--activations", "int8", "--cache", "int8"]
    engine = Engine.open(folder, activations="int8", cache="int8")
    right = engine.generate("the cat", stop=["x", "yz"], **options)
    assert run("generate", folder, "the cat", *words, *more).stdout == right.text + "\n"


def test_more_threads_than_cores_are_said_to_be_slower(folder: Path) -> None:
    module = core()
    assert module is not None
    cores = module.features()["cores"]
    found = run("generate", folder, "the cat", "--max-new-tokens", 2, "--threads", cores + 1)
    assert found.exit_code == 0 and f"{cores + 1} threads); this machine has {cores} cores" in found.stderr


def test_several_prompts(folder: Path) -> None:
    right = Engine.open(folder).generate(["the cat", "a hen"], max_new_tokens=9)
    found = run("generate", folder, "the cat", "a hen", "--max-new-tokens", 9)
    assert found.stdout == f"{right[0]}\n\n{right[1]}\n"


def test_other_models_go_to_transformers_which_is_said(other: Path) -> None:
    found = run("generate", other, "the cat", "--max-new-tokens", 5)
    assert (
        found.exit_code == 0
        and "transformers, not the engine: the engine does not know models of type 'gpt2'" in found.stderr
    )


@pytest.mark.parametrize("option", [("--activations", "int8"), ("--threads", "1")])
def test_options_of_the_engine_are_errors_without_it(option: tuple[str, str], other: Path) -> None:
    found = run("generate", other, "the cat", *option)
    assert found.exit_code == 2 and f"without {option[0]}" in found.stderr and not found.stdout


def test_a_cache_format_is_for_transformers_too(other: Path, folder: Path) -> None:
    found = run("generate", other, "the cat", "--cache", "int4:g8", "--max-new-tokens", 3)
    assert found.exit_code == 0 and "its KV cache is stored as int4:g8" in " ".join(found.stderr.split())
    found = run("generate", other, "the cat", "--cache", "kvquant3", "--max-new-tokens", 3)
    assert found.exit_code == 2 and "quantize the model with kv=" in " ".join(found.stderr.split())
    found = run(
        "generate", other, "the cat", "--cache", "int8", "--threads", 1
    )  # and what is the engine's alone stays an error
    assert found.exit_code == 2 and "without --threads" in found.stderr and "--cache" not in found.stderr


def test_stop_strings_may_be_lines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def generate(self: Engine, prompts: Any, **options: Any) -> Any:
        asked.append(options["stop"])
        return [Generated("", [], 1, "stop", 0.0, 0.0)]

    monkeypatch.setattr(Engine, "generate", generate)
    found = run("generate", folder, "the cat", "--stop", r"\n\n", "--stop", r"a\tb\\n", "--stop", "\n")
    assert found.exit_code == 0 and asked == [["\n\n", "a\tb\\n", "\n"]]


@pytest.mark.parametrize("command", [("generate",), ("chat",)])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--top-p", "0"), "top_p=0.0"), (("--top-k", "5"), "top_k would be ignored at temperature 0"),
        (("--stop", ""), "ends no answer"), (("--seed", str(2**64)), "below 2\\*\\*64"),
    ],
)  # fmt: skip
def test_wrong_options_are_known_before_a_model_is_loaded(
    command: tuple[str], options: tuple[str, str], words: str, tmp_path: Path
) -> None:
    found = run(*command, tmp_path / "none", *["the cat"] * (command == ("generate",)), *options)
    assert found.exit_code == 2 and re.match(f"error: .*{words}", found.stderr) and not found.stdout


@pytest.mark.parametrize("raw", [False, True])
def test_prompts_that_are_no_text(raw: bool, folder: Path, other: Path) -> None:
    """Nothing, and bytes of a command line that are no UTF-8."""
    for model in (folder, other):
        for prompt, words in (("", "has no tokens"), ("caf\udce9 au lait", "bytes that are no UTF-8, near ")):
            found = run("generate", model, prompt, "--max-new-tokens", 3, *["--raw"] * raw)
            assert found.exit_code == 2 and words in found.stderr and not found.stdout


def test_streams_that_are_closed_or_do_not_know_every_character(folder: Path) -> None:
    code = "from lowbit.cli.main import main; main()"
    words = [sys.executable, "-c", code, "generate", str(folder), "the cat", "--max-new-tokens", "3"]
    for shut in (">&-", "2>&-"):
        done = subprocess.run(["sh", "-c", f'exec "$@" {shut}', "sh", *words], capture_output=True, text=True)
        assert done.returncode == 0 and "Traceback" not in done.stderr
    show = "from lowbit.cli import console, generation_options; console.prepare_streams(); generation_options.show('\u00e9\U0001f389!')"
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, env=env, check=True)
    assert done.stdout == b"??!"


def test_an_error_in_a_talk_ends_it_only_where_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowbit.cli import chat

    def ask(*_: Any) -> Any:
        raise EngineError("too long; begin anew with /reset")

    said: list[str] = []
    monkeypatch.setattr(chat.console, "dim", said.append)
    for isatty in (True, False):
        monkeypatch.setattr(chat.sys, "stdin", SimpleNamespace(isatty=lambda isatty=isatty: isatty))
        with nullcontext() if isatty else pytest.raises(EngineError):
            chat._answer(ask, "hi", 5, [])
    assert said == ["too long; begin anew with /reset"]


@pytest.mark.parametrize("option", [("--cache", "fp9"), ("--activations", "int4"), ("--top-p", "0")])
def test_wrong_values_are_errors(option: tuple[str, str], folder: Path) -> None:
    found = run("generate", folder, "the cat", *option)
    assert found.exit_code == 2 and "error: " in found.stderr and "transformers" not in found.stderr


def test_chat_reads_lines_and_leaves_at_the_end(folder: Path) -> None:
    lines = "the cat\n\n/what\n/reset\nthe cat\n/exit\nnever read\n"
    found = run("chat", folder, "--max-new-tokens", 12, "--system", "be kind", lines=lines)
    engine = Engine.open(folder)
    right = engine.conversation("be kind").ask("the cat", max_new_tokens=12)
    assert found.exit_code == 0 and found.stdout == f"{right}\n{right}\n"
    assert len(re.findall(r"12 tokens, \d+ tokens/s, first token \d+\.\d\d s", found.stderr)) == 2
    assert "there is no /what" in found.stderr
    assert run("chat", folder, "--max-new-tokens", 3, lines="").exit_code == 0


def test_chat_stops_an_answer_and_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowbit.cli import chat

    count, write = iter(range(1000)), chat.show

    def interrupted(text: str) -> None:
        write(text)
        if next(count) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(chat, "show", interrupted)
    found = run("chat", folder, "--max-new-tokens", 12, lines="the cat\ngo on\n")
    assert found.exit_code == 0 and "stopped" in found.stderr and found.stderr.count("tokens/s") == 1


def test_chat_with_transformers_and_without_a_template(other: Path, tmp_path: Path) -> None:
    found = run("chat", other, lines="hi\n")
    assert found.exit_code == 2 and "no chat template" in found.stderr
    shutil.copytree(other, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    found = run("chat", tmp_path / "model", "--max-new-tokens", 4, lines="the cat\na hen\n")
    assert found.exit_code == 0 and found.stderr.count("first token") == 2
