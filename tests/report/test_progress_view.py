"""How far a long call is, as people see it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lowbit.interchange.pace import Stage, Stages, Tracker
from lowbit.interchange.progress import Step
from lowbit.report.progress_view import EVERY, Lines, Shown, drawn, duration_text, elapsed_text, line_text, moving_lines


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (59, "59 s"), (59.7, "1 min"), (200, "3 min"), (5000, "1 h 23 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "1 s"), (61, "1 min 1 s"), (71, "1 min 11 s"), (599.9, "10 min")])
def test_what_is_over_has_seconds_up_to_ten_minutes(seconds: float, text: str) -> None:
    assert elapsed_text(seconds) == text


def test_one_step_of_several_says_what_is_of_it_and_what_of_all() -> None:
    step = Step("w4 (recipe 1 of 2): measuring", 16, 32, "windows", 4900.0, True, one_of=4)
    said = "step 16/32 windows; all: 1 min 11 s so far, at least 1 h 22 min left"
    assert line_text(step, 71) == f"{step.what}: {said}"
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    console.print(moving_lines(step, 4000))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[1].rstrip().endswith("all: 1 h 7 min so far, at least 1 h 22 min left") and "…" not in lines[1]
    told: list[Step] = []
    stages = [Stage("a", ("a",), 8, "windows"), Stage("b", ("b",), 8, "windows")]
    Stages(stages, told.append).begin(stages[0])
    assert told[-1].one_of == 2


def test_a_line_says_what_is_at_work_and_how_far() -> None:
    step = Step("quantizing", 45 * 2**20, 134 * 2**20, "bytes", 61.0, note="layers.0.mlp")
    assert line_text(step, 30) == "quantizing: 45 of 134 MiB, 30 s so far, about 1 min left; layers.0.mlp"
    assert line_text(Step("quantizing", 0, 9, "%", note="embed"), 70) == "quantizing: 0 %, 1 min 10 s so far; embed"
    assert line_text(Step("a"), 120) == "a: 2 min so far" and line_text(Step("a"), 119.6) == "a: 2 min so far"
    assert line_text(Step("loading"), 3) == "loading: 3 s so far"
    assert line_text(Step("a", 3, 8, "windows", 9.0, True), 1) == "a: 3/8 windows, 1 s so far, at least 9 s left"


def test_the_moving_lines_fit_a_terminal() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    console.print(moving_lines(Step("awq+gptq@int4:g64 (recipe 3 of 8): measuring", 3, 8, "windows", 90.0), 4000))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0] == "awq+gptq@int4:g64 (recipe 3 of 8): measuring"
    assert lines[1].rstrip().endswith("3/8 windows, 1 h 7 min so far, about 2 min left") and len(lines) == 2


def test_without_a_terminal_there_is_a_line_at_once_and_one_now_and_then() -> None:
    now, said = [0.0], list[str]()
    tracker = Tracker("quantizing", "bytes", lambda: now[0])
    lines = Lines(tracker, said.append, lambda: now[0])
    lines.tick()
    assert said == []  # nothing has begun: an error of what was asked for stands alone
    waiting = Lines(tracker, (late := list[str]()).append, lambda: now[0])
    now[0] = EVERY
    waiting.tick()
    assert late == ["quantizing"]  # but not for long
    now[0] = 0.0
    lines.begin()
    for second in range(1, 36):
        now[0] = second
        tracker.move(second, 70)
        lines.tick()
    assert said[0] == "quantizing" and len(said) == 1 + int(35 / EVERY)
    assert said[-1] == "quantizing: 30 of 70 B, 30 s so far, about 40 s left"


def test_the_first_plain_line_names_what_is_at_work() -> None:
    tracker, said = Tracker("quantizing", "%"), list[str]()
    lines = Lines(tracker, said.append)
    Shown(tracker, lines, said.append).move(0, 70, "model.embed_tokens.weight")
    assert said == ["quantizing; model.embed_tokens.weight"]


def test_rows_stand_above_a_bar_which_goes_away() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with drawn(Tracker("comparing"), console, lambda line: None) as shown:
        shown.show(Step("w4: measuring", 1, 2, "windows", 5.0))
        shown.keep("w8: [done]")
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "w8: [done]" in text and text.endswith("\x1b[2K")
