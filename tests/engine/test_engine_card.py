"""Speed on the card: of what `lowbit generate` runs, which it says; never how fast anything is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import build_model
from transformers import PretrainedConfig
from typer.testing import CliRunner

import lowbit
from lowbit.cli.main import app
from lowbit.engine import fallback
from lowbit.engine.engine import Engine
from lowbit.errors import LowbitError
from lowbit.measure import api, float_model, speed_as_generated, token_times
from lowbit.measure import backends as backends
from lowbit.measure.card import Card, CardParts
from lowbit.measure.interleave import BATCH_PROMPT, SpeedSettings
from lowbit.measure.speed import Rates, Speed, measure_speed
from lowbit.measure.startup import Startup
from lowbit.report.panel import card_lines
from tiny import save_tiny, tiny_tokenizer

FEW = SpeedSettings(prompt=6, new=4, prefill=9, batch=2, batch_length=9, repeats=1)
PEAK = 123 << 20
HOW: dict[str, Any] = {
    "text": ["the cat sat on the mat and a hen ran over the hill " * 20],
    "windows": 1,
    "length": 48,
    "speed": FEW,
}


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """How fresh processes were asked for; none is started."""
    asked: list[Any] = []

    def start(*how: Any) -> Startup:
        asked.append(how)
        return Startup(1.0, 1, 2, PEAK)

    monkeypatch.setattr(backends, "startup", start)
    return asked


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that the engine does not know, in bfloat16, quantized."""
    base = tmp_path_factory.mktemp("card")
    save_tiny("gpt2", base / "float").bfloat16().save_pretrained(base / "float")
    lowbit.quantize(base / "float", "w8", base / "w8")
    return base / "w8"


def test_the_engine_that_generate_runs(packed_folder: Any, float_folder: Any, started: list[Any]) -> None:
    folder = packed_folder("llama-tied", "int4:g32")
    card = lowbit.evaluate(folder, float_folder("llama-tied"), **HOW)
    assert card.speed is not None and card.speed.skipped is None and card.speed.not_engine is None
    assert card.speed.program == str(Engine.open(folder).describe())
    assert card.speed.base_program is not None and card.speed.base_program.startswith("transformers, ")
    assert all(
        r is not None and r.decode > 0 and r.prefill > 0 and r.batch for r in (card.speed.model, card.speed.base)
    )
    assert card.run_peak == PEAK and started == [("engine", {"model": str(folder)})]
    said = dict(card_lines(card))
    assert said["  run by"] == f"{card.speed.program}; the float model by {card.speed.base_program}"
    assert "123 MiB running" in said["peak memory"]
    assert json.loads(card.to_json())["speed"]["program"].startswith("engine (")


def test_a_float_model_is_the_engines_too(float_folder: Any) -> None:
    card = lowbit.evaluate(float_folder("qwen3"), **HOW)
    assert card.speed is not None and card.speed.program is not None and card.speed.program.startswith("engine (")
    assert card.speed.base_program is None and dict(card_lines(card))["  run by"] == card.speed.program


def test_transformers_in_the_type_that_generate_loads(
    gpt2: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fallback, "fast_dtype", lambda: torch.bfloat16)
    card = lowbit.evaluate(gpt2, **HOW)
    assert card.speed is not None and card.speed.program is not None and card.speed.model is not None
    assert card.speed.program == "transformers, bfloat16"
    assert card.speed.not_engine is not None and "models of type 'gpt2'" in card.speed.not_engine
    assert dict(card_lines(card))["  not the engine"] == card.speed.not_engine
    assert started == [("transformers", {"model": str(gpt2), "dtype": "bfloat16"})]


def test_modules_are_run_by_what_their_generate_is(packed_folder: Any) -> None:
    plain = lowbit.evaluate(build_model("llama"), tokenizer=tiny_tokenizer(), **HOW)
    assert plain.speed is not None and plain.speed.program == "transformers, float32" and plain.run_peak is None
    loaded = lowbit.evaluate(lowbit.load(packed_folder("llama", "int4:g32")), tokenizer=tiny_tokenizer(), **HOW)
    assert loaded.speed is not None and loaded.speed.program is not None and loaded.speed.program.startswith("engine (")


def test_compare_runs_each_row_as_generate_would(float_folder: Any) -> None:
    rows = lowbit.compare(float_folder("llama-tied"), ["w8"], **HOW)
    base, row = (r.card.speed for r in rows if r.card is not None)
    assert row is not None and row.program is not None and row.program.startswith("engine (")
    assert base is not None and base.program == row.base_program is not None
    from lowbit.report.tables import markdown_compare

    assert f"speed by {row.program}; float by {base.program}" in markdown_compare(rows)


