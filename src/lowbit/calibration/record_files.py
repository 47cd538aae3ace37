"""Files of records: JSON lines, JSON, tables with commas or tabs, Parquet. They are never read as plain text."""

from __future__ import annotations

import csv
import importlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lowbit.calibration.records import Document, read_records
from lowbit.errors import TextError

Records = Iterator[tuple[str, Any]]
"""Each record after its place in the file, such as "line 3"."""


def reader_of(path: Path) -> Callable[[Path], list[Document]] | None:
    """What reads the records of a file with such a name; None for a file of plain text."""
    records = _READERS.get(path.suffix.lower())
    return None if records is None else lambda file: _documents(file, records)


def decoded(path: Path) -> str:
    """The text of a file in UTF-8, without a mark of the byte order. TextError for any other."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise TextError(f"{path}: no such file; name an existing UTF-8 text file") from None
    except OSError as error:
        raise TextError(f"{path} cannot be read ({error.strerror}): name a readable text file") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8 text") from None


def _documents(path: Path, records: Callable[[Path], Records]) -> list[Document]:
    try:
        found = read_records(records(path))
    except TextError as error:
        name = str(path)
        raise TextError(str(error) if str(error).startswith(name) else f"{name}, {error}") from None
    if not found:
        raise TextError(f"{path} is empty: name a file with one record or more")
    return found


def _json_records(path: Path) -> Records:
    """One JSON value a line, or the whole file as one value: a list of records, or one record on several lines."""
    text = decoded(path)
    start = text.lstrip()[:1]
    if start != "[":
        first = text.lstrip().partition("\n")[0]
        if start != "{" or _parses(first) or not _parses(text):
            yield from _json_lines(text)
            return
    whole = _parsed(text, "the file")
    records = whole if isinstance(whole, list) else [whole]
    yield from ((f"record {i + 1}", record) for i, record in enumerate(records))


def _json_lines(text: str) -> Records:
    # Only these end a line of JSON: what else splitlines() knows may stand inside a string.
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        if line.strip():
            yield f"line {number}", _parsed(line, f"line {number}")


def _parses(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise TextError(f"{place} is nested too deeply to be a record") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, " if place == "the file" else ""
        raise TextError(f"{place} is no JSON ({error.msg}, {where}column {error.colno})") from None
    except ValueError as error:  # such as an integer of more digits than Python takes
        raise TextError(f"{place} is no JSON that can be read ({str(error).splitlines()[0]})") from None


def _table(delimiter: str) -> Callable[[Path], Records]:
    def records(path: Path) -> Records:
        rows = csv.DictReader(io.StringIO(decoded(path), newline=""), delimiter=delimiter, strict=True)
        try:
            for row in rows:
                yield f"line {rows.line_num}", {k: v for k, v in row.items() if k is not None and v is not None}
        except csv.Error as error:
            raise TextError(f"line {rows.line_num} is no row of a table ({error})") from None

    return records


def _parquet(path: Path) -> Records:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise TextError(
            "a Parquet file, needs another package: pip install pyarrow, or save it as JSON lines"
        ) from None
    if not path.is_file():
        raise TextError(f"{path}: no such file; name an existing file")
    try:
        file = parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"record {number}", row
    except (OSError, ValueError, MemoryError) as error:  # errors of pyarrow are of these kinds too
        raise TextError(f"cannot be read as Parquet ({' '.join(str(error).split())[:200]})") from None


_READERS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": _json_records, ".ndjson": _json_records, ".json": _json_records, ".csv": _table(","), ".tsv": _table("\t"),
    ".parquet": _parquet,
}  # fmt: skip
