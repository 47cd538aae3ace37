"""Recipes: three forms of one value, and errors that say what to write instead."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from lowbit.errors import FormatError, LowbitError, RecipeError
from lowbit.formats import parse_format
from lowbit.recipes.presets import PRESETS
from lowbit.recipes.recipe import EMBED, Recipe
from lowbit.recipes.text import to_toml
from lowbit.solvers import Call

TEXTS = [
    "int4:g32", "search@int4:g32", "hqq+rtn@uint4:g64:zero=fp16", "percentile(p=99.5)@int8:channel",
    "kmeans(iterations=10,rounds=1)@kmeans4:g32:cb=tensor", "absmax@nf4:g64:s=(uint8:g256:s=fp32),embed=keep",
    "int4:g32,embed=int6:g64,*.down_proj=int8:channel,lm_head=keep", "mse@e2m1:g16:s=(e4m3:tensor)",
]  # fmt: skip


@pytest.mark.parametrize("text", [*TEXTS, *(preset.text for preset in PRESETS.values())])
def test_text_and_toml_give_the_recipe_back(text: str, tmp_path: Path) -> None:
    recipe = Recipe.parse(text)
    assert Recipe.parse(str(recipe)) == recipe
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    assert Recipe.parse(str(tmp_path / "recipe.toml")) == recipe


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_text_with_a_name(name: str) -> None:
    recipe = Recipe.parse(name)
    assert recipe.name == name and recipe.title == f"{name} = {recipe}"
    assert dataclasses.replace(recipe, name=None) == Recipe.parse(PRESETS[name].text)
    assert Recipe.parse(f"{name},lm_head=keep").name is None  # no longer what the name stands for


def test_formats_and_recipes_are_taken_as_they_are() -> None:
    recipe = Recipe.parse("w4")
    assert Recipe.of(recipe) is recipe
    for text in ("int4:g32", "mxfp4", "nvfp4"):
        made = Recipe.of(parse_format(text))
        assert made.format == parse_format(text) and made.fit_for(made.format) == Call("search")
        assert Recipe.parse(str(made)) == made


def test_the_last_matching_glob_wins_and_weight_may_be_left_out() -> None:
    recipe = Recipe.parse("int4:g32,*.mlp.*=int8:channel,*.2.mlp.up_proj=keep,model.embed_tokens=int4:g64")
    assert recipe.format_for("model.layers.1.mlp.up_proj.weight", "linear") == parse_format("int8:channel")
    assert recipe.format_for("model.layers.2.mlp.up_proj.weight", "linear") is None
    assert recipe.format_for("model.layers.2.self_attn.q_proj.weight", "linear") == parse_format("int4:g32")
    assert recipe.format_for("model.embed_tokens.weight", "embedding") == parse_format("int4:g64")
    assert recipe.format_for("lm_head.weight", "head") == EMBED


def test_embeddings_get_another_fit_only_where_the_recipe_s_own_cannot_serve() -> None:
    recipe = Recipe.parse("hqq@uint4:g64:zero=fp16")
    assert recipe.fit_for(recipe.format) == Call("hqq") and recipe.fit_for(EMBED) == Call("search")
    assert Recipe.parse("absmax@int4:g32").fit_for(EMBED) == Call("absmax")
    assert Recipe.parse("kmeans@kmeans4:channel").solver_for(EMBED) == Call("rtn")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("w5", "unknown recipe 'w5'; did you mean 'w"),
        ("smoothqant", "unknown recipe"),
        ("rtn", "needs a format: write rtn@int4:g32"),
        ("absmax@int4:g32:asym", "'absmax' is symmetric and cannot fill the offset"),
        ("minmax@int8:channel", "'minmax' needs an offset"),
        ("hqq@int4:g32", "'hqq' needs an offset"),
        ("kmeans@int4:g32", "'kmeans' learns the levels"),
        ("rtn@kmeans4:channel", "'rtn' cannot learn the levels"),
        ("percentile(p=50)@kmeans4:channel", "finds a scale"),
        ("search(stepz=4)@int4:g32", "no option 'stepz'; did you mean 'steps'"),
        ("search(steps=1.5)@int4:g32", "a whole number"),
        ("search(span=inf)@int4:g32", "finite"),
        ("percentile(p=50,p=60)@int8", "given twice"),
        ("search(steps)@int4:g32", "not OPTION=VALUE"),
        ("search(steps=4@int4:g32", "does not close|never closed"),
        ("search+absmax@int4:g32", "a recipe has one fit"),
        ("rtn+search@int4:g32", "comes before the step that rounds"),
        ("rtn+rtn@int4:g32", "one solver"),
        ("int4:g32,foo=int8", "unknown option 'foo'"),
        ("int4:g32,embed", "is not KEY=VALUE"),
        ("int4:g32,*.x=int9", "unknown grid 'int9'"),
        ("int4:g32:asm", "position 10"),
    ],
)
def test_what_cannot_be_followed_is_an_error_that_helps(text: str, words: str) -> None:
    with pytest.raises((RecipeError, FormatError), match=words):
        Recipe.parse(text)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("recipe = ", "is not TOML"),
        ('embed = "keep"', "needs a line such as"),
        ('recipe = "self.toml"', "needs a line such as"),
        ('recipe = "w4"\nlayer = 3', "unknown key 'layer'; did you mean 'layers'"),
        ('recipe = "w4"\n[layers]\n"*.x" = 3', r"\[layers\]"),
        ('recipe = "w4"\nembed = "int9"', "unknown grid"),
    ],
)
def test_a_toml_file_that_cannot_be_followed(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(content)
    with pytest.raises(LowbitError, match=words):
        Recipe.parse(str(path))
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.parse(str(tmp_path / "none.toml"))


def test_toml_names_any_layer(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('recipe = "w4"\n[layers]\n"proj" = "int8:channel"\n"*.0.*" = "keep"\n')
    assert Recipe.parse(str(path)).layers == (("proj", parse_format("int8:channel")), ("*.0.*", None))


def test_inputs_and_transforms_are_written_and_read_back() -> None:
    for text in (
        "awq+gptq@int4:g64", "rotate+gptq@int4:g128,a=int8:token", "smooth@int8:channel,a=int8:token",
        "smooth(alpha=0.8)+gptq(damp=0.05,order=2)@int8:channel,a=percentile(p=99.9)@int8:tensor:static",
        "qronos(blend=1.0)@iq4nl:g32,embed=int6:g64,a=int8:g64", "fold+rotate+awq+gptq+distill@int4:g32",
        "llm-int8", "smoothquant", "w8a8", "w4a8", "awq", "gptq",
    ):  # fmt: skip
        recipe = Recipe.parse(text)
        assert Recipe.parse(str(recipe)) == dataclasses.replace(recipe, name=None), text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gptq+awq@int4:g64", "write awq\\+gptq"),
        ("awq+rotate@int4:g64", "write rotate\\+awq"),
        ("gptq+rtn@int4:g64", "one solver"),
        ("distill+gptq@int4:g64", "comes last"),
        ("gptq@int4:g64,a=percentile(q=3)@int8:tensor", "no option 'q'"),
        ("gptq@int4:g64,a=int8:token:static", "a static scale serves all tokens"),
        ("gptq(damp=-1)@int4:g64", "not negative"),
        ("smooth+awq@int4:g64", "keep one"),
    ],
)
def test_a_wrong_order_names_the_right_one(text: str, message: str) -> None:
    with pytest.raises(LowbitError, match=message):
        Recipe.parse(text)


def test_a_preset_may_mean_more_when_text_is_at_hand() -> None:
    plain = Recipe.parse("w4")
    assert plain.needs_calibration is None and plain.calibrated().needs_calibration == "qronos"
    assert plain.calibrated().name == "w4" and Recipe.parse("w8").calibrated() == Recipe.parse("w8")
    assert not Recipe.parse("absmax").uses_calibration and Recipe.parse("int4:g32").uses_calibration
