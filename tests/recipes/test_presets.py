"""What is said of presets: in plain sentences, and true by what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lowbit.recipes.presets import GROUPS, PRESETS
from lowbit.recipes.recipe import Recipe

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture(scope="module")
def kl() -> dict[str, float]:
    """By recipe, the mean KL of the run that measured every preset."""
    rows = json.loads((RESULTS / "presets.json").read_text("utf-8"))
    return {row["recipe"]: row["kl"] for row in rows}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_what_it_is_and_when_to_take_it(name: str) -> None:
    preset = PRESETS[name]
    assert preset.group in GROUPS
    assert preset.when.startswith(("Start with", "Take ")) and preset.when.endswith(".") and "\n" not in preset.when
    assert "bit" in preset.about and not preset.about.endswith(".")
    for text in (preset.about, preset.when):
        assert not set("^{}") & set(text) and "argmin" not in text and "E|" not in text


@pytest.mark.parametrize("name", PRESETS)
def test_the_bits_that_are_said_are_those_that_are_stored(name: str) -> None:
    said = float(re.search(r"([\d.]+)[ -]bit", PRESETS[name].about)[1])  # type: ignore[index]
    if PRESETS[name].about.startswith("4-bit floats"):
        said = float(re.search(r": ([\d.]+) bits", PRESETS[name].about)[1])  # type: ignore[index]
    stored = Recipe.parse(name).format.bits_per_weight((4096, 4096))
    assert stored == pytest.approx(said, abs=0.1)


def test_every_group_has_presets_in_order() -> None:
    groups = list(dict.fromkeys(p.group for p in PRESETS.values()))
    assert tuple(groups) == GROUPS


def test_what_is_said_of_losses_was_measured(kl: dict[str, float]) -> None:
    for name in ("w8", "per-channel", "zeroquant", "simquant"):
        assert kl[name] < 0.005, f"{name} is said not to be told from the original"
    for name in ("groupwise", "mxfp4", "w3", "w2"):
        assert kl[name] > 0.3, f"{name} is said to damage a small model without text"
    assert 0.7 < kl["nl4"] / kl["w4"] < 0.85
    assert kl["w4"] < kl["hqq"] and kl["per-channel"] < kl["fp8"] < 0.05
    assert kl["nf4"] == pytest.approx(kl["w4"], rel=0.1) and kl["nvfp4"] == pytest.approx(kl["w4"], rel=0.1)
    assert 25 < kl["absmax"] / kl["w8"] < 40 and kl["zeropoint"] / kl["w8"] > 20
    assert kl["symmetric"] == pytest.approx(kl["absmax"], rel=0.05) and kl["linear"] == pytest.approx(
        kl["zeropoint"], rel=1e-4
    )
    assert kl["minmax"] == pytest.approx(kl["zeropoint"], rel=0.05)
    assert 10 * kl["per-channel"] < kl["blockwise"] < kl["absmax"]
    assert kl["nl4"] / kl["kmeans"] == pytest.approx(2 / 3, abs=0.05)


def test_what_is_said_of_calibration_was_measured() -> None:
    rows = {row["recipe"]: row["kl"] for row in json.loads((RESULTS / "calibrated.json").read_text("utf-8"))["rows"]}
    without = {row["recipe"]: row["kl"] for row in json.loads((RESULTS / "targets.json").read_text("utf-8"))}
    assert rows["w4"] / without["w4"] == pytest.approx(0.25, abs=0.03)
    assert rows["nl4"] / rows["w4"] == pytest.approx(0.75, abs=0.05)
    assert rows["w8a8"] < 0.05
