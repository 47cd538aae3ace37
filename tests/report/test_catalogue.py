"""Looking names of recipes up."""

from __future__ import annotations

import json
import re

import pytest

from lowbit.errors import RecipeError
from lowbit.formats.parsing import NAMED
from lowbit.kv.named import published
from lowbit.recipes.presets import GROUPS, PRESETS
from lowbit.recipes.recipe import Recipe
from lowbit.report.catalogue import KINDS, METHODS, Entry, catalogue, matching, to_json
from lowbit.solvers.ranges.estimator import estimators
from lowbit.solvers.registry import methods


@pytest.fixture(scope="module")
def entries() -> list[Entry]:
    return catalogue()


def names(found: list[Entry]) -> list[tuple[str, str]]:
    return [(e.name, e.kind) for e in found]


def test_everything_that_has_a_name_is_there_once(entries: list[Entry]) -> None:
    assert len(entries) == len(PRESETS) + len(methods()) + len(estimators()) + len(NAMED) + len(published())
    assert len(set(names(entries))) == len(entries)
    assert {e.kind for e in entries} == set(KINDS)


def test_a_name_finds_itself_in_every_kind_and_says_what_else_contains_it(entries: list[Entry]) -> None:
    assert names(matching(entries, "gptq")[0]) == [("gptq", "preset"), ("gptq", "solver")]
    assert names(matching(entries, "W4")[0]) == [("w4", "preset")] and matching(entries, "w4")[1] == ["w4a8"]


def test_a_part_of_a_name_a_kind_and_a_group_find_what_they_name(entries: list[Entry]) -> None:
    assert {name for name, _ in names(matching(entries, "gpt")[0])} == {"gptq", "gptaq"}
    for kind in KINDS:
        for word in (kind, f"{kind}s"):
            assert matching(entries, word)[0] == [e for e in entries if e.kind == kind]
    assert {e.kind for e in matching(entries, "methods")[0]} == set(METHODS)
    for group in GROUPS:
        assert {e.name for e in matching(entries, group)[0]} == {n for n, p in PRESETS.items() if p.group == group}


@pytest.mark.parametrize(
    ("what", "words"),
    [("gtpq", "did you mean 'gptq'"), ("solvrs", "did you mean 'solver'"), ("", "no preset, method or format is called ''"),
     ("int4:g32", "is a recipe as it stands"), ("search@int4:g32,embed=keep", "lowbit plan MODEL search@int4:g32,embed=keep")],
)  # fmt: skip
def test_what_is_not_found_is_an_error_with_what_is_near(entries: list[Entry], what: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        matching(entries, what)
    assert words in str(caught.value)


def test_a_preset_shows_both_recipes_and_methods_show_who_uses_them(entries: list[Entry]) -> None:
    facts = dict(matching(entries, "w4")[0][0].facts)
    assert facts["stands for"] == "search@int4:g32" and facts["with text"] == "qronos@int4:g32"
    (qronos,) = matching(entries, "qronos")[0]
    assert dict(qronos.facts)["presets"] == ", ".join(n for n, p in PRESETS.items() if "qronos" in (p.calibrated or ""))
    assert "damp=0.05" in dict(qronos.facts)["options"] and "Zhang et al." in qronos.details


def test_json_has_everything_or_what_was_asked_for(entries: list[Entry]) -> None:
    data = json.loads(json.dumps(to_json(entries)))
    assert set(data["presets"]) == set(PRESETS) and set(data["methods"]) == set(methods())
    assert set(data["ranges"]) == set(estimators()) and data["formats"] == NAMED
    assert data["presets"]["w4"]["with_calibration"] == str(Recipe.parse("w4").calibrated())
    assert data["presets"]["w4"]["when"] == PRESETS["w4"].when
    few = to_json(matching(entries, "gptq")[0])
    assert list(few["presets"]) == ["gptq"] == list(few["methods"]) and not few["formats"]


def test_every_method_begins_with_a_plain_sentence(entries: list[Entry]) -> None:
    for entry in entries:
        if entry.kind == "format":
            continue
        assert (entry.summary.endswith(".") and entry.summary[0].isupper()) or entry.kind == "preset", entry
        formula = set("=^{}\\*") | ({"|", "_"} if entry.kind != "preset" else set())
        assert not formula & set(entry.summary), f"{entry.name}: a formula belongs on a later line"


def test_what_is_printed_of_a_name_is_for_readers_of_the_command() -> None:
    for entry in catalogue():
        assert not re.search(r"\(see `|float32 \[|float \[|Returns |Error (for|when) |` \[", entry.details), entry.name
        assert not entry.details or entry.details.rstrip().endswith((".", ")")), entry.name
    assert catalogue_of("gptaq").startswith("    W[:, i:] -= e U[i, i:]"), "formulas stay as they are"
    assert "With statistics of its input the fit weighs" in catalogue_of("rtn")
    assert "moves out of local minima. For formats" in catalogue_of("kmeans")


def catalogue_of(name: str) -> str:
    return next(e.details for e in catalogue() if e.name == name and e.details)


@pytest.mark.parametrize("name", ["gptq", "w4", "nf4", "search", "minmax", "guided", "q8_0"])
def test_a_name_ends_with_the_command_that_shows_it(name: str) -> None:
    import lowbit

    assert lowbit.explain(name), "the command shows something"
    assert f"lowbit explain {name} shows it at work on numbers." in str(lowbit.catalogue(name))
    assert "lowbit explain" not in str(lowbit.catalogue("solver")), "several names have no such line"


@pytest.mark.parametrize("word", ["grid", "grids", "codebook"])
def test_a_word_of_formats_points_to_formats(word: str) -> None:
    with pytest.raises(RecipeError, match="lowbit recipes format"):
        matching(catalogue(), word)