@pytest.mark.parametrize("kind", [LowbitError, RuntimeError, MemoryError, OSError])
def test_a_failure_to_measure_speed_leaves_the_rest(
    kind: type[Exception], packed_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise kind("no")

    monkeypatch.setattr(speed_as_generated, "measure_speed", fails)
    card = lowbit.evaluate(packed_folder("llama", "int4:g32"), **HOW)
    assert card.quality is not None and card.speed is not None and card.speed.skipped == "no" and card.run_peak is None
    assert dict(card_lines(card))["speed"] == "not measured: no"


def test_a_fresh_process_that_fails_costs_the_memory_alone(
    packed_folder: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> Any:
        raise LowbitError("killed")

    monkeypatch.setattr(backends, "startup", fails)
    card = lowbit.evaluate(packed_folder("llama", "int4:g32"), **HOW)
    assert card.speed is not None and card.speed.model is not None and card.run_peak is None
    assert "memory while running is not measured: killed" in caplog.text


@pytest.mark.parametrize("where", ["quality", "speed"])
def test_quantize_ends_well_when_measuring_does_not(
    where: str, float_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(api if where == "quality" else speed_as_generated, f"measure_{where}", fails)
    asked = [
        "quantize",
        str(float_folder("llama")),
        "w8",
        "-o",
        str(tmp_path / "q"),
        "--windows",
        "1",
        "--card",
        "full",
    ]
    found = CliRunner().invoke(app, asked)
    assert found.exit_code == 0, found.output
    assert "not measured: ZeroDivisionError: a bug" in found.stderr and "Try it:" in found.stdout
    assert (tmp_path / "q" / "config.json").is_file()


def test_engine_times_are_one_for_each_token(float_folder: Any) -> None:
    engine, ids = Engine.open(float_folder("llama")), [5, 6, 7]
    times = token_times.engine_times(engine, ids, 2, 5)
    assert len(times) == 5 and times == sorted(times) and times[0] > 0


def test_each_figure_in_its_faster_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that reads half the bytes in half the time and emulates products in bfloat16."""
    asked: list[tuple[torch.dtype, int]] = []

    def times(model: Any, ids: Any, new: int) -> list[float]:
        half = model.dtype == torch.bfloat16
        asked.append((model.dtype, ids.shape[1]))
        first, each = ids.numel() * (0.5 if half else 0.1), 0.1 if half else 0.2
        return [first + each * i for i in range(new)]

    monkeypatch.setattr(backends, "greedy_times", times)
    model: Any = build_model("llama")
    baseline = float_model.in_faster_types(model.to, FEW)
    assert baseline.name == "transformers, bfloat16 for decode, float32 for prefill and batch"
    asked.clear()
    found = measure_speed(baseline, settings=FEW)
    assert found.model is not None
    assert (found.model.decode, found.model.prefill) == (pytest.approx(1 / 0.1), pytest.approx(1 / 0.1))
    half, whole = torch.bfloat16, torch.float32
    assert asked == 2 * [(half, FEW.prompt), (whole, FEW.prefill), (whole, BATCH_PROMPT)]


def test_a_folder_answers_in_no_type_that_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    half, whole = PretrainedConfig(dtype=torch.bfloat16), PretrainedConfig(dtype=torch.float32)
    monkeypatch.setattr(fallback, "fast_dtype", lambda: torch.float32)
    assert fallback.answering_type(half) == fallback.answering_type(whole) == torch.float32
    monkeypatch.setattr(fallback, "fast_dtype", lambda: torch.bfloat16)
    assert (fallback.answering_type(half), fallback.answering_type(whole)) == (torch.bfloat16, torch.float32)


def test_slower_than_the_float_model_is_said_with_the_way_out() -> None:
    rates = Rates(10.0, 10.0), Rates(9.0, 12.0)
    slow = Speed(FEW, *rates, program="engine (avx2, 2 threads)", base_program="transformers, float32")
    said = dict(card_lines(Card(CardParts("m", "w4"), speed=slow)))
    assert said["prefill"] == "10.0 tokens/s, 0.83 x the float model  (reading the prompt)"
    assert said["  slower"].startswith("the float model is faster at prefill here; --activations int8")
    other = replace(slow, program="transformers, float32", not_engine="no")
    assert "what is saved is memory" in dict(card_lines(Card(CardParts("m", "w4"), speed=other)))["  slower"]
    assert "  slower" not in dict(card_lines(Card(CardParts("m", "w4"), speed=replace(slow, base=rates[0]))))
