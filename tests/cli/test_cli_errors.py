"""Bad input: exit code 2, one line that says what, nothing on stdout, nothing left behind."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import lowbit
from lowbit.cli.main import app
from tiny import save_tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, copied by tests that damage it."""
    path = tmp_path_factory.mktemp("errors") / "tiny"
    save_tiny("llama", path)
    return path


@pytest.fixture
def model(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own copy, in the current folder, which holds nothing else."""
    shutil.copytree(made, tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    return Path("tiny")


def fails(*words: object) -> str:
    """The one line of error on stderr, the last, of a command that must end with code 2; steps before it are said there too."""
    result: Result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    *before, line = result.stderr.strip().split("\n")
    assert line.startswith("error: ") and "Traceback" not in result.stderr, result.stderr
    # "quantizing; NAME" where a tensor was at work
    assert {each.partition(";")[0] for each in before} <= {
        "loading the model",
        "loading the float model",
        "quantizing",
    }, result.stderr
    return line


def left() -> set[str]:
    return {path.name for path in Path.cwd().iterdir()}


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("absmx", ["unknown recipe 'absmx'", "'absmax'"]),
        ("gptqq@int4:g32", ["unknown method 'gptqq'"]),
        ("int4:q32", ["position 6", "'q32'"]),
        ("int9:g32", ["position 1", "int8"]),
        ("search@int4:g32,embd=int8:channel", ["unknown option 'embd'", "'embed'"]),
        ("search(step=3)@int4:g32", ["no option 'step'", "'steps'"]),
        ("absmax@int4:g32,kv=int9", ["cache 'int9'", "int8"]),
        ("no-such.toml", ["'no-such.toml'", "cannot be read"]),
        ("int4:g32,*.nothing=int8", ["'*.nothing'", "matches no tensor"]),
    ],
)
@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_recipes_that_cannot_be_followed(model: Path, command: str, recipe: str, words: list[str]) -> None:
    line = fails(command, model, recipe)
    assert all(word in line for word in words), line
    assert left() == {"tiny"}


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def hostile(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes((2**62).to_bytes(8, "little") + file.read_bytes()[8:])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def not_a_number(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated, ["model.safetensors"]),
        (hostile, ["model.safetensors", "header"]),
        (pickled, ["pickle", "pytorch_model.bin", "save_pretrained"]),
        (no_config, ["config.json"]),
        (not_a_number, ["model.layers.1.mlp.up_proj.weight"]),
    ],
)
def test_models_that_cannot_be_read(model: Path, damage: object, words: list[str]) -> None:
    damage(model)  # type: ignore[operator]
    line = fails("quantize", model, "w4", "-o", "out", "--no-card")
    assert all(word in line for word in words), line
    assert left() == {"tiny"}


def test_a_model_that_is_not_there(model: Path) -> None:
    for command in (["quantize"], ["plan"], ["evaluate"], ["compare"], ["inspect"]):
        assert "'nowhere'" in fails(*command, "nowhere")
    assert "'nowhere'" in fails("generate", "nowhere", "hello")
    assert left() == {"tiny"}


def test_texts_that_cannot_be_used_are_found_before_the_work(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("latin.txt").write_bytes(b"caf\xe9")
    Path("short.txt").write_text("too short")
    Path("empty.txt").write_text("")
    for text, words in (("latin.txt", "UTF-8"), ("none.txt", "no such file"), ("empty.txt", "empty")):
        assert words in fails("quantize", model, "w4", "--text", text)
        assert words in fails("evaluate", model, "--text", text)
    assert "short.txt" in fails("evaluate", model, "--text", "short.txt")
    assert left() == {"tiny", "latin.txt", "short.txt", "empty.txt"}


def test_a_folder_with_something_in_it_is_left_alone(model: Path) -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine")
    assert "--overwrite" in fails("quantize", model, "w4", "-o", "out")
    assert [p.name for p in Path("out").iterdir()] == ["mine.txt"] and left() == {"tiny", "out"}


def test_a_model_quantized_in_an_unknown_way_is_refused(model: Path) -> None:
    config = json.loads(Path("tiny/config.json").read_text())
    Path("tiny/config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "quip"}}))
    for command in (["quantize", model, "w8"], ["explain", f"{model}:model.norm.weight", "w8"], ["evaluate", model]):
        assert "already quantized with quip, which lowbit cannot read" in fails(*command)


@pytest.mark.parametrize(
    ("what", "word"),
    [
        ("[1, oops]", "array"),
        ("[1e999]", "infinite"),
        ("[1, 2, nan]", "cannot be quantized"),
        ("[1, -inf]", "cannot be quantized"),
        ("-0.3,0.1", 'in brackets and quotes, such as "[-0.3, 0.1]"'),
        ("-.5", "in brackets and quotes"),
        ("0.3, 0.1", "in brackets and quotes"),
        ("tiny", "MODEL:TENSOR"),
        ("tiny:model.layers.0.mlp.up_prj.weight", "up_proj"),
    ],
)
def test_what_cannot_be_explained(model: Path, what: str, word: str) -> None:
    assert word in fails("explain", what, "absmax")


def test_a_model_that_cannot_generate(tmp_path: Path) -> None:
    save_tiny("bert", tmp_path / "bert")
    assert "does not generate" in fails("generate", tmp_path / "bert", "hello")


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "bare", tokenizer=False)
    assert "tokenizer" in fails("generate", tmp_path / "bare", "hello")
    assert "tokenizer" in fails("evaluate", tmp_path / "bare")


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out"), 2, "no space left on the disk at out"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 2, "not allowed"),
        (MemoryError(), 2, "not enough memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_the_system_refuses(
    model: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, word: str
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(lowbit, "quantize", refuse, raising=False)
    result = CliRunner().invoke(app, ["quantize", "tiny"])
    assert result.exit_code == code and word in result.stderr and "Traceback" not in result.stderr


def test_nobody_reads_and_somebody_ends_it(model: Path) -> None:
    command = [sys.executable, "-m", "lowbit"]
    with subprocess.Popen([*command, "plan", model, "w4"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as unread:
        assert unread.stdout is not None and unread.stderr is not None
        unread.stdout.close()
        assert unread.stderr.read() == b"" and unread.wait() == 141
    script = (
        "import os, signal, sys, lowbit\nfrom lowbit.cli import main\ndef end(*a, **k): os.kill(os.getpid(), signal.SIGTERM)\n"
        "lowbit.plan = end\nsys.argv = ['lowbit', 'plan', 'tiny']\nmain.main()"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 143 and ended.stderr.strip() == "terminated"


@pytest.mark.parametrize("out", ["tiny", "tiny/inside", "loop", "a-file", "a-file/out", "n" * 300])
def test_places_that_cannot_be_written_to(model: Path, out: str) -> None:
    Path("a-file").write_text("mine")
    Path("loop").symlink_to("loop")
    fails("quantize", model, "w4", "-o", out, "--no-card")
    assert left() == {"tiny", "a-file", "loop"} and not Path("tiny/inside").exists()


def test_a_bug_is_not_dressed_up(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(lowbit, "plan", bug, raising=False)
    assert isinstance(CliRunner().invoke(app, ["plan", "tiny"]).exception, ZeroDivisionError)


def test_wrong_usage() -> None:
    bare = CliRunner().invoke(app, [])
    assert "Usage: lowbit" in bare.stdout.replace("root", "lowbit") and bare.stderr == ""
    for words in (["plan"], ["nonsense"], ["quantize", "x", "--windows", "0"], ["plan", "x", "--nonsense"]):
        assert CliRunner().invoke(app, words).exit_code == 2


@pytest.mark.parametrize(
    ("words", "title"),
    [
        (["--bits", 4], "w4 = search@int4:g32"),
        (["--bits", 8], "w8 = absmax@int8:g128,embed=int8:g128"),
        (["--bits", 5], "int5:g32"),
        (["--bits", 4, "--group-size", 64], "int4:g64"),
        (["--bits", 3, "--group-size", -1], "int3:channel"),
        (["4bit"], "w4 = search@int4:g32"),
    ],
)
def test_bits_and_groups_stand_for_a_recipe_that_the_first_line_names(
    model: Path, words: list[object], title: str
) -> None:
    result = CliRunner().invoke(app, ["plan", str(model), *map(str, words)])
    assert result.exit_code == 0, result.output
    assert title in result.stdout.splitlines()[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["awq", "--bits", 4], ["awq", "--bits", "w4"]),
        (["w4", "--bits", 4, "--group-size", 64], ["--bits and --group-size", "gptq@int4:g64"]),
        (["--group-size", 64], ["--bits 4", "int4:g64"]),
        (["--bits", 16], ["2 to 8"]),
        (["--bits", 4, "--group-size", 0], ["-1 for a whole row"]),
        (["int4:32"], ["did you mean 'int4:g32'"]),
        (["q4_k_m"], ["`lowbit quantize tiny q4_k_m --as gguf`"]),
    ],
)
@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_what_does_not_go_together_says_what_does(
    model: Path, command: str, words: list[object], said: list[str]
) -> None:
    line = fails(command, model, *words)
    assert all(word in line for word in said), line
    assert left() == {"tiny"}


def test_an_odd_group_is_said_before_the_work(model: Path) -> None:
    result = CliRunner().invoke(app, ["quantize", str(model), "int4:g12", "-o", "out", "--no-card"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    text = " ".join(lines[1:])
    assert (
        lines[1].startswith("note: groups of 12 do not divide rows of")
        and text.count("groups of 12 do not divide") == 1
    )
    plan = " ".join(CliRunner().invoke(app, ["plan", str(model), "int4:g12"]).stdout.split())
    assert plan.count("groups of 12 do not divide rows of") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["quantize", "tiny", "--load-in-4bit"], "there is no --load-in-4bit; write --bits 4"),
        (["quantize", "tiny", "--bit", "4"], "there is no --bit; did you mean --bits"),
        (["generate", "tiny", "--quant", "x"], "there is no --quant; `lowbit generate --help` lists the options"),
        (["run", "tiny"], "there is no command 'run'; `lowbit chat MODEL` talks to a model, and `lowbit generate MODEL PROMPT`"),
        (["quantise", "tiny"], "there is no command 'quantise'; did you mean quantize"),
        (["generate", "tiny"], "PROMPT is missing, or `lowbit chat MODEL` to talk"),
        (["export", "tiny"], "--as is missing"),
        (["quantize", "tiny", "--bits", "four"], "--bits takes a whole number"),
        (["quantize", "tiny", "w4", "w8"], "'w8' is more than `lowbit quantize` takes"),
        (["quantize", "tiny", "-o"], "requires an argument"),
        (["quantize", "tiny", "q4_k_m"], "`lowbit quantize tiny q4_k_m --as gguf`"),
        (["quantize", "./nowhere"], "'./nowhere' is not there"),
        (["quantize", "tiny", "--target-size", "1500"], "write --target-size 1500MB"),
        (["card", "tiny"], "tiny is no folder that lowbit wrote, so it has no card; `lowbit quantize tiny` makes one"),
    ],
)  # fmt: skip
def test_what_is_typed_wrong_is_answered_with_what_to_type(model: Path, words: list[str], said: str) -> None:
    """One sentence in the same words as every other error, not a box; what a message calls MODEL is the name that was typed."""
    line = fails(*words)
    assert said in line and "nn.Module" not in line and "╭" not in line, line


def test_an_interruption_says_what_is_left(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lowbit, "quantize", stop, raising=False)
    monkeypatch.setattr(lowbit, "allocate", stop, raising=False)
    said = CliRunner().invoke(app, ["quantize", "tiny"]).stderr
    assert said.strip().endswith("interrupted before anything was finished; nothing is left behind")
    said = CliRunner().invoke(app, ["quantize", "tiny", "--target-bits", "5"]).stderr
    assert "--calibration FILE gives it yours" in said
    assert "interrupted; the sensitivity was not measured to its end, and nothing of it is kept" in said
