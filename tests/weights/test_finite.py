"""Numbers that are none: refused by the name of the tensor wherever it is read, kept where the recipe names it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.errors import WeightError
from lowbit.weights.finite import check_finite, nonfinite
from tiny import save_tiny, tiny_model

NORM, EMBED = "model.layers.1.post_attention_layernorm.weight", "model.embed_tokens.weight"


def damaged(folder: Path, name: str, at: tuple[int, ...], value: float) -> Path:
    save_tiny("llama", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name][at] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_how_many_and_where(dtype: torch.dtype) -> None:
    x = torch.ones(4, 5)
    assert (
        nonfinite(x.to(dtype)) == ""
        and nonfinite(torch.zeros(0)) == ""
        and nonfinite(torch.ones(3, dtype=torch.int64)) == ""
    )
    assert nonfinite(torch.full((4, 4), 6e4, dtype=torch.float16)) == ""  # the sum is large, no number of it is
    x[2, 3] = torch.nan
    x[3, 0] = torch.nan
    assert nonfinite(x.to(dtype)) == "2 NaN and 0 infinite values, the first at [2, 3]"
    with pytest.raises(WeightError, match="'w' has 2 NaN"):
        check_finite(x, "w")


@pytest.mark.parametrize(("name", "at"), [(NORM, (3,)), (EMBED, (7, 2))])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refused_by_name_in_every_way_of_reading(tmp_path: Path, name: str, at: tuple[int, ...], value: float) -> None:
    folder = damaged(tmp_path / "m", name, at, value)
    said = rf"{name}.*first at \[{', '.join(map(str, at))}\].*damaged.*=keep"
    with pytest.raises(WeightError, match=said):
        lowbit.quantize(folder, "w8,embed=keep", tmp_path / "q")
    with pytest.raises(WeightError, match=said):  # before the model is asked for text
        lowbit.quantize(folder, "gptq@int4:g32", tmp_path / "q")
    assert not (tmp_path / "q").exists()
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter(name)[at] = value
    with pytest.raises(WeightError, match=said):
        lowbit.quantize(model, "w8")


def test_kept_and_said_where_the_recipe_names_it(tmp_path: Path) -> None:
    folder = damaged(tmp_path / "m", NORM, (3,), float("inf"))
    with pytest.raises(WeightError):
        lowbit.quantize(folder, "w8,*.layers.1.*=keep", tmp_path / "q")  # a glob does not ask for it
    made = lowbit.quantize(folder, f"w8,{NORM}=keep", tmp_path / "q")
    assert made.report.warnings == {NORM: "has 0 NaN and 1 infinite values, the first at [3], kept as the recipe says"}
    assert load_file(tmp_path / "q/model.safetensors")[NORM][3] == float("inf")
    with pytest.raises(WeightError, match=rf"{NORM}.* cannot be written"):
        lowbit.dequantize_model(tmp_path / "q", tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_masks_may_hold_infinities() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(64, 64))
    module.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
    assert not lowbit.quantize(module, "w8").report.warnings
    module.mask[2, 0] = torch.nan
    with pytest.raises(WeightError, match=r"'mask' has 1 NaN and 0 infinite values, the first at \[2, 0\]"):
        lowbit.quantize(module, "w8")
