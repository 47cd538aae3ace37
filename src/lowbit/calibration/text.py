"""Text to measure on or to calibrate with: where it comes from and which text it was.

Perplexities of different texts cannot be compared, so a text carries its name and the
SHA-256 of its bytes onto the card.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.calibration.record_files import decoded, reader_of
from lowbit.calibration.records import FIELDS, KNOWN, Document, Message, kind_of, read_records
from lowbit.errors import TextError

_SEPARATOR = "\n\n"
_DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")
_FILE_SUFFIXES = {
    ".txt", ".text", ".md", ".rst", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".html", ".py", ".parquet",
}  # fmt: skip
Render = Callable[[list[Message]], str]
"""The text of a conversation by a chat template."""


@dataclass(frozen=True)
class Text:
    """Documents with a name. `sha256` is that of the joined documents in UTF-8.

    conversations: in place of documents, what `rendered` makes documents of; the hash is then that of their JSON.
    """

    name: str
    documents: tuple[str, ...]
    sha256: str
    conversations: tuple[tuple[Message, ...], ...] = ()

    @property
    def joined(self) -> str:
        """All documents as one string, a blank line between two of them."""
        return _SEPARATOR.join(self.documents)

    def rendered(self, render: Render) -> Text:
        """Conversations as one document by a chat template, one after the other: templates end a conversation themselves."""
        if not self.conversations:
            return self
        return _make(self.name, ("".join(render([dict(m) for m in said]) for said in self.conversations),))

    def as_chat(self, paragraphs: bool) -> Text:
        """Each document, or each of its paragraphs, as what a user says. Conversations stay what they are."""
        if self.conversations:
            return self
        parts = [p for d in self.documents for p in (re.split(r"\n\s*\n", d) if paragraphs else [d])]
        said = tuple(({"role": "user", "content": part.strip()},) for part in parts if part.strip())
        return _of_conversations(f"{self.name}, as chat", said)


def load_text(source: Any = None, split: str | None = None, *, chat: bool = False) -> Text:
    """Text from a file, a list of strings, conversations or records, a Hugging Face dataset id, or the offline default.

    `source` None is the reference text in Python's own `pydoc_data.topics`; it differs between
    Python versions, which the name records. A string is a file when there is one of that name,
    else a dataset id such as `wikitext:wikitext-2-raw-v1` (name, then configuration), whose
    `split` defaults to "test". Files of JSON lines, JSON, CSV, TSV and Parquet hold records, as data sets do: see
    `records.py`; any other file is plain text. `chat`: everything as conversations, plain text paragraph by paragraph.
    Raises TextError when there is no usable text.
    """
    if isinstance(source, str) and ("\n" in source or "\0" in source or len(source) > 1000):
        raise TextError("a text is given as a file name or in a list: pass [text] for the text itself")
    if isinstance(source, str) and is_dataset(source):
        return _dataset_text(source, split or "test", chat)
    if split is not None:
        raise TextError(f"split {split!r} was given, but {source!r} is not a dataset: leave the split out")
    if source is None:
        found = _python_reference()
        return found.as_chat(paragraphs=False) if chat else found
    if isinstance(source, (str, os.PathLike)):
        return _file_text(Path(source), chat)
    items = list(source) if isinstance(source, Iterable) and not isinstance(source, Mapping) else [source]
    kind = kind_of(items[0]) if items else "string"
    what = {"string": "text", "conversation": "conversation"}.get(str(kind), "record")
    places = ((f"{what} {i} of the list", item) for i, item in enumerate(items))
    return _of_documents(f"list of {len(items)} {what}s", read_records(places), chat)


def _of_documents(name: str, documents: Sequence[Document], chat: bool) -> Text:
    """Documents as text where they all are, and as conversations where they are nothing else or `chat` asks for it."""
    if documents and (chat or any(d.text is None for d in documents)) and all(d.messages for d in documents):
        return _of_conversations(name, [d.messages for d in documents])
    text = _make(name, tuple(d.text or "" for d in documents))
    return text.as_chat(paragraphs=False) if chat else text


def _of_conversations(name: str, conversations: Sequence[tuple[Message, ...]]) -> Text:
    plain = json.dumps(conversations, ensure_ascii=False, sort_keys=True)
    return Text(name, (), _hash(name, plain), tuple(conversations))


def _make(name: str, documents: tuple[str, ...]) -> Text:
    joined = _SEPARATOR.join(documents)
    if not joined.strip():
        raise TextError(f"{name} is empty: pass text with at least one window of tokens")
    if "\0" in joined:
        raise TextError(
            f"{name} has a NUL at character {joined.index(chr(0))}, which no text has: save it as UTF-8 text"
        )
    return Text(name, documents, _hash(name, joined))


def _hash(name: str, text: str) -> str:
    try:
        return hashlib.sha256(text.encode("utf-8")).hexdigest()
    except UnicodeEncodeError as error:
        raise TextError(f"{name} has a lone surrogate at character {error.start}: not valid text") from None


def _python_reference() -> Text:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise TextError("this Python has no pydoc_data.topics, the default text: name a text file") from None
    documents = tuple(topics[key] for key in sorted(topics))
    return _make(f"pydoc_data.topics of Python {platform.python_version()}", documents)


def _file_text(path: Path, chat: bool) -> Text:
    records = reader_of(path)
    if records is not None:
        return _of_documents(path.name, records(path), chat)
    text = _make(path.name, (decoded(path),))
    return text.as_chat(paragraphs=True) if chat else text


def is_dataset(source: object) -> bool:
    """Whether `source` is taken for a Hugging Face dataset id: it looks like one and no file has that name."""
    return (
        isinstance(source, str)
        and bool(_DATASET_ID.fullmatch(source))
        and Path(source).suffix.lower() not in _FILE_SUFFIXES
        and not Path(source).exists()
    )


def _dataset_text(source: str, split: str, chat: bool) -> Text:
    try:
        from datasets import load_dataset
    except ImportError:
        raise TextError(
            f"{source!r} is not a file here; to read it as a Hugging Face dataset: pip install datasets"
        ) from None
    name, _, configuration = source.partition(":")
    try:
        rows = load_dataset(name, configuration or None, split=split)
    except Exception as error:  # the library raises many unrelated kinds, all mended by another source
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TextError(f"dataset {source!r}, split {split!r}, cannot be loaded: {reason}") from error
    columns = list(rows.column_names)
    if kind_of(dict.fromkeys(columns)) is None:
        raise TextError(
            f"dataset {source!r} has the columns {', '.join(columns)} and none of a text ({KNOWN}): pass a list of strings"
        )
    # Column by column: a row may have images and sounds that are better left unread.
    wanted = [c for c in columns if c in FIELDS]
    values = zip(*(rows[c] for c in wanted), strict=True)
    records = ((f"row {i}", dict(zip(wanted, row, strict=True))) for i, row in enumerate(values))
    try:
        documents = read_records(records)
    except TextError as error:
        raise TextError(f"dataset {source!r}, {error}") from None
    return _of_documents(f"{source} [{split}]", documents, chat)
