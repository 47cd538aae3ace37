"""The time left that long work tells, by a clock that the test moves."""

from __future__ import annotations

import pytest

from lowbit.interchange.pace import Pace, Stage, Stages, Tracker
from lowbit.interchange.progress import Step


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_even_work_counts_down(clock: FakeClock) -> None:
    pace = Pace(clock)
    assert pace.left(10) is None  # nothing is done yet, so nothing is claimed
    for done in range(1, 10):
        clock.now += 5
        pace.report(done)
        assert pace.left(10) == pytest.approx(5 * (10 - done))
    clock.now += 2
    assert pace.left(10) == pytest.approx(3)  # between reports too
    pace.report(10)
    assert pace.left(10) == 0


def test_what_is_slower_than_it_was_is_told(clock: FakeClock) -> None:
    pace = Pace(clock)
    clock.now += 1
    pace.report(1)
    clock.now += 99  # the second takes far longer than the first
    assert pace.left(3) == pytest.approx(200)


def test_what_was_done_before_counts_for_nothing(clock: FakeClock) -> None:
    pace = Pace(clock)
    pace.report(900)  # a run that goes on: a report without anything new says so
    pace.report(900)
    assert pace.left(1000) is None
    clock.now += 10
    pace.report(910)
    assert pace.left(1000) == pytest.approx(90)


def test_a_second_pass_begins_from_nothing(clock: FakeClock) -> None:
    pace = Pace(clock)
    clock.now += 1
    pace.report(100)
    pace.report(0)
    clock.now += 10
    pace.report(50)
    assert pace.left(100) == pytest.approx(10)


def test_the_last_minute_is_what_counts(clock: FakeClock) -> None:
    pace = Pace(clock)
    for done in range(1, 101):
        clock.now += 1
        pace.report(done)
    for done in range(101, 121):
        clock.now += 10  # ten times slower from here on
        pace.report(done)
    assert pace.left(130) == pytest.approx(100, rel=0.1)


def test_a_tracker_says_what_begins_and_that_more_may_come(clock: FakeClock) -> None:
    tracker = Tracker("", clock=clock)
    assert not tracker.begun
    tracker.say("measuring quality")
    clock.now += 4
    tracker.move(1, 4)
    assert tracker.now() == Step("measuring quality", 1, 4, seconds_left=pytest.approx(12), at_least=True)
    tracker.say("measuring speed")
    assert tracker.now() == Step("measuring speed", at_least=True)


def test_a_step_from_outside_counts_down_and_promises_nothing_when_it_is_late(clock: FakeClock) -> None:
    tracker = Tracker("comparing", clock=clock)
    tracker.show(Step("w4: quantizing", 1, 8, "recipes", 30.0))
    clock.now += 10
    assert tracker.now().seconds_left == pytest.approx(20)
    clock.now += 21
    assert tracker.now().seconds_left is None


def test_stages_learn_what_their_kind_costs(clock: FakeClock) -> None:
    shown: list[Step] = []
    quantize = [Stage(f"{name}: quantizing", ("without text",), unit="%") for name in "ab"]
    measure = [Stage(f"{name}: measuring", ("windows",), 4, "windows") for name in "ab"]
    stages = Stages([quantize[0], measure[0], quantize[1], measure[1]], shown.append, clock)
    stages.begin(quantize[0])
    assert shown[-1] == Step("a: quantizing", unit="%")  # nothing is known, and nothing is claimed
    clock.now += 10
    stages.move(50, 100)
    # 10 s of this and 20 s of its like; of measuring nothing is known.
    assert (shown[-1].seconds_left, shown[-1].at_least) == (pytest.approx(30), True)
    clock.now += 10
    stages.begin(measure[0])
    clock.now += 3
    stages.move(1, 4)
    # Three windows here, 20 s for quantizing b, and four windows of b.
    assert shown[-1] == Step("a: measuring", 1, 4, "windows", pytest.approx(9 + 20 + 12), False)
    stages.drop()  # it failed: nothing is learned, and the next begins
    stages.begin(quantize[1])
    clock.now += 5
    assert stages.left() == (pytest.approx(15), True)
