"""Reading ahead and writing behind: the order of things, how much is held, and what an error leaves."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit.errors import SourceError
from lowbit.interchange.opening import open_source
from lowbit.interchange.readers.folder import FolderSource
from lowbit.kernels.core import core
from lowbit.pipeline.driver import fingerprint
from lowbit.pipeline.overlap import Behind, read_ahead
from lowbit.planning.plan import make_plan
from lowbit.solvers import in_core
from tiny import save_tiny


def test_items_come_in_order_and_no_more_is_held_than_there_is_room_for() -> None:
    held: set[int] = set()
    most = 0
    lock = threading.Lock()

    def read(item: int) -> int:
        nonlocal most
        with lock:
            held.add(item)
            most = max(most, sum(sizes[i] for i in held))
        return item * 10

    sizes = [3, 1, 1, 9, 2, 2, 2, 1]
    seen = []
    for item, found in read_ahead(list(enumerate(sizes)), read, 9):
        seen.append((item, found))
        with lock:
            held.discard(item)  # the caller lets it go before it asks for the next
    assert seen == [(i, 10 * i) for i in range(len(sizes))] and most <= 9


def test_something_is_read_while_the_caller_works() -> None:
    reading = threading.Event()
    items = read_ahead([("a", 1), ("b", 1)], lambda item: reading.set() if item == "b" else None, 2)
    next(items)
    assert reading.wait(10)
    items.close()


def test_an_error_of_reading_comes_where_its_item_would_have_come() -> None:
    def read(item: int) -> int:
        if item == 2:
            raise SourceError("the third")
        return item

    items = read_ahead([(i, 1) for i in range(5)], read, 10)
    assert [next(items)[1], next(items)[1]] == [0, 1]
    with pytest.raises(SourceError, match="the third"):
        next(items)


def test_calls_are_made_in_order_and_what_follows_in_the_own_thread() -> None:
    own, called, followed = threading.get_ident(), [], []
    with Behind(3) as behind:
        for i in range(8):
            behind.call(
                1 + i % 4,
                lambda i=i: called.append((i, threading.get_ident() != own)) or i,
                lambda found: followed.append((found, threading.get_ident() == own)),
            )
        assert behind.has_done(3, wait=True)
    assert called == [(i, True) for i in range(8)] and followed == [(i, True) for i in range(8)]


def test_the_first_error_is_raised_and_nothing_is_called_after_it() -> None:
    called = []

    def fail() -> None:
        raise OSError("full")

    with pytest.raises(OSError, match="full"), Behind(100) as behind:
        behind.call(1, lambda: called.append(0), lambda _: None)
        behind.call(1, fail, lambda _: None)
        behind.call(1, lambda: called.append(2), lambda _: called.append(3))
        behind.has_done(3, wait=True)
    assert called == [0]


def test_what_was_asked_for_is_done_when_the_caller_fails() -> None:
    followed = []
    with pytest.raises(KeyboardInterrupt), Behind(100) as behind:
        for i in range(5):
            behind.call(1, lambda i=i: i, followed.append)
        raise KeyboardInterrupt
    assert followed == list(range(5))


def test_a_tensor_that_cannot_be_read_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama-tied", tmp_path / "model")
    read = FolderSource.read

    def broken(self: FolderSource, name: str) -> torch.Tensor:
        if name.endswith("1.mlp.down_proj.weight"):
            raise SourceError("it is truncated")
        return read(self, name)

    monkeypatch.setattr(FolderSource, "read", broken)
    with pytest.raises(SourceError, match="truncated"):
        lowbit.quantize(tmp_path / "model", "w4", tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"model"}


@pytest.mark.skipif(core() is None, reason="lowbit._core is not built")
def test_the_manifest_and_the_fingerprint_say_what_made_the_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama-tied", tmp_path / "model")
    source = open_source(tmp_path / "model")
    plan = make_plan(source, lowbit.Recipe.parse("search@int4:g32"))
    keys = set()
    for name in ("core", "python"):
        if name == "python":
            monkeypatch.setattr(in_core, "core", lambda: None)
        lowbit.quantize(tmp_path / "model", "search@int4:g32", tmp_path / name)
        assert json.loads((tmp_path / name / "lowbit.json").read_text())["solved_by"] == name
        keys.add(fingerprint(plan, source))
    assert len(keys) == 2
    made = [json.loads((tmp_path / name / "lowbit.json").read_text())["tensors"] for name in ("core", "python")]
    for tensor, facts in made[0].items():
        assert facts["error"] == pytest.approx(made[1][tensor]["error"], rel=1e-3)
