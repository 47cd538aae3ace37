"""Which effort a run makes where nobody says, and what it refuses. The forecast is made up: what is tested is the choice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lowbit
from lowbit.calibration.package_text import BUILTIN
from lowbit.errors import RecipeError, SourceError, TextError
from lowbit.pipeline.choosing import decided
from lowbit.pipeline.effort import CHOICES, EFFORTS, HIGH, LOW, MEDIUM, NONE, PATIENCE, Decision, decide
from lowbit.pipeline.options import Options
from lowbit.recipes.recipe import Recipe
from lowbit.report.effort_view import decision_lines
from tiny import save_tiny

W4 = Recipe.parse("w4")
SOLVED = W4.calibrated()


def takes(second_of: float) -> object:
    """A forecast: so many seconds for each window, ten times as many where a solver works."""
    return lambda recipe, samples: 1 + second_of * samples * (10 if recipe == SOLVED else 1)


def test_the_best_effort_that_is_soon_done_is_taken() -> None:
    quick = decide(W4, "auto", forecast=takes(0.1))
    assert (quick.effort, quick.recipe, quick.calibration, quick.samples) == (MEDIUM, SOLVED, BUILTIN, MEDIUM.samples)
    assert quick.seconds == pytest.approx(13) and quick.longer is None
    slower = decide(W4, "auto", forecast=takes(10))
    assert (slower.effort, slower.recipe, slower.samples) == (LOW, W4, LOW.samples)
    assert slower.longer is not None and slower.longer[0] is MEDIUM and slower.longer[1] > PATIENCE
    slowest = decide(W4, "auto", forecast=takes(1000))
    assert (slowest.effort, slowest.recipe, slowest.calibration) == (NONE, W4, None)
    assert slowest.longer is not None and slowest.longer[0] is MEDIUM  # the best of what was not taken


def test_a_model_that_cannot_be_calibrated_is_quantized_without_text_and_it_is_said_why() -> None:
    assert decide(W4, "auto", why_not=lambda: "it writes no text").reason == "it writes no text"

    def fails(recipe: Recipe, samples: int) -> float:
        if samples:
            raise SourceError("it cannot be run over text here")
        return 1.0

    found = decide(W4, "auto", forecast=fails)
    assert found.effort is NONE and found.reason == "it cannot be run over text here" and found.calibration is None
    with pytest.raises(TextError, match="writes no text"):
        decide(W4, "low", why_not=lambda: "it writes no text")


@pytest.mark.parametrize("name", EFFORTS)
def test_an_effort_that_is_named_is_taken_whatever_it_costs(name: str) -> None:
    found, effort = decide(W4, name, forecast=takes(1000)), EFFORTS[name]
    assert found.effort is effort
    assert found.recipe == (SOLVED if effort.solver else W4)
    assert (found.calibration, found.samples) == ((BUILTIN, effort.samples) if effort.samples else (None, None))


def test_efforts_grow() -> None:
    assert tuple(EFFORTS) == CHOICES[1:]
    assert NONE.samples < LOW.samples < MEDIUM.samples < HIGH.samples


def test_a_recipe_that_is_spelled_out_does_what_it_says() -> None:
    spelled = Recipe.parse("search@int4:g32")
    assert decide(spelled, "auto") == Decision(spelled)
    assert decide(spelled, "medium").calibration == BUILTIN  # asked for
    gptq = Recipe.parse("gptq@int4:g32")
    assert decide(gptq, "auto").calibration == BUILTIN  # it cannot do without
    with pytest.raises(RecipeError, match="cannot do without"):
        decide(gptq, "none")
    with pytest.raises(RecipeError, match="would be ignored"):
        decide(Recipe.parse("absmax@int8:channel"), "medium")


def test_text_that_is_given_is_used_and_never_with_no_effort() -> None:
    assert decide(W4, "auto", calibration="my.txt") == Decision(SOLVED, "my.txt")
    assert decide(W4, "low", calibration="my.txt").recipe == W4
    assert decide(W4, "high", calibration="my.txt").samples == HIGH.samples
    assert decide(W4, "high", calibration="my.txt", samples=3).samples == 3
    with pytest.raises(RecipeError, match="would be ignored"):
        decide(W4, "none", calibration="my.txt")
    with pytest.raises(RecipeError, match="unknown"):
        decide(W4, "most")


@pytest.mark.parametrize("given", [{"samples": 4}, {"length": 64}, {"chat": True}])
def test_options_of_a_text_that_is_not_taken_are_refused(model: Path, given: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=f"{next(iter(given))}.* would be ignored"):
        lowbit.quantize(model, "w4", effort="none", **given)  # type: ignore[arg-type]


def test_what_is_printed_before_the_work() -> None:
    lines = decision_lines(decide(W4, "auto", forecast=takes(0.1)))
    assert lines == [
        "Takes about 13 s here, calibrated on 12 windows of the text that comes with lowbit; --calibration FILE takes your own text, "
        "--data-free none."
    ]
    said = " ".join(decision_lines(decide(W4, "auto", forecast=takes(10))))
    assert "With --effort medium it would lose less, and take about 20 min." in said
    assert decision_lines(decide(W4, "none", forecast=takes(0.1))) == ["Takes about 1 s here."]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("effort") / "model"
    save_tiny("llama", folder)
    return folder


def manifest(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "lowbit.json").read_text())
    return found


def test_a_name_is_calibrated_and_data_free_is_the_recipe_without_text(model: Path, tmp_path: Path) -> None:
    lowbit.quantize(model, "w4", tmp_path / "auto")
    auto = manifest(tmp_path / "auto")
    assert auto["recipe"] == {"name": "w4", "text": str(SOLVED)}
    assert auto["calibration"]["windows"] == MEDIUM.samples  # type: ignore[index]
    lowbit.quantize(model, "w4", tmp_path / "free", effort="none")
    lowbit.quantize(model, "search@int4:g32", tmp_path / "spelled")
    assert "calibration" not in manifest(tmp_path / "free")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("free", "spelled", "auto")]
    assert weights[0] == weights[1] != weights[2]


def test_the_same_command_meets_a_finished_run_with_the_effort_that_it_had(model: Path, tmp_path: Path) -> None:
    """However fast the machine is by now."""
    lowbit.quantize(model, "w4", tmp_path / "out", effort="low")
    assert decided(model, W4, "auto", Options(), tmp_path / "out").effort is LOW
    assert decided(model, W4, "auto", Options(overwrite=True), tmp_path / "out").effort is MEDIUM
    lowbit.quantize(model, "w4", tmp_path / "free", effort="none")  # was asked for: not what the name alone means
    assert decided(model, W4, "auto", Options(), tmp_path / "free").effort is MEDIUM
    before = (tmp_path / "out" / "lowbit.json").stat().st_mtime_ns
    lowbit.quantize(model, "w4", tmp_path / "out")
    assert (tmp_path / "out" / "lowbit.json").stat().st_mtime_ns == before


def test_a_model_without_a_tokenizer_is_quantized_without_text(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model", tokenizer=False)
    found = decided(tmp_path / "model", W4, "auto", Options())
    assert found.effort is NONE and "tokenizer" in found.reason
    lowbit.quantize(tmp_path / "model", "w4", tmp_path / "out")
    assert "calibration" not in manifest(tmp_path / "out")
