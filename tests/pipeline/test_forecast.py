"""The forecast of time: laws that carry small pieces over to a whole run, and a rehearsal that stays small and leaves nothing behind."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import lowbit
from lowbit.errors import LowbitError, RecipeError, SourceError
from lowbit.interchange.opening import open_source
from lowbit.interchange.source import Source
from lowbit.pipeline import block_rehearsal, rehearsal
from lowbit.pipeline.block_timing import Unshared
from lowbit.pipeline.forecast import (
    Alone,
    BlockRates,
    Bytes,
    Forecast,
    Rates,
    SolverRates,
    Stream,
    how_of,
    kind_of,
)  # fmt: skip
from lowbit.pipeline.rehearsal import rehearse
from lowbit.planning.plan import Plan, make_plan
from lowbit.recipes.recipe import Recipe

LOW = Recipe.of("w4")
SOLVED = LOW.calibrated()
ALWAYS = {"starting", "reading", "solving", "writing", "verifying"}
TEXT = ALWAYS | {"float model", "quantized model", "statistics"}


def opened(folder: Path) -> tuple[Plan, Source]:
    source = open_source(folder)
    return make_plan(source, LOW), source


def by_hand(plan: Plan, names: list[tuple[str, tuple[str, ...]]], problem: str = "", processors: int = 1) -> Rates:
    """Round numbers: a second a byte read, 10 an element, 100 a token, and so on."""
    tensors = {t.name: t for t in plan.tensors}
    name, own = names[0]
    group = tuple(n.removeprefix(f"{name}.") for n in own if tensors[n].is_multiplied)
    formats = {str(t.format): t.format for t in plan.tensors if t.format is not None}.values()
    alone = {how_of(r, fmt, False): Alone(0.0, 10.0) for fmt in formats for r in (LOW, SOLVED)}
    widths = {t.out_in[-1] for t in plan.tensors if t.is_multiplied}
    solvers = {
        (how_of(r, fmt, True), w): SolverRates(w, 5.0, 2.0) for fmt in formats for r in (LOW, SOLVED) for w in widths
    }
    kind = BlockRates(
        (group,), Stream(100.0, 1.0), Stream(200.0, 1.0), Stream(300.0, 1.0), {False: 7.0, True: 9.0}, 0.0
    )
    kinds = {kind_of(name, [tensors[n] for n in own]): kind}
    return Rates(Bytes(1.0, 0.0, 0.0, 1.0, 1.0), 1, processors, 3.0, 4.0, alone, names, kinds, solvers, problem)


@pytest.fixture
def hand(tiny_folder: Callable[[str], Path]) -> tuple[Plan, Rates]:
    plan, _ = opened(tiny_folder("llama"))
    names = [
        (f"model.layers.{i}", tuple(t.name for t in plan.tensors if t.name.startswith(f"model.layers.{i}.")))
        for i in range(2)
    ]
    return plan, by_hand(plan, names)


def test_phases_without_text(hand: tuple[Plan, Rates]) -> None:
    plan, rates = hand
    found = rates.seconds(plan, LOW)
    assert set(found.phases) == ALWAYS
    assert found.seconds == pytest.approx(sum(found.phases.values()))
    assert found.phases["reading"] == plan.bytes_before
    assert found.phases["solving"] == 10 * sum(t.count for t in plan.tensors if t.format is not None)
    assert found.phases["writing"] == found.phases["verifying"] == plan.bytes_after


def test_reading_beside_the_work_costs_what_takes_longest(hand: tuple[Plan, Rates]) -> None:
    plan, _ = hand
    names = [("model.layers.0", tuple(t.name for t in plan.tensors if t.name.startswith("model.layers.0.")))]
    alone, beside = (by_hand(plan, names, processors=n).seconds(plan, LOW).phases for n in (1, 8))
    together = ("reading", "solving", "writing")
    assert sum(beside[p] for p in together) == pytest.approx(max(alone[p] for p in together))


def test_phases_over_text(hand: tuple[Plan, Rates]) -> None:
    plan, rates = hand
    found = rates.seconds(plan, SOLVED, 2048, 1024)
    assert set(found.phases) == TEXT
    assert found.phases["statistics"] == 2 * 2048 * 9.0
    assert found.phases["float model"] == 2 * 2048 * (200 + 1024)
    # One more forward of each block finds which weights share an input.
    assert found.phases["quantized model"] == 2 * (2048 * (300 + 1024) + 1024 * (100 + 1024))
    weighed = rates.seconds(plan, LOW, 2048, 1024)
    assert weighed.phases["float model"] == 0 and weighed.phases["statistics"] == 2 * 2048 * 7.0


@pytest.mark.parametrize("recipe", [LOW, SOLVED])
def test_more_text_and_longer_windows_take_longer(hand: tuple[Plan, Rates], recipe: Recipe) -> None:
    plan, rates = hand
    by_tokens = [rates.seconds(plan, recipe, n, 64).seconds for n in (64, 128, 4096)]
    by_length = [rates.seconds(plan, recipe, 4096, n).seconds for n in (64, 128, 4096)]
    assert by_tokens == sorted(by_tokens) and by_length == sorted(by_length) and by_length[0] < by_length[-1]


def test_solver_grows_with_rows_and_width() -> None:
    rates = SolverRates(width=100, once=8.0, row=1.0, row_squared=0.5)
    assert rates.seconds(10, 100) == 18
    assert rates.seconds(20, 100) == 28
    assert rates.seconds(10, 200) == 8 * 8 + 10 * (0.5 * 4 + 0.5 * 2)
    assert SolverRates(width=100, once=8.0, row=0.0, once_cubed=0.25).seconds(1, 200) == 8 * (0.25 * 8 + 0.75 * 4)


def test_what_is_counted_in_forwards_is_a_phase(hand: tuple[Plan, Rates]) -> None:
    plan, rates = hand
    assert "tuning" not in rates.seconds(plan, SOLVED, 1024, 64).phases
    for text in ("qronos+reconstruct(steps=3)@int4:g32", "qronos+distill(steps=3)@int4:g32", "guided+qronos@int4:g32"):
        assert rates.seconds(plan, Recipe.parse(text), 1024, 64).phases["tuning"] > 0


def test_a_model_that_cannot_be_calibrated_is_reported(hand: tuple[Plan, Rates]) -> None:
    plan, _ = hand
    rates = by_hand(plan, [("model.layers.0", tuple(t.name for t in plan.tensors))], "the model reads pictures")
    assert rates.seconds(plan, LOW).seconds > 0
    with pytest.raises(SourceError, match="reads pictures"):
        rates.seconds(plan, SOLVED, 1024)


def test_a_recipe_that_was_not_rehearsed_is_an_error(hand: tuple[Plan, Rates]) -> None:
    plan, rates = hand
    with pytest.raises(RecipeError, match="not rehearsed"):
        rates.seconds(plan, Recipe.parse("hqq@uint4:g32:zero=fp16"))


class Ticks:
    """A clock on which every look is one second later."""

    def __init__(self) -> None:
        self.looks = itertools.count()

    def __call__(self) -> float:
        return float(next(self.looks))


def test_a_clock_that_other_programs_hardly_touch() -> None:
    wall, processors = iter([0.0, 8.0, 9.0, 12.0]), iter([5.0, 7.0, 9.0, 9.0])
    clock = Unshared(lambda: next(wall), lambda: next(processors))
    assert [clock() for _ in range(3)] == [2.0, 3.0, 3.0]  # shared with others; two threads alone; asleep


def test_a_busy_machine_does_not_change_what_computing_is_forecast_to_take(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, source = opened(tiny_folder("llama"))
    alone = rehearse(plan, source, [LOW, SOLVED]).seconds(plan, SOLVED, 1 << 20, 64).phases
    wall = time.perf_counter
    monkeypatch.setattr(rehearsal, "Unshared", lambda: Unshared(lambda: 100 * wall()))
    busy = rehearse(plan, source, [LOW, SOLVED]).seconds(plan, SOLVED, 1 << 20, 64).phases
    for phase in ("float model", "quantized model", "statistics"):
        assert busy[phase] < 20 * alone[phase]


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral", "t5", "mamba"])
def test_rehearsal_of_an_architecture(name: str, tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    plan, source = opened(tiny_folder(name))
    rates = rehearse(plan, source, [LOW, SOLVED], near=tmp_path / "out")
    assert rates.problem == "" and rates.kinds
    assert list(tmp_path.iterdir()) == []
    for recipe, phases in ((LOW, TEXT - {"float model"}), (SOLVED, TEXT)):
        found = rates.seconds(plan, recipe, 512, 64)
        assert all(found.phases[phase] > 0 for phase in phases)
        assert found.seconds > rates.seconds(plan, LOW).seconds > 0


def test_without_recipes_it_is_the_plans_own_with_and_without_text(tiny_folder: Callable[[str], Path]) -> None:
    plan, source = opened(tiny_folder("llama"))
    rates = rehearse(plan, source)
    assert rates.seconds(plan, SOLVED, 512, 64).seconds > rates.seconds(plan, LOW).seconds > 0


def test_rehearsal_does_the_same_work_each_time(tiny_folder: Callable[[str], Path]) -> None:
    plan, source = opened(tiny_folder("llama"))
    found = [rehearse(plan, source, [LOW, SOLVED], clock=Ticks()) for _ in range(2)]
    assert found[0] == found[1]


def test_rehearsal_reads_and_runs_no_more_than_it_says(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, source = opened(tiny_folder("llama"))
    monkeypatch.setattr(rehearsal, "_READ", 4096)
    monkeypatch.setattr(block_rehearsal, "_WIDTH", 32)
    monkeypatch.setattr(block_rehearsal, "_TABLE", 1)
    read: list[str] = []
    whole = source.read
    monkeypatch.setattr(source, "read", lambda name: (read.append(name), whole(name))[1])
    rates = rehearse(plan, source, [LOW, SOLVED], text=False)
    assert len(read) <= 2 and not rates.kinds
    read.clear()
    rates = rehearse(plan, source, [LOW, SOLVED])
    assert not any("embed" in name or "layers.1." in name for name in read)  # the first block stands for the second
    assert {r.width for r in rates.solvers.values()} == {32}
    assert rates.seconds(plan, SOLVED, 512, 64).seconds > 0


def test_fewer_tokens_of_large_blocks(tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    plan, source = opened(tiny_folder("llama"))
    lengths: list[int] = []
    made = block_rehearsal.made_up_ids
    monkeypatch.setattr(
        block_rehearsal, "made_up_ids", lambda config, tokens: (lengths.append(tokens), made(config, tokens))[1]
    )
    rehearse(plan, source, [SOLVED])
    monkeypatch.setattr(block_rehearsal, "_FLOPS", 1)
    rehearse(plan, source, [SOLVED])
    positions = source.config.max_position_embeddings  # type: ignore[union-attr]
    assert lengths == [min(positions, 1024), 32]


def test_a_weight_is_not_encoded_longer_than_it_takes_to_know(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, source = opened(tiny_folder("llama"))
    counts: list[int] = []
    monkeypatch.setattr(rehearsal, "solve", lambda piece, weight, recipe: counts.append(weight.numel()))
    monkeypatch.setattr(rehearsal, "_FEWEST", 64)
    rehearse(plan, source, [LOW], text=False, clock=Ticks())  # a second each
    assert max(counts) <= 64


def test_a_module_without_a_config_is_quantized_without_text(tmp_path: Path) -> None:
    source = open_source(nn.Sequential(nn.Linear(64, 64)))
    plan = make_plan(source, LOW)
    rates = rehearse(plan, source, [LOW, SOLVED], near=tmp_path)
    assert "no transformers config" in rates.problem
    assert rates.seconds(plan, LOW).seconds > 0
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_models_own_is_a_sentence(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan, source = opened(tiny_folder("llama"))

    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("shapes do not fit\nand more")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fails)
    rates = rehearse(plan, source, [SOLVED], near=tmp_path)
    assert rates.problem.endswith("cannot be run over text here (RuntimeError: shapes do not fit)")
    with pytest.raises(LowbitError, match="cannot be run over text"):
        rates.seconds(plan, SOLVED, 1024)
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan, source = opened(tiny_folder("llama"))

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(block_rehearsal, "solve_group", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rehearse(plan, source, [SOLVED], near=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_where_the_output_cannot_be_written_the_trial_goes_elsewhere(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan, source = opened(tiny_folder("llama"))
    monkeypatch.setattr(rehearsal.os, "access", lambda path, mode: False)
    assert rehearse(plan, source, [LOW], near=tmp_path / "a" / "b").seconds(plan, LOW).seconds > 0
    assert list(tmp_path.iterdir()) == []


def test_the_time_of_a_run_in_its_order_of_magnitude(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """By the seconds of the processor, on a model whose time is nearly all calls of Python; models of some size are nearer."""
    plan, source = opened(tiny_folder("llama"))
    ids = [torch.randint(0, 128, (64,), generator=torch.Generator().manual_seed(i)) for i in range(16)]
    lowbit.quantize(tiny_folder("llama"), "w4", tmp_path / "warm", calibration=ids)
    expected: Forecast = rehearse(plan, source, [LOW, SOLVED], clock=time.process_time).seconds(plan, SOLVED, 1024, 64)
    start = time.process_time()
    lowbit.quantize(tiny_folder("llama"), "w4", tmp_path / "out", calibration=ids)
    taken = time.process_time() - start
    assert taken / 10 < expected.seconds < taken * 10
