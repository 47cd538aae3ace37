"""A process that forks takes an engine into its child, where the engine's threads are not."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread

import pytest
from engine_models import tokens

from lowbit import Engine

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork"),
    pytest.mark.filterwarnings("ignore:.*fork.*"),
]
SECONDS = 30.0


def in_child(work: Callable[[], bool]) -> bool | None:
    """What `work` gives in a child of this process, None when it does not end."""
    child = os.fork()
    if child == 0:
        good = False
        try:
            good = work()
        finally:
            os._exit(0 if good else 1)
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_child_generates_as_its_parent_does_and_both_go_on(float_folder: Callable[[str], Path], threads: int) -> None:
    engine, prompts = Engine.open(float_folder("llama"), threads=threads), [tokens(40), tokens(7, seed=1)]

    def answers() -> list[list[int]]:
        return [r.tokens for r in engine.generate(prompts, max_new_tokens=8)]

    right = answers()
    time.sleep(0.02)  # its threads sleep now
    assert in_child(lambda: answers() == right and in_child(lambda: answers() == right) is True) is True
    assert answers() == right


def test_a_child_can_let_go_of_an_engine(float_folder: Callable[[str], Path]) -> None:
    engines = [Engine.open(float_folder("llama"), threads=3)]
    engines[0].generate([5, 6, 7], max_new_tokens=2)
    time.sleep(0.02)

    def release() -> bool:
        engines.clear()
        gc.collect()
        return True

    assert in_child(release) is True


@pytest.mark.parametrize("threads", [1, 3])
def test_a_child_of_a_process_whose_other_thread_generates_has_an_engine_that_works(
    float_folder: Callable[[str], Path], threads: int
) -> None:
    """Whatever that thread held and was about to change when the process forked, the child begins anew."""
    engine, prompt, over = Engine.open(float_folder("llama"), threads=threads), tokens(40), Event()
    right = engine.generate(prompt, max_new_tokens=6).tokens

    def generate() -> None:
        while not over.is_set():
            engine.generate([prompt] * 3, max_new_tokens=20)

    other = Thread(target=generate)
    other.start()
    try:
        for _ in range(12):
            time.sleep(0.003)  # other moments of what that thread does
            assert in_child(lambda: engine.generate(prompt, max_new_tokens=6).tokens == right) is True
    finally:
        over.set()
        other.join()
    assert engine.generate(prompt, max_new_tokens=6).tokens == right
