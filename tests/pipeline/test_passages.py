"""Models that only read text are calibrated on passages: as many tokens as others, in windows of 128."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lowbit
from lowbit.calibration.data import LENGTH, PASSAGE, load_calibration, pieces_of
from lowbit.interchange.opening import open_source
from lowbit.pipeline.choosing import decided
from lowbit.pipeline.effort import MEDIUM, NONE, no_text_for
from lowbit.pipeline.options import Options
from lowbit.recipes.recipe import Recipe
from tiny import save_tiny, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT that takes more than a passage."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=300,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("encoder")
    transformers.BertModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_who_gets_passages(encoder: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "llama")
    assert pieces_of(open_source(encoder)) == pieces_of(tiny_model("bert")) == LENGTH // PASSAGE == 8
    assert pieces_of(open_source(tmp_path / "llama")) == pieces_of(tiny_model("t5")) == 1
    assert pieces_of(torch.nn.Linear(2, 2)) == 1
    kinds = (("Transformer", ""), ("Pooling", "1_Pooling"))  # as Qwen3-Embedding has them
    (tmp_path / "llama" / "modules.json").write_text(json.dumps([{"type": k, "path": p} for k, p in kinds]))
    assert pieces_of(open_source(tmp_path / "llama")) == 8


def test_windows_of_a_text(encoder: Path) -> None:
    source, text = open_source(encoder), ["the tin and her hat " * 400]
    few = load_calibration(text, None, source, samples=3)
    assert [len(window) for window in few.ids] == [PASSAGE] * 3
    asked = load_calibration(text, None, source, samples=3, length=200)
    assert [len(window) for window in asked.ids] == [200] * 3


def test_a_name_is_calibrated_and_keeps_its_effort(encoder: Path, tmp_path: Path) -> None:
    assert no_text_for(open_source(encoder)) == ""
    out = tmp_path / "q"
    first = decided(encoder, Recipe.of("w4"), "auto", Options(), out)
    assert first.effort == MEDIUM and first.samples == 8 * MEDIUM.samples
    made = lowbit.quantize(encoder, "w4", out, effort="medium")
    manifest: Any = json.loads((out / "lowbit.json").read_text())
    assert manifest["calibration"]["windows"] == 96 and manifest["calibration"]["tokens"] == 96 * PASSAGE
    again = decided(encoder, Recipe.of("w4"), "auto", Options(), out)
    assert (again.effort, again.samples, str(again.recipe)) == (MEDIUM, 96, str(made.plan.recipe))


def test_what_reads_no_text_is_not(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    transformers.ViTModel(config).save_pretrained(tmp_path)
    decision = decided(tmp_path, Recipe.of("w4"), "auto", Options())
    assert decision.effort == NONE and decision.reason == "the model does not read text, so it is quantized without any"


def test_calibration_brings_embeddings_nearer(encoder: Path, tmp_path: Path) -> None:
    text = ["the tin and her hat then an inn " * 300]
    cosines = []
    for name, how in (("plain", {"effort": "none"}), ("text", {"calibration": text, "samples": 12})):
        lowbit.quantize(encoder, "w3", tmp_path / name, **how)
        found = lowbit.evaluate(tmp_path / name, encoder, text, windows=8).outputs
        assert found is not None and found.cosine is not None
        cosines.append(1 - found.cosine.value)
    assert cosines[1] < 0.8 * cosines[0]
