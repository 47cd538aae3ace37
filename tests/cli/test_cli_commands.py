"""Every command on tiny models: what it prints is what the API says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lowbit
from lowbit.cli import budgets
from lowbit.cli.job import default_file, default_folder
from lowbit.cli.main import app
from lowbit.interchange.exporters.exporter import exporter_named
from lowbit.recipes.presets import PRESETS
from lowbit.recipes.recipe import Recipe
from tiny import save_tiny

COMMANDS = ("quantize", "recommend", "plan", "evaluate", "card", "compare", "check-kv", "generate", "chat", "import", "dequantize", "export", "bench",
            "inspect", "explain", "doctor", "recipes")  # fmt: skip


def run(*words: object) -> str:
    """The stdout of a command that must succeed."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny float Llama with a tokenizer."""
    path = tmp_path_factory.mktemp("cli") / "tiny"
    save_tiny("llama", path)
    return path


@pytest.fixture(scope="module")
def packed(folder: Path) -> Path:
    """The same, quantized by the command."""
    out = folder.parent / "packed"
    run("quantize", folder, "int4:g32", "-o", out, "--no-card")
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short text: the default one takes seconds to tokenize."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the cat and the hen are in the tree. " * 40)
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_shows_an_example_of_itself(command: str) -> None:
    assert f"lowbit {command}" in re.split("Examples?:", run(command, "--help"))[1]


def test_version() -> None:
    assert run("--version") == f"lowbit {lowbit.__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from lowbit.cli.main import app\n"
        "assert CliRunner().invoke(app, ['quantize', '--help']).exit_code == 0\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_quantize_writes_the_planned_bytes_and_says_what_it_did(folder: Path, packed: Path) -> None:
    plan = lowbit.plan(str(folder), "int4:g32")
    assert (packed / "model.safetensors").stat().st_size == plan.output_bytes
    text = run("quantize", folder, "w4", "--data-free", "-o", packed.parent / "said", "--no-card")
    assert "w4 = search@int4:g32" in text and "bits per weight" in text and "lowbit generate" in text


def test_quantize_ends_with_the_card(folder: Path, tmp_path: Path) -> None:
    data = json.loads(run("quantize", folder, "w8", "-o", tmp_path / "q", "--windows", 2, "--json"))
    assert data["folder"] == str(tmp_path / "q")
    assert data["card"]["text"]["windows"] == 2
    assert data["card"]["quality"]["kl_mean"]["value"] < 1e-4
    assert data["card"]["speed"]["ratios"]["decode"] > 0
    assert data["card"]["sample"]["answer"] is not None
    assert data["plan"]["output_bytes"] == sum(f.stat().st_size for f in (tmp_path / "q").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("model", "recipe", "name"),
    [
        ("smollm2", "w4", "smollm2-w4"),
        ("org/Some-Model", "int4:g32", "Some-Model-int4-g32"),
        ("here/model.Q4_1.gguf", "w8", "model.Q4_1-w8"),
        ("smollm2", "search(steps=8)@int4:g32,embed=keep", "smollm2-search-steps-8-int4-g32-embed-keep"),
    ],
)
def test_the_folder_is_named_after_model_and_recipe(model: str, recipe: str, name: str) -> None:
    assert default_folder(model, Recipe.parse(recipe)) == Path(name)


def test_plan_in_json_and_for_people(folder: Path) -> None:
    plan = lowbit.plan(str(folder), "w4", context=1000)
    data = json.loads(run("plan", folder, "w4", "--context", 1000, "--json"))
    assert data == json.loads(json.dumps(plan.to_json()))
    text = run("plan", folder, "w4", "--context", 1000)
    assert f"{plan.output_bytes:,} bytes" in text and "at 1,000 tokens" in text
    assert len(re.findall(r"layers\.\{0-1\}\.self_attn\.q_proj", text)) == 1
    assert len(re.findall(r"layers\.\d\.self_attn\.q_proj", run("plan", folder, "--all"))) == 2


def test_a_narrow_terminal_gets_fewer_columns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = run("plan", folder)
    assert max(map(len, text.splitlines())) <= 80
    assert "becomes" in text and "q_proj.weight" in text


def test_evaluate_against_the_float_model(folder: Path, packed: Path, text: Path) -> None:
    data = json.loads(
        run("evaluate", packed, "--against", folder, "--text", text, "--windows", 2, "--length", 64, "--json")
    )
    card = lowbit.evaluate(packed, folder, text, windows=2, length=64)
    assert data["quality"] == card.to_dict()["quality"]
    assert "KL from the float model" in run("evaluate", packed, "--against", folder, "--text", text)


