"""`lowbit.load`: kernels to choose from, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.errors import LowbitError, RecipeError, SourceError
from lowbit.nn.swap import packed_weights

Folder = Callable[[str, str], Path]
IDS = torch.arange(3, 17).view(2, 7)


def copied(folder: Path, out: Path) -> Path:
    return Path(shutil.copytree(folder, out))


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_kernels_agree(name: str, packed_folder: Folder) -> None:
    folder = packed_folder(name, "w8")
    with torch.no_grad():
        expected = lowbit.load(folder, kernel="expand")(IDS).logits
        for kernel in ("auto", "dense"):
            model = lowbit.load(folder, kernel=kernel)
            assert not model.training and bool(list(packed_weights(model))) == (kernel == "auto")
            bound = 1e-5 if kernel == "dense" else 2e-4  # the packed kernel has 15 bits for activations
            assert float((model(IDS).logits - expected).norm() / expected.norm()) < bound


def test_dense_is_an_ordinary_model(packed_folder: Folder, tmp_path: Path) -> None:
    model = lowbit.load(packed_folder("llama-tied", "w8"), kernel="dense")
    assert model.lm_head.weight is model.model.embed_tokens.weight and not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "dense")
    assert lowbit.plan(tmp_path / "dense", "w4").coverage > 0.9  # which lowbit takes for a float model
    half = lowbit.load(packed_folder("llama-tied", "w8"), dtype="bfloat16", kernel="dense")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_what_is_refused(packed_folder: Folder, tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="unknown kernel choice 'exapnd'; did you mean 'expand'"):
        lowbit.load(packed_folder("llama", "w8"), kernel="exapnd")
    with pytest.raises(SourceError, match="no folder"):
        lowbit.load(tmp_path / "nothing")
    with pytest.raises(SourceError, match="is a float model, not written by lowbit"):
        lowbit.load(tiny_folder("llama"))


@pytest.mark.parametrize("part", ["model.layers.1.mlp.up_proj.weight.scale", "model.norm.weight"])
def test_a_file_that_lacks_something_is_not_run(part: str, packed_folder: Folder, tmp_path: Path) -> None:
    folder = copied(packed_folder("llama", "w8"), tmp_path / "out")
    state = load_file(folder / "model.safetensors")
    del state[part]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=rf"lacks .*{part}"):
        lowbit.load(folder)


def test_parts_of_another_type_or_a_config_of_another_format_are_refused(packed_folder: Folder, tmp_path: Path) -> None:
    folder = copied(packed_folder("llama", "w8"), tmp_path / "out")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"int8:g128"', '"int9:g128"', 1))
    with pytest.raises(LowbitError, match="int9"):
        lowbit.load(folder)
    (folder / "config.json").write_text(text.replace('"quant_method"', '"surprise": 1, "quant_method"', 1))
    with pytest.raises(SourceError, match="surprise"):
        lowbit.load(folder)
