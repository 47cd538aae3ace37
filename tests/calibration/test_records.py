"""Files of records: which fields are read, and what is said of all others."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from lowbit.calibration.text import load_text
from lowbit.errors import TextError

WORDS = 'the hérons stood\non the "far" bank'
SAID = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": WORDS}]


def shown(messages: list[dict[str, str]]) -> str:
    return "".join(f"<{m['role']}>{m['content']}" for m in messages)


TALK = shown(SAID)
RECORDS: list[tuple[Any, str, str]] = [  # a record, what it is as text, what it is as a chat
    ({"text": WORDS, "id": 7}, WORDS, f"<user>{WORDS}"),
    ({"messages": SAID, "source": "x"}, TALK, TALK),
    ({"messages": [SAID[0], {"role": "assistant", "content": [{"type": "text", "text": WORDS}]}]}, TALK, TALK),
    ({"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": WORDS}]}, TALK, TALK),
    ({"system": "be", "conversations": [{"from": "human", "value": "ask"}]}, "<system>be<user>ask", "<system>be<user>ask"),
    ({"prompt": "ask", "completion": WORDS}, "ask" + WORDS, TALK),
    ({"prompt": SAID[:1], "completion": SAID[1:]}, TALK, TALK),
    ({"instruction": "ask", "input": "", "output": WORDS}, f"ask\n\n{WORDS}", TALK),
    ({"instruction": "do", "input": "it", "output": "so"}, "do\n\nit\n\nso", "<user>do\n\nit<assistant>so"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "plain", "chat"), RECORDS)
def test_kinds_of_records(tmp_path: Path, record: Any, plain: str, chat: str) -> None:
    lines, whole = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_bytes(b"\xef\xbb\xbf" + (json.dumps(record) + "\r\n\n").encode() * 2)
    whole.write_text(json.dumps([record, record], indent=1, ensure_ascii=False), "utf-8")
    for source in (lines, str(whole), [record, record]):
        text = load_text(source)
        rendered = text.rendered(shown)
        assert rendered.joined == (plain * 2 if text.conversations else f"{plain}\n\n{plain}")
        assert load_text(source, chat=True).rendered(shown).joined == chat * 2


def test_one_record_on_several_lines(tmp_path: Path) -> None:
    file = tmp_path / "one.json"
    file.write_text(json.dumps({"text": WORDS}, indent=2))
    assert load_text(file).documents == (WORDS,)


@pytest.mark.parametrize(("name", "delimiter"), [("t.csv", ","), ("t.tsv", "\t")])
def test_tables(tmp_path: Path, name: str, delimiter: str) -> None:
    file = tmp_path / name
    file.write_bytes(f'\ufeffid{delimiter}text\r\n1{delimiter}"a{delimiter} ""b""\n c"\r\n2{delimiter}d\r\n'.encode())
    assert load_text(file).documents == (f'a{delimiter} "b"\n c', "d")
    file.write_text(f"id{delimiter}question\n1{delimiter}what\n")
    with pytest.raises(TextError, match=rf"{name}, line 2 is a record with 'id', 'question': records have text;"):
        load_text(file)


BAD: list[tuple[bytes, str]] = [
    (b"", "is empty"),
    (b'{"text": "a"}\n{"text": "b"\n', "line 2 is no JSON .*column"),
    (b'{"question": "a", "answer": "b"}\n', "line 1 is a record with 'question', 'answer': records have text;"),
    (b'{"text": "a"}\n{"messages": []}\n', "line 2 has 'messages' and line 1 'text': a file holds one kind"),
    (b'{"text": NaN}\n', "line 1: 'text' is a number and not text"),
    (b'{"text": null}\n', "line 1: 'text' is nothing"),
    (b"[" * 200_000, "nested too deeply"),
    (b'{"text": ' + b"[" * 200_000 + b"\n", "line 1 is nested too deeply"),
    (b'{"n": ' + b"9" * 10_000 + b"}\n", "line 1 is no JSON that can be read"),
    (b'{"text": "\xff"}\n', "not UTF-8 .byte 10"),
    (b'{"text": "a\\ud800"}\n', "lone surrogate at character 1"),
    (b'{"text": "a\\u0000"}\n', "NUL at character 1"),
    (b"17\n", "line 1 is a number: records have"),
    (b'{"messages": "hello"}\n', "line 1: 'messages' is a string and not a list"),
    (b'{"messages": [{"content": "a"}]}\n', "line 1: message 1 of 'messages' says no role .it has 'content'"),
    (b'{"messages": [{"role": "user", "content": null}]}\n', "has nothing .null. as its content"),
    (b'{"conversations": [{"from": "nobody", "value": "a"}]}\n', "is from 'nobody'; known are human,"),
    (b'{"instruction": 1, "output": "a"}\n', "'instruction' is a number"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), BAD)
def test_what_is_no_record_is_one_sentence(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    with pytest.raises(TextError, match=message) as caught:
        load_text(file).rendered(shown)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_parquet_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(TextError, match="pip install pyarrow"):
        load_text(file)


def test_parquet_by_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1")
    batch = types.SimpleNamespace(to_pylist=lambda: [{"text": WORDS}])
    opened = types.SimpleNamespace(iter_batches=lambda: iter([batch, batch]))
    monkeypatch.setitem(sys.modules, "pyarrow", types.ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", types.SimpleNamespace(ParquetFile=lambda path: opened))
    assert load_text(file).documents == (WORDS, WORDS)


def test_plain_text_has_no_mark_of_byte_order(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfthe river")
    assert load_text(file).documents == ("the river",)
    file.write_bytes("the river".encode("utf-16-le"))
    with pytest.raises(TextError, match="NUL at character 1"):
        load_text(file)
