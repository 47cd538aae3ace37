"""The text that comes with lowbit: what is in it, and how windows are taken of its kinds."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.calibration.data import load_calibration
from lowbit.calibration.package_text import BUILTIN, KINDS, package_windows, shares, text_of
from lowbit.calibration.windows import Frame
from lowbit.errors import TextError
from lowbit.interchange.opening import open_source
from tiny import save_tiny

counts = st.lists(st.integers(0, 20), min_size=6, max_size=6)


@given(counts, st.integers(0, 150))
def test_every_kind_gives_its_share_as_far_as_it_reaches(there: list[int], count: int) -> None:
    wanted = [kind.share for kind in KINDS]
    taken = shares(wanted, there, count)
    assert sum(taken) == min(count, sum(there))
    assert all(0 <= t <= n for t, n in zip(taken, there, strict=True))
    if all(n >= count for n in there):  # nobody has too few: each is within one window of its share
        assert all(abs(t - share * count) < 1 for t, share in zip(taken, wanted, strict=True))


def test_shares_are_of_the_whole_and_files_are_there() -> None:
    assert sum(kind.share for kind in KINDS) == pytest.approx(1)
    folder = files("lowbit.calibration").joinpath("texts")
    assert {kind.file for kind in KINDS} == {
        p.name for p in folder.iterdir() if not p.name.startswith(("README", "__"))
    }
    for line in folder.joinpath("chat.jsonl").read_text("utf-8").splitlines():
        said = json.loads(line)["messages"]
        turns = [message["role"] for message in said if message["role"] != "system"]
        assert turns == ["user", "assistant"] * (len(turns) // 2), line[:80]


class Characters:
    """A tokenizer whose tokens are characters. template: of chats, None for none."""

    def __init__(self, template: str | None = None) -> None:
        self.chat_template, self.special_tokens_map = template, {}

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def test_conversations_are_in_the_template_of_the_model_and_plain_where_it_refuses_them() -> None:
    plain = text_of("chat.jsonl", Characters())
    rendered = text_of("chat.jsonl", Characters("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"))
    assert rendered.startswith("<") and "<assistant>" in rendered and "<assistant>" not in plain
    picky = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    mixed = text_of("chat.jsonl", Characters(picky))
    assert "<system>" not in mixed and mixed.count("<user>") > 50
    words = json.loads(files("lowbit.calibration").joinpath("texts", "chat.jsonl").read_text("utf-8").splitlines()[0])
    assert all(message["content"] in text for message in words["messages"] for text in (plain, rendered, mixed))


def test_windows_are_of_all_kinds_the_same_each_time_and_full() -> None:
    first = package_windows(Characters(), Frame(), 256, 32)
    again = package_windows(Characters(), Frame(), 256, 32)
    assert len(first) == 32 and all(len(w) == 256 for w in first)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    said = ["".join(map(chr, w.tolist())) for w in first]
    for kind in KINDS:
        text = text_of(kind.file, Characters())
        found = sum(window in text for window in said)
        assert abs(found - kind.share * 32) < 1, kind
    with pytest.raises(TextError, match="no room for text"):
        package_windows(Characters(), Frame((1, 2), ()), 2, 4)


def test_builtin_is_a_text_by_name(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    source = open_source(tmp_path)
    found, again = (load_calibration(BUILTIN, None, source, samples=4, length=32) for _ in range(2))
    assert found.name == "the text that comes with lowbit" and found.tokens == 128
    assert found.sha256 == again.sha256
    with pytest.raises(TextError, match="leave chat out"):
        load_calibration(BUILTIN, None, source, samples=4, length=32, chat=True)
