"""lowbit export, and lowbit quantize --as: one command from a float model to a GGUF file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from typer.testing import CliRunner

from lowbit.cli.main import app
from lowbit.interchange.exporters.exporter import exporters
from lowbit.interchange.opening import open_source
from tiny import _ROPE, save_tiny, tiny_tokenizer


def run(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result.output


def types(file: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("straight") / "tiny"
    save_tiny("llama-tied", path)
    return path


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Widths that super-blocks of 256 divide."""
    path = tmp_path_factory.mktemp("wide") / "wide"
    sizes = _ROPE | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(architectures=["LlamaForCausalLM"], **sizes))
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_export_writes_what_the_folder_holds(folder: Path, tmp_path: Path) -> None:
    run("quantize", folder, "q5_1,embed=q8_0", "-o", tmp_path / "q", "--no-card")
    said = run("export", tmp_path / "q", "--as", "gguf", "-o", tmp_path / "x.gguf")
    assert "every weight equal" in said.replace("\n", " ")
    assert set(types(tmp_path / "x.gguf").values()) == {"Q5_1", "Q8_0", "F32"}
    said = run("export", tmp_path / "q", "--as", "gguf", "--json")
    told = json.loads(said[said.index("{") :])
    assert told["path"].endswith("q.gguf") and told["weights"] == 0.0 and told["logits"] < 1e-5
    assert (tmp_path / "q.gguf").read_bytes() == (tmp_path / "x.gguf").read_bytes()


def test_w4_is_the_best_four_bits_of_the_target(folder: Path, tmp_path: Path) -> None:
    run("quantize", folder, "w4", "--as", "gguf", "-o", tmp_path / "x.gguf", "--no-card")
    found = types(tmp_path / "x.gguf")
    assert found["blk.0.attn_q.weight"] == "IQ4_NL" and found["token_embd.weight"] == "Q8_0"
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


def test_a_mix_by_its_name_and_widths_that_it_does_not_fit(folder: Path, wide: Path, tmp_path: Path) -> None:
    said = run("quantize", folder, "q4_k_m", "--as", "gguf", "-o", tmp_path / "x.gguf", "--no-card").replace("\n", " ")
    assert "iq4_nl instead: Q4_K needs rows of a multiple of 256" in said
    found = types(tmp_path / "x.gguf")
    assert found["blk.0.attn_q.weight"] == "IQ4_NL" and found["blk.1.ffn_down.weight"] == "Q5_1"
    assert found["token_embd.weight"] == "Q8_0"
    said = run("quantize", wide, "q4_k_m", "--as", "gguf", "-o", tmp_path / "y.gguf", "--no-card")
    found = types(tmp_path / "y.gguf")
    assert "instead" not in said and found["blk.0.attn_q.weight"] == "Q4_K" and found["token_embd.weight"] == "Q6_K"
    assert [found[f"blk.{i}.ffn_down.weight"] for i in range(4)] == ["Q4_K", "Q4_K", "Q6_K", "Q6_K"]


@pytest.mark.parametrize("mix", ["q2_k", "q3_k_m", "q5_k_s", "q6_k", "iq4_xs"])
def test_super_blocks_of_every_kind(wide: Path, tmp_path: Path, mix: str) -> None:
    run("quantize", wide, mix, "--as", "gguf", "-o", tmp_path / "x.gguf", "--no-card")
    assert types(tmp_path / "x.gguf")["blk.0.attn_q.weight"] == mix.upper().removesuffix("_M").removesuffix("_S")
    assert len(open_source(tmp_path / "x.gguf").tensors) > 20


def test_calibrated_and_kept(folder: Path, tmp_path: Path) -> None:
    words = ("quantize", folder, "q4_0", "--as", "gguf", "--no-card", "--calibration", "self", "--samples", 2)
    run(*words, "-o", tmp_path / "x.gguf", "--keep", tmp_path / "kept")
    config = json.loads((tmp_path / "kept" / "config.json").read_text())
    assert config["quantization_config"]["recipe"].startswith("qronos@int4:g32")
    run(*words, "-o", tmp_path / "y.gguf")
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "y.gguf").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept", "x.gguf", "y.gguf"]


def test_a_target_of_bits_chooses_among_what_the_target_holds(folder: Path, tmp_path: Path) -> None:
    run(
        "quantize", folder, "w4", "--as", "gguf", "-o", tmp_path / "x.gguf", "--no-card", "--target-bits", "5.5",
        "--samples", 2,
    )  # fmt: skip
    assert set(types(tmp_path / "x.gguf").values()) <= {"IQ4_NL", "Q5_0", "Q5_1", "Q8_0", "F32"}


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("int4:g64", "GGUF has no type for weights in int4:g64"),
        ("w4a8", "llama.cpp rounds inputs its own way"),
        ("nf4", "the nearest is iq4_nl"),
        ("q4_k_n", "unknown"),
    ],
)
def test_what_the_target_cannot_hold_is_refused_before_the_work(
    folder: Path, tmp_path: Path, recipe: str, words: str
) -> None:
    said = run("quantize", folder, recipe, "--as", "gguf", "-o", tmp_path / "x.gguf", "--no-card", code=2)
    assert words in said and said.startswith("error: ") and not list(tmp_path.iterdir())


def test_options_that_would_be_ignored(folder: Path, tmp_path: Path) -> None:
    said = run("quantize", folder, "w4", "-o", tmp_path / "x", "--keep", tmp_path / "y", code=2)
    assert "--keep belongs to --as" in said
    (tmp_path / "x.gguf.lowbit").mkdir()
    (tmp_path / "x.gguf.lowbit" / "mine.txt").write_text("precious")
    said = run("quantize", folder, "w4", "--as", "gguf", "-o", tmp_path / "x.gguf", "--no-card", code=2)
    assert "in the way" in said and (tmp_path / "x.gguf.lowbit" / "mine.txt").exists()


@pytest.mark.parametrize("command", ["export", "quantize"])
def test_the_help_names_every_exporter(command: str) -> None:
    words = set(re.findall(r"\w+", run(command, "--help")))
    assert exporters().keys() <= words
