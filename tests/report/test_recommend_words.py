"""What a recommendation says: which losses are with text, how sure a word is, what a name means, and what stands in for what."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lowbit
from lowbit.formats import parse_format
from lowbit.measure.expected_loss import MIXES, PARAMETERS, expected_loss, quantizing_seconds
from lowbit.measure.verdict import THRESHOLDS, near_limit
from lowbit.report.choice_words import expectation, word_of
from lowbit.report.recommendation import Recommendation

Float = Callable[[str], Path]
PLENTY = 10**12
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture(scope="module")
def found(tiny_folder: Float) -> Recommendation:
    return lowbit.recommend(tiny_folder("llama"), "8GB")


def flat(text: Any) -> str:
    return " ".join(str(text).split())


def rows_of(text: str) -> list[list[str]]:
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:1] == ["recipe"])
    return [line.removeprefix("* ").split() for line in lines[start + 1 : lines.index("", start)]]


def test_each_row_says_whether_it_is_with_text(found: Recommendation) -> None:
    rows = {row[0]: row for row in rows_of(str(found))}
    for choice in found.choices:
        assert ("yes" in rows[choice.name], "no" in rows[choice.name]) == (choice.text is not None, choice.text is None)
        assert ("--calibration" in choice.command) == (choice.text is not None)
    assert {c.text is None for c in found.choices} == {True, False}
    assert {c["name"]: c["calibrated"] for c in found.to_dict()["choices"]} == {
        c.name: c.text is not None for c in found.choices
    }


def test_what_losses_were_measured_on_is_said_and_named(found: Recommendation) -> None:
    text = flat(found)
    for words in (
        "SmolLM2-135M (channels shuffled)",
        "32 windows of another part of WikiText-2",
        "may lose more",
        "likely",
    ):
        assert words in text
    for choice in found.to_dict()["choices"]:
        loss = choice["expected_kl"]
        assert (RESULTS.parents[1] / loss["file"]).is_file() and loss["stderr"] > 0
        assert choice["loss_is"] == ("bound" if loss["at_most"] else "measured elsewhere")


def test_a_word_near_its_limit_says_so(found: Recommendation) -> None:
    nl4 = next(c for c in found.choices if c.name == "nl4")
    assert 'likely "very close", near the limit of "noticeable"' in expectation(nl4)
    row = next(row for row in rows_of(str(found)) if row[0] == "nl4")
    assert row[-3:] == ["very", "close", "±"] and "±: within two standard errors" in flat(found)
    assert near_limit(0.051, 0.001) is THRESHOLDS[1] and near_limit(0.049, 0.001) is THRESHOLDS[2]
    assert (
        near_limit(0.047, 0.001) is None and near_limit(0.05, None) is None and near_limit(0.05, float("nan")) is None
    )


def test_a_bound_that_says_nothing_has_no_word(found: Recommendation) -> None:
    nl4 = next(c for c in found.choices if c.name == "nl4")
    assert nl4.loss is not None
    unknown = replace(nl4, loss=replace(nl4.loss, kl=1.1, at_most=True))
    assert word_of(unknown) is None and "is not known" in expectation(unknown)
    shown = replace(found, choices=(unknown,), best=unknown, second=None, larger=None)
    assert "unknown" in str(shown) and "damaged" not in str(shown) and shown.to_dict()["choices"][0]["verdict"] is None
    some = replace(nl4, loss=replace(nl4.loss, kl=0.29, at_most=True))
    assert '"noticeable" or better' in expectation(some)


def test_a_mix_counts_only_where_its_formats_are_those_that_were_measured() -> None:
    def plan(*formats: str) -> Any:
        return SimpleNamespace(
            tensors=[SimpleNamespace(format=parse_format(f), kind="linear", inputs=None) for f in formats]
        )

    (mix,) = MIXES
    same = expected_loss(plan(*mix.format.split()), True, "q4_k_m")
    assert same is not None and same.by is mix and not same.at_most
    whole = expected_loss(plan("q4_k", "q6_k"), True, "q4_k_m")  # as in a model whose rows 256 divides
    assert whole is not None and whole.by is not mix and whole.at_most and whole.kl > mix.kl


def test_blocks_that_stand_in_are_said_and_a_presets_own_sense(tiny_folder: Float) -> None:
    gguf = lowbit.recommend(tiny_folder("llama-tied"), PLENTY, target="gguf")
    names = [c.name for c in gguf.choices if c.replaced]
    assert names and all(c["replaced"] for c in gguf.to_dict()["choices"] if c["name"] in names)
    assert "stand in for those that do not fit this model" in flat(gguf) and "multiple of 256" in flat(gguf)
    vllm = lowbit.recommend(tiny_folder("llama-tied"), PLENTY, target="vllm")
    assert vllm.best is not None and vllm.best.name == "w8"
    assert f"For vllm, w8 is {vllm.best.recipe}." in flat(vllm) and "search@int8:channel" in vllm.best.recipe


def test_a_tie_is_called_one_and_a_second_choice_is_worth_it(tiny_folder: Float) -> None:
    fast = lowbit.recommend(tiny_folder("llama-tied"), PLENTY, target="vllm", speed=True)
    assert (
        fast.best is not None and fast.best.name == "w8" and "as few as fp8 and w8a8, and loses the least" in flat(fast)
    )
    for target in ("lowbit", "vllm", "gguf"):
        for speed in (False, True):
            one = lowbit.recommend(tiny_folder("llama-tied"), PLENTY, target=target, speed=speed)
            assert one.best is not None
            second = one.second
            assert second is None or second.kl < one.best.kl or second.read < 0.95 * one.best.read


def test_what_making_needs_is_held_against_the_memory_that_was_named(found: Recommendation) -> None:
    assert found.best is not None and "Warning" not in str(found)
    big = replace(found.best, peak=found.memory + 2**30)
    text = flat(replace(found, best=big, here=2**60))
    assert "Warning: making w8 takes roughly 8.45 GiB of memory, more than the 7.45 GiB that it is to run in" in text
    assert "free on this machine: make it" in flat(replace(found, best=big, here=1))


def test_times_are_those_of_the_recipe_where_it_was_timed() -> None:
    rows = {row["recipe"]: row for row in json.loads((RESULTS / "calibrated.json").read_text())["rows"]}
    from lowbit.measure.expected_loss import MEASURED, ExpectedLoss

    timed = [row for row in MEASURED if row.seconds is not None]
    assert len(timed) == 5
    for row in timed:
        assert row.seconds == rows[row.recipe]["seconds"] and abs(row.stderr - rows[row.recipe]["kl_stderr"]) < 1e-9
        assert quantizing_seconds(PARAMETERS, True, 32, ExpectedLoss(row.kl, row)) == pytest.approx(row.seconds)


def test_nothing_fits_names_what_loses_least_with_less_context(tiny_folder: Float) -> None:
    every = lowbit.recommend(tiny_folder("llama"), PLENTY, 100_000)
    none = lowbit.recommend(
        tiny_folder("llama"), every.smallest.memory.total - every.smallest.memory.cache // 2, 100_000
    )
    better, small = none.choices[0], none.smallest
    assert none.best is None and none.longest_with(better) > 1000 and better is not small
    text = flat(none)
    assert (
        f"With a shorter context, {better.name} loses the least of what fits: add --context {none.longest_with(better)}."
        in text
    )
    assert "too much" in next(line for line in none.text(100).splitlines() if line.split()[:1] == ["recipe"])
    assert not any("-" in cell for row in rows_of(none.text(100)) if row[0] == small.name for cell in row)


def test_w4_that_is_not_listed_is_explained(found: Recommendation) -> None:
    assert "w4" not in {c.name for c in found.choices}
    assert "is not listed: nl4 is as small and loses less" in flat(found)


def test_python_shows_a_line_and_gives_json(found: Recommendation) -> None:
    assert repr(found).startswith("Recommendation(w8 for ") and len(repr(found)) < 200
    assert json.loads(found.to_json()) == json.loads(json.dumps(found.to_dict()))


def test_what_stays_as_it_is_has_no_verdict(packed_folder: Any) -> None:
    kept = lowbit.recommend(str(packed_folder("llama", "w4")), PLENTY).to_dict()["choices"][0]
    assert kept["name"] == "as it is"
    assert kept["verdict"] is None and kept["recipe"] is None and kept["loss_is"] == "none" and kept["kl"] is None
