"""Folders and recipes of the released 0.1.0, as users have them, are read as that version read them.

`tests/data/written_by_0_1_0` has two folders of a random Llama of one layer, the logits that transformers gave for them then, the
recipes in TOML, and texts of recipes beside the form in which 0.1.0 printed them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.recipes.recipe import Recipe

DATA = Path(__file__).parents[1] / "data" / "written_by_0_1_0"
FOLDERS = ("mixed", "static")
RECIPES = json.loads((DATA / "recipes.json").read_text("utf-8"))


def expected(name: str) -> tuple[Tensor, Tensor]:
    """Token ids [1, 12] and the logits [12, 128] that 0.1.0 gave for them."""
    found = load_file(DATA / f"{name}.expected.safetensors")
    return found["input_ids"][None], found["logits"]


def apart(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("load", (AutoModelForCausalLM.from_pretrained, lowbit.load), ids=("from_pretrained", "load"))
def test_the_logits_are_those_that_0_1_0_gave(name: str, load: object) -> None:
    ids, logits = expected(name)
    model = load(DATA / name)  # type: ignore[operator]
    assert type(model.model.layers[0].mlp.up_proj.weight).__name__ == "PackedWeight"
    with torch.inference_mode():
        assert apart(model(input_ids=ids).logits[0], logits) < 1e-5


@pytest.mark.parametrize("name", FOLDERS)
def test_the_engine_runs_them(name: str) -> None:
    """Where ranges of inputs are found while the model runs, the last bit of a sum may move one of them to the next code."""
    ids, logits = expected(name)
    engine = lowbit.Engine.open(DATA / name)
    assert apart(engine.logits(ids[0].tolist()), logits) < (1e-2 if name == "mixed" else 1e-5)


def test_they_are_exported(tmp_path: Path) -> None:
    """`export` itself reads back what it wrote, and compares weights, inputs and logits with those of the folder."""
    done = lowbit.export(DATA / "static", "vllm", tmp_path / "out")
    assert done.weights < 2**-8 and done.logits is not None and done.logits < 1e-3


@pytest.mark.parametrize("name", FOLDERS)
def test_a_recipe_in_toml_is_the_one_in_the_folder(name: str) -> None:
    config = json.loads((DATA / name / "config.json").read_text("utf-8"))
    assert Recipe.parse(str(DATA / f"{name}.toml")) == Recipe.parse(config["quantization_config"]["recipe"])


@pytest.mark.parametrize("text", RECIPES)
def test_a_recipe_of_then_says_what_it_said(text: str) -> None:
    assert str(Recipe.parse(text)) == RECIPES[text]
