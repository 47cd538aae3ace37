"""A folder that was downloaded whole comes out whole: what goes with the weights, what is left, and that it is said."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lowbit
from lowbit.interchange.companions import companions_of
from lowbit.interchange.opening import open_source
from tiny import save_tiny

# What a model of sentence-transformers, one of speech and old tokenizers have beside their weights.
TAKEN = {
    "modules.json": json.dumps([{"path": "", "type": "T"}, {"path": "1_Pooling", "type": "P"}, {"path": "2_Dense", "type": "D"}]),
    "1_Pooling/config.json": "{}", "2_Dense/config.json": "{}", "config_sentence_transformers.json": "{}",
    "sentence_bert_config.json": "{}", "additional_chat_templates/rag.jinja": "{{ x }}", "source.spm": "s", "bpe.codes": "b",
    "feature_extractor.json": "{}", "speaker_embeddings/one.npy": "n", "LICENSE": "free", "README.md": "# it",
}  # fmt: skip
LEFT = {
    "pytorch_model.bin": "weights in another form", "tf_model.h5": "weights in another form", "modeling_x.py": "code",
    "onnx/model.onnx": "weights of their own", "onnx/config.json": "weights of their own", "quantize_config.json": "older",
    "checkpoint-5/model.safetensors": "weights of their own", "lowbit.json": "", ".cache/x": "", ".gitattributes": "",
    "1_Pooling/.hidden": "", "journal.jsonl": "", "card.json": "",
}  # fmt: skip


def fill(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def files_of(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_tiny("bert", tmp_path / "in")
    fill(tmp_path / "in", TAKEN | dict.fromkeys(LEFT, "x"))
    save_file({"linear.weight": torch.ones(4, 4)}, tmp_path / "in/2_Dense/model.safetensors")
    (tmp_path / "in/2_Dense/pytorch_model.bin").write_text("x")
    return tmp_path / "in"


def test_every_writer_takes_the_same_files_along(model: Path, tmp_path: Path) -> None:
    made = lowbit.quantize(model, "int4:g32,embed=keep", tmp_path / "q")
    lowbit.dequantize_model(tmp_path / "q", tmp_path / "float")
    weights = "2_Dense/model.safetensors"
    for out in ("q", "float"):
        for name in (*TAKEN, weights, "tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / out / name).read_bytes() == (model / name).read_bytes(), name
        rest = files_of(tmp_path / out) - set(TAKEN) - {weights, "tokenizer.json", "tokenizer_config.json"}
        assert rest <= {"config.json", "model.safetensors", "lowbit.json", "generation_config.json"}
    said = made.source.left_files()
    for name, why in LEFT.items():
        place = f"{name.partition('/')[0]}/" if "/" in name else name
        assert any(place in line and why in line for line in said) is bool(why), name
    manifest = json.loads((tmp_path / "q/lowbit.json").read_text())
    assert manifest["left_out"]["files"] == list(said)
    assert any("pytorch_model.bin" in note for note in manifest["notes"])


def test_a_module_whose_weights_are_only_a_pickle_is_copied_unopened(model: Path) -> None:
    (model / "2_Dense/model.safetensors").unlink()
    assert "2_Dense/pytorch_model.bin" in companions_of(model).taken
    assert "pytorch_model.bin" not in companions_of(model).taken


@pytest.mark.parametrize(
    "modules", ["", "[1]", '[{"path": 3}]', '[{"path": "../.."}, {"path": "/etc"}, {"path": "a\\\\b"}]']
)
def test_modules_that_are_no_modules_are_an_ordinary_file(modules: str, model: Path) -> None:
    (model / "modules.json").write_text(modules)
    found = companions_of(model)
    assert "modules.json" in found.taken and not any(".." in name or name.startswith("/") for name in found.taken)


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_stay_in_the_folder_or_in_the_hubs_cache(tmp_path: Path) -> None:
    revision, blobs = tmp_path / "models--a--b/snapshots/abc", tmp_path / "models--a--b/blobs"
    for place in (revision / "1_Pooling", blobs, tmp_path / "elsewhere"):
        place.mkdir(parents=True)
    (blobs / "f00").write_text("from the cache")
    for name, back in (("modules_x.json", "../.."), ("1_Pooling/config.json", "../../..")):
        (revision / name).symlink_to(f"{back}/blobs/f00")
    for name in ("secret", "tokenizer.json", "vocab.txt"):
        (tmp_path / "elsewhere" / name).write_text("far")
    (revision / "notes.json").symlink_to(tmp_path / "elsewhere/secret")
    (revision / "vocab.txt").symlink_to(tmp_path / "elsewhere/secret")
    (revision / "tokenizer.json").symlink_to(tmp_path / "elsewhere/tokenizer.json")
    (revision / "more").symlink_to(tmp_path / "elsewhere")
    (revision / "round").symlink_to(revision / "round")
    os.mkfifo(revision / "pipe")
    found = companions_of(revision)
    assert found.taken == ("1_Pooling/config.json", "modules_x.json", "tokenizer.json")
    assert found.left == {
        "a link that is not followed": ("more", "round"), "a link out of the folder": ("notes.json", "vocab.txt"),
        "no plain file": ("pipe",),
    }  # fmt: skip


def test_which_of_two_sets_of_weights_is_read_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_tiny("llama", tmp_path, tokenizer=False)
    one = {"lm_head.weight": torch.zeros(1)}
    index = {
        "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"}
    }
    for number in (1, 2):
        save_file(one, tmp_path / f"model-0000{number}-of-00002.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    source = open_source(tmp_path)
    assert len(source.remarks) == 1 and str(tmp_path) not in source.remarks[0]
    for words in ("two sets of weights", "model.safetensors is read", "model-00001-of-00002.safetensors"):
        assert words in source.remarks[0] and words in caplog.text
    assert lowbit.plan(tmp_path, "w8").notes == source.remarks


def test_the_index_decides_about_a_stray_shard(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "whole", tokenizer=False)
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert open_source(tmp_path / "parts").remarks == ()
    save_file({"lm_head.weight": torch.zeros(128, 32)}, tmp_path / "parts/model-99999.safetensors")
    (tmp_path / "parts/pytorch_model.bin").write_text("x")
    source = open_source(tmp_path / "parts")
    assert torch.equal(source.read("lm_head.weight"), model.lm_head.weight)
    stray, pickle = source.remarks
    assert "model-99999.safetensors" in stray and "index" in stray
    assert "pytorch_model.bin" in pickle and "pickle" in pickle


def test_a_config_that_names_other_weights_is_not_followed_and_that_is_said(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path, tokenizer=False)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    source = open_source(tmp_path)
    assert "transformers_weights" in source.remarks[0]
    assert torch.equal(source.load_float().lm_head.weight, model.lm_head.weight)