def test_compare_prints_table_markdown_and_json(folder: Path, text: Path) -> None:
    common = ("compare", folder, "w8", "int2:g32", "--text", text, "--length", 64)
    rows = json.loads(run(*common, "--json"))
    assert [row["recipe"] for row in rows] == ["float32", "w8", "int2:g32"]
    assert 0 < rows[1]["kl"] < rows[2]["kl"]
    assert run(*common, "--markdown").splitlines()[1].startswith("| --- |")
    assert "int2:g32" in run(*common)


def test_compare_draws(folder: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run("compare", folder, "w8", "--text", text, "--length", 64, "--plots", tmp_path / "figures")
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"weights.png", "frontier.png"}


@pytest.mark.parametrize("extra", [(), ("--raw",), ("--temperature", "0.8", "--seed", "3")])
def test_generate_streams_the_same_as_generate_of_transformers(
    folder: Path, packed: Path, extra: tuple[str, ...]
) -> None:
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(packed)
    model = lowbit.load(packed)
    ids = tokenizer("hello there", return_tensors="pt")
    sampling = {"do_sample": True, "temperature": 0.8, "top_k": 0} if "--seed" in extra else {"do_sample": False}
    torch.manual_seed(3)
    out = model.generate(
        ids["input_ids"], attention_mask=ids["attention_mask"], max_new_tokens=8, pad_token_id=0, **sampling
    )
    expected = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert run("generate", packed, "hello there", "--max-new-tokens", 8, *extra).strip() == expected.strip()
    if not extra:
        assert run("generate", folder, "hello there", "--max-new-tokens", 3).strip()


def test_inspect_of_float_and_quantized(folder: Path, packed: Path) -> None:
    data = json.loads(run("inspect", folder, "--json"))
    assert {"name", "shape", "kind", "dtype", "share", "keep"} <= set(data["tensors"][0])
    assert data["tensors"][0]["moments"]["std"] == pytest.approx(0.1, rel=0.1)
    text = run("inspect", folder)
    assert "stays: norms" in text and "farthest outliers" in text
    text = run("inspect", packed, "--all")
    assert "int4:g32" in text and "4.50" in text and text.count("q_proj") == 2


def test_explain_an_array_and_a_tensor(folder: Path) -> None:
    data = json.loads(run("explain", "[-0.3, 0, 0.1, 0.7]", "absmax", "--json"))
    assert data["blocks"][0]["levels"] == [-54, 0, 18, 127]
    assert "kept in int32 as -52" in run("explain", "[-0.3, 0, 0.1, 0.7]", "zeropoint")
    data = json.loads(run("explain", f"{folder}:model.layers.0.mlp.down_proj", "int4:g32", "--rows", 2, "--json"))
    assert data["label"] == "model.layers.0.mlp.down_proj.weight" and data["shape"] == [32, 64]
    assert [b["rows"] for b in data["blocks"]] == [[0, 1], [1, 2]]
    embedding = json.loads(run("explain", f"{folder}:model.embed_tokens.weight", "int4:g32", "--json"))
    assert embedding["format"] == "int8:channel", "the format that the recipe gives to embeddings"


def test_recipes_lists_every_preset_and_method() -> None:
    data = json.loads(run("recipes", "--json"))
    assert set(data["presets"]) == set(PRESETS)
    assert {"rtn", "absmax", "kmeans"} <= set(data["methods"])
    text = run("recipes")
    assert all(name in text for name in PRESETS)


def test_recipes_looks_a_name_up() -> None:
    text = run("recipes", "gptq")
    assert "gptq@int4:g64" in text and "damp=0.01" in text and "Frantar" in text and "nf4" not in text
    assert list(json.loads(run("recipes", "w4", "--json"))["presets"]) == ["w4"]
    result = CliRunner().invoke(app, ["recipes", "gtpq"])
    assert result.exit_code == 2 and "did you mean 'gptq'" in result.stderr


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.report.doctor.SIDE", 64)
    text = run("doctor")
    assert "torch-int8 declines" in text and "packed" in text and "lowbit doctor --all" in text
    assert "lowbit doctor --all" not in run("doctor", "--all")
    assert json.loads(run("doctor", "--no-kernels", "--json"))["kernels"] == []


@pytest.mark.parametrize(
    ("target", "words"),
    [({}, ""), ({"target_size": "80MB"}, "-80MB"), ({"target_size": "1.5 GiB"}, "-1.5-GiB"), ({"target_bits": 5.5}, "-5.5-bits"),
     ({"target_kl": 0.05}, "-kl-0.05"), ({"fit_memory": "8GB", "context": 4096}, "-in-8GB")],
)  # fmt: skip
def test_the_default_name_of_a_result_has_its_target(target: dict[str, object], words: str) -> None:
    """So that a result for one target does not stand where that of another, or of none, stands already."""
    name = budgets.in_a_name(target)
    assert str(default_folder("org/model", Recipe.parse("w4"), name)) == f"model-w4{words}"
    assert str(default_file("model.gguf", "q4_k_m", exporter_named("gguf"), name)) == f"model-q4-k-m{words}.gguf"
