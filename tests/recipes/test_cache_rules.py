"""What recipes say of the KV cache: three forms of one value, and nothing of it in the weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import LowbitError, RecipeError
from lowbit.kv import CacheFormat, CacheSide
from lowbit.kv.side import parse_side
from lowbit.recipes.cache_rules import AutoCache, cache_settings, parse_cache
from lowbit.recipes.recipe import Recipe
from lowbit.recipes.text import to_toml
from strategies import steady

SIDES = [
    "int16", "int8", "int4:g32", "rotate@int4:g32:recent=64", "search@int4:sinks=4", "uint2:32x1:min=fp16:recent=32", "nf4:g16",
    "rotate+search@int3:recent=1:sinks=2:outliers=3", "kmeans3:*x1:cb=tensor:sinks=1", "uint4:g16:min=fp16",
]  # fmt: skip


def sides() -> st.SearchStrategy[CacheSide]:
    return st.sampled_from([parse_side(text) for text in SIDES])


def caches() -> st.SearchStrategy[CacheFormat | AutoCache]:
    globs = st.sampled_from(["0", "*", "[1-3]", "1?", "[!02]"])
    rules = st.lists(st.tuples(globs, st.sampled_from(["k", "v"]), sides()), max_size=3).map(tuple)
    formats = st.builds(CacheFormat, sides(), sides(), rules)
    return formats | st.builds(AutoCache, st.sampled_from([0.01, 0.03, 1e-5, 0.1 + 0.2]))


@steady(60)
@given(caches(), st.sampled_from(["w4", "search@int4:g32,*.down_proj=int8:channel", "w8a8", "nf4"]))
def test_text_and_settings_give_the_cache_back(cache: CacheFormat | AutoCache, weights: str) -> None:
    assert parse_cache(cache_settings(cache)) == cache
    recipe = replace(Recipe.parse(weights), cache=cache)
    again = Recipe.parse(str(recipe))
    assert again == replace(recipe, name=None) and again.cache == cache
    assert Recipe.parse(",".join([weights, *cache_settings(cache)])) == recipe


@steady(20)
@given(caches())
def test_toml_gives_the_cache_back(tmp_path_factory: pytest.TempPathFactory, cache: CacheFormat | AutoCache) -> None:
    path = tmp_path_factory.mktemp("toml") / "recipe.toml"
    recipe = replace(Recipe.parse("int4:g32,*.down_proj=int8:channel"), cache=cache)
    path.write_text(to_toml(recipe))
    assert Recipe.parse(str(path)) == recipe
    settings = dict(setting.split("=", 1) for setting in cache_settings(cache))
    if len(settings) == len(cache_settings(cache)):  # as a table each key stands once
        table = "\n".join(f"{json.dumps(key)} = {json.dumps(value)}" for key, value in settings.items())
        path.write_text(f'recipe = "int4:g32,*.down_proj=int8:channel"\n[cache]\n{table}\n')
        assert Recipe.parse(str(path)) == recipe


def test_a_preset_with_a_cache_has_the_weights_of_the_preset() -> None:
    plain, with_cache = Recipe.parse("w4"), Recipe.parse("w4,kv=int4:g32")
    assert replace(with_cache, cache=None) == plain and with_cache.cache == CacheFormat.of("int4:g32")
    assert replace(with_cache.calibrated(), cache=None) == plain.calibrated()
    assert with_cache.calibrated().cache == with_cache.cache and with_cache.has_calibrated_form
    assert with_cache.title == f"w4,kv=int4:g32 = {plain},kv=int4:g32"
    assert Recipe.parse("w4,kv=int8,lm_head=keep").name is None
    assert Recipe.parse("w4").cache is None and "kv" not in str(Recipe.parse("w4"))


def test_keys_and_values_apart_and_layers() -> None:
    cache = Recipe.parse("w4,k=int8,v=int4:g32,kv:0=int16,k:[1-2]=int4").cache
    assert isinstance(cache, CacheFormat)
    assert [str(cache.side(i, "k")) for i in range(4)] == ["int16", "int4", "int4", "int8"]
    assert [str(cache.side(i, "v")) for i in range(4)] == ["int16", "int4:g32", "int4:g32", "int4:g32"]
    assert Recipe.parse("w4,kv=kivi2").cache == CacheFormat.of("kivi2")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("w4,kv=in8", "int8"),
        ("w4,kv=autoo", "did you mean 'auto'"),
        ("w4,kv=auto(limit=3)", r"the one option is the limit, a number: kv=auto\(kl=0.01\)"),
        ("w4,kv=auto(kl=0)", "no limit above 0"),
        ("w4,kv=auto(kl=nan)", "no limit above 0"),
        ("w4,kv=auto,k:0=int8", "of every layer; write kv=auto and nothing else"),
        ("w4,k=auto,v=int8", "of every layer"),
        ("w4,kv=int8,kv=int4", "twice"),
        ("w4,k=int8", "how values are stored"),
        ("w4,k:0=int8", "stored"),
        ("w4,vk=int8", "did you mean .*'kv'"),
        ("w4,kv=gptq@int4", "for weights"),
        ("w4,kv=", "not KEY=VALUE"),
    ],
)
def test_what_cannot_be_followed_is_an_error_that_helps(text: str, words: str) -> None:
    with pytest.raises(LowbitError, match=words):
        Recipe.parse(text)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('recipe = "w4,kv=int8"\ncache = "int4"', "twice"),
        ('recipe = "w4"\ncache = 8', r"\[cache\]"),
        ('recipe = "w4"\n[cache]\nvk = "int8"', "unknown key 'vk'; did you mean .*'kv'"),
        ('recipe = "w4"\n[cache]\nkv = 8', "is a table such as"),
        ('recipe = "w4"\n[cache]\n', "is a table such as"),
    ],
)
def test_a_toml_file_that_cannot_be_followed(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(content)
    with pytest.raises(RecipeError, match=words):
        Recipe.parse(str(path))


def test_a_toml_text_may_name_the_format_alone(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    for said in ("int8", "kv=int8", "k=int8,v=int8"):
        path.write_text(f'recipe = "w4"\ncache = "{said}"')
        assert Recipe.parse(str(path)) == replace(Recipe.parse("w4"), cache=CacheFormat.of("int8"))
