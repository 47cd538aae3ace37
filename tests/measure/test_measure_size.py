from __future__ import annotations

import json

import pytest
import torch
from measure_models import tiny_llama

from lowbit.errors import SourceError
from lowbit.measure.size import DiskSize, bits_per_weight, count_parameters, disk_size, module_bytes


def write(folder, **sizes):
    for name, size in sizes.items():
        (folder / name.replace("__", ".")).write_bytes(b"x" * size)


def test_what_runs_counts_and_what_does_not(tmp_path):
    write(tmp_path, model__safetensors=1000, config__json=10, tokenizer__json=200, chat_template__jinja=5)
    write(tmp_path, tokenizer__model=40, merges__txt=3)
    write(tmp_path, README__md=7, card__json=7, lowbit__json=7, pytorch_model__bin=9000, notes__txt=7)
    (tmp_path / "onnx").mkdir()
    write(tmp_path / "onnx", model__safetensors=77)
    assert disk_size(tmp_path) == DiskSize(weights=1000, total=1258)
    assert disk_size(tmp_path, ignore=()) == DiskSize(weights=1000, total=1272)


def test_the_index_says_which_shards_count(tmp_path):
    write(tmp_path, a__safetensors=100, b__safetensors=50, stray__safetensors=999)
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "a.safetensors"}}
    text = json.dumps(index)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert disk_size(tmp_path) == DiskSize(150, 150 + len(text))
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(SourceError, match=r"lacks b\.safetensors"):
        disk_size(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(SourceError, match="not an index"):
        disk_size(tmp_path)


def test_a_second_copy_of_the_weights_does_not_count(tmp_path):
    write(tmp_path, model__safetensors=100, consolidated__safetensors=100)
    assert disk_size(tmp_path).weights == 100


def test_links_count_as_their_target(tmp_path):
    write(tmp_path, blob=123)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "blob")
    assert disk_size(tmp_path / "snapshot") == DiskSize(123, 123)


def test_single_file(tmp_path):
    write(tmp_path, model__gguf=321)
    assert disk_size(str(tmp_path / "model.gguf")) == DiskSize(321, 321)


def test_nothing_to_run(tmp_path):
    write(tmp_path, config__json=10)
    with pytest.raises(SourceError, match=r"no \.safetensors"):
        disk_size(tmp_path)
    with pytest.raises(SourceError, match="no such file"):
        disk_size(tmp_path / "absent")


def test_a_saved_model_has_the_bits_of_its_dtype(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    parameters = count_parameters(model)
    assert parameters == sum(p.numel() for name, p in model.named_parameters() if name != "lm_head.weight")
    assert bits_per_weight(disk_size(tmp_path).weights, parameters) == pytest.approx(16, rel=0.1)
    assert 2 * parameters <= module_bytes(model) < 2 * parameters + 200


def test_bits():
    assert bits_per_weight(513 * 2**20, 134_515_008) == pytest.approx(31.99, abs=0.01)
