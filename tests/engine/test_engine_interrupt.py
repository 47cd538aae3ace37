"""Ctrl-C while the C++ part runs: it ends there and then, and what comes after is as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from lowbit import Engine
from lowbit.engine.generation import Sampling
from tiny import tiny_tokenizer

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the system has no timers that signal")
VOCABULARY, POSITIONS = 128, 4096
LONG = [3 + i * 7 % 90 for i in range(4000)]  # a second or so of work
UNTOUCHED = -7.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model large enough for its forwards to be interrupted."""
    path = tmp_path_factory.mktemp("interrupt") / "model"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=POSITIONS, initializer_range=0.1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@contextmanager
def ringing(handler: Any, every: float = 0.06) -> Iterator[None]:
    """`handler` is what a signal calls, after so many seconds and again and again."""
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, every, every)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def ctrl_c(*_: Any) -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)
    raise KeyboardInterrupt


@pytest.mark.parametrize("threads", [1, 2])
def test_a_forward_ends_before_its_logits_and_the_next_is_as_ever(folder: Path, threads: int) -> None:
    engine = Engine.open(folder, threads=threads)
    right = engine.generate(LONG[:700], max_new_tokens=20).tokens
    cache = engine.kv_cache(1, POSITIONS)
    known = engine.forward(cache, [(0, LONG[:64], 0)], [0]).copy()
    with pytest.raises(KeyboardInterrupt), ringing(ctrl_c):
        while True:  # once, unless the machine is very fast
            cache.logits(1, VOCABULARY)[:] = UNTOUCHED
            engine.forward(cache, [(0, LONG[64:], 64)], [0])
    assert (cache.logits(1, VOCABULARY) == UNTOUCHED).all()
    # What was in the cache before is still there, and the tokens that were interrupted can be run again.
    again = engine.forward(cache, [(0, LONG[64:200], 64)], [0])
    fresh = engine.kv_cache(1, 200)
    engine.forward(fresh, [(0, LONG[:64], 0)], [])
    np.testing.assert_array_equal(again, engine.forward(fresh, [(0, LONG[64:200], 64)], [0]))
    np.testing.assert_array_equal(engine.forward(engine.kv_cache(1, 64), [(0, LONG[:64], 0)], [0]), known)
    assert engine.generate(LONG[:700], max_new_tokens=20).tokens == right


def test_a_handler_that_returns_is_run_and_changes_nothing(folder: Path) -> None:
    engine, rung = Engine.open(folder), list[int]()
    ids = LONG[:2500]
    right = engine.forward(engine.kv_cache(1, POSITIONS), [(0, ids, 0)], [0]).copy()
    with ringing(lambda *_: rung.append(1)):
        while not rung:
            found = engine.forward(engine.kv_cache(1, POSITIONS), [(0, ids, 0)], [0])
    np.testing.assert_array_equal(found, right)


def test_a_batch_is_interrupted_and_its_engine_goes_on(folder: Path) -> None:
    engine = Engine.open(folder)
    prompts = [LONG[i : i + 500 + 300 * i] for i in range(3)]
    right = [g.tokens for g in engine.generate(prompts, max_new_tokens=8, temperature=0.8, seed=3)]
    with pytest.raises(KeyboardInterrupt), ringing(ctrl_c, 0.02):
        while True:
            engine.generate(prompts, max_new_tokens=8)
    assert [g.tokens for g in engine.generate(prompts, max_new_tokens=8, temperature=0.8, seed=3)] == right


def test_a_conversation_goes_on_with_what_it_had_read(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    try:
        engine = Engine.open(folder)
    finally:
        (folder / "chat_template.jinja").unlink()
    talk, other = engine.conversation(), engine.conversation()
    assert str(talk.ask("the cat", max_new_tokens=5)) == str(other.ask("the cat", max_new_tokens=5))
    with pytest.raises(KeyboardInterrupt), ringing(ctrl_c, 0.02):
        while True:
            talk.ask("a hen " * 600, max_new_tokens=5)
            talk.messages = list(other.messages)
    assert talk.messages == other.messages
    assert talk.ask("and so", max_new_tokens=9).tokens == other.ask("and so", max_new_tokens=9).tokens


def test_another_thread_is_not_interrupted(folder: Path) -> None:
    """Python runs handlers in its main thread, whose wait they end; the forward of the other is whole."""
    engine, found = Engine.open(folder), list[Any]()
    ids = LONG[:2500]
    right = engine.forward(engine.kv_cache(1, POSITIONS), [(0, ids, 0)], [0]).copy()
    worker = threading.Thread(
        target=lambda: found.append(engine.forward(engine.kv_cache(1, POSITIONS), [(0, ids, 0)], [0]).copy())
    )
    with pytest.raises(KeyboardInterrupt), ringing(ctrl_c):
        worker.start()
        while True:
            time.sleep(0.01)
    worker.join()
    np.testing.assert_array_equal(found[0], right)
    assert engine.generate(LONG[:50], max_new_tokens=5, **vars(Sampling())).tokens


def test_the_command_ends_at_once_with_130(folder: Path, tmp_path: Path) -> None:
    code = "from lowbit.cli.main import main; main()"
    # Half a minute of work, so that a machine that is late with the signal finds it running.
    words = ["generate", str(folder), *["the cat " * 430] * 30, "--raw", "--max-new-tokens", "500"]
    with open(tmp_path / "out", "wb") as out:
        process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=out, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        assert process.stderr.readline().startswith("engine (")  # loaded: what follows is the prompt
        time.sleep(0.15)
        os.kill(process.pid, signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(timeout=60) == 130
    assert said.strip() == "interrupted"
