"""Text to measure on or to calibrate with: where it comes from and which text it was.

Perplexities of different texts cannot be compared, so a text carries its name and the
SHA-256 of its bytes onto the card.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowbit.errors import TextError

_SEPARATOR = "\n\n"
_DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")
_FILE_SUFFIXES = {".txt", ".text", ".md", ".rst", ".json", ".jsonl", ".csv", ".html", ".py", ".parquet"}


@dataclass(frozen=True)
class Text:
    """Documents with a name. `sha256` is that of the joined documents in UTF-8."""

    name: str
    documents: tuple[str, ...]
    sha256: str

    @property
    def joined(self) -> str:
        """All documents as one string, a blank line between two of them."""
        return _SEPARATOR.join(self.documents)


def load_text(source: str | Path | Sequence[str] | None = None, split: str | None = None) -> Text:
    """Text from a file, a list of strings, a Hugging Face dataset id, or the offline default.

    `source` None is the reference text in Python's own `pydoc_data.topics`; it differs between
    Python versions, which the name records. A string is a file when there is one of that name,
    else a dataset id such as `wikitext:wikitext-2-raw-v1` (name, then configuration), whose
    `split` defaults to "test". Raises TextError when there is no usable text.
    """
    if isinstance(source, str) and ("\n" in source or "\0" in source or len(source) > 1000):
        raise TextError("a text is given as a file name or in a list: pass [text] for the text itself")
    if isinstance(source, str) and is_dataset(source):
        return _dataset_text(source, split or "test")
    if split is not None:
        raise TextError(f"split {split!r} was given, but {source!r} is not a dataset: leave the split out")
    if source is None:
        return _python_reference()
    if isinstance(source, (str, os.PathLike)):
        return _file_text(Path(source))
    documents = tuple(source)
    if not all(isinstance(document, str) for document in documents):
        raise TextError("the list of texts holds something that is not a string: pass strings only")
    return _make(f"list of {len(documents)} texts", documents)


def _make(name: str, documents: tuple[str, ...]) -> Text:
    joined = _SEPARATOR.join(documents)
    if not joined.strip():
        raise TextError(f"{name} is empty: pass text with at least one window of tokens")
    try:
        content = joined.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TextError(f"{name} has a lone surrogate at character {error.start}: not valid text") from None
    return Text(name, documents, hashlib.sha256(content).hexdigest())


def _python_reference() -> Text:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise TextError("this Python has no pydoc_data.topics, the default text: name a text file") from None
    documents = tuple(topics[key] for key in sorted(topics))
    return _make(f"pydoc_data.topics of Python {platform.python_version()}", documents)


def _file_text(path: Path) -> Text:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise TextError(f"{path}: no such file; name an existing UTF-8 text file") from None
    except OSError as error:
        raise TextError(f"{path} cannot be read ({error.strerror}): name a readable text file") from None
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8 text") from None
    return _make(path.name, (text,))


def is_dataset(source: object) -> bool:
    """Whether `source` is taken for a Hugging Face dataset id: it looks like one and no file has that name."""
    return (
        isinstance(source, str)
        and bool(_DATASET_ID.fullmatch(source))
        and Path(source).suffix.lower() not in _FILE_SUFFIXES
        and not Path(source).exists()
    )


def _dataset_text(source: str, split: str) -> Text:
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
    if "text" not in rows.column_names:
        columns = ", ".join(rows.column_names)
        raise TextError(f"dataset {source!r} has no column 'text' (it has {columns}): pass a list of strings")
    return _make(f"{source} [{split}]", tuple(rows["text"]))
