"""Records of data sets: which fields hold the text or the conversation.

The conventions are those that `datasets` and `trl` go by, and the two that most files for instructions have:

    text                                     a document
    messages                                 a conversation, [{"role", "content"}, ...]
    conversations                            the same of ShareGPT, [{"from", "value"}, ...]
    prompt, completion                       text that goes on, or two parts of a conversation
    instruction, input (or none), output     a question and its answer (Alpaca)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowbit.errors import TextError

Message = dict[str, str]
KNOWN = "text; messages; conversations; prompt and completion; instruction and output"
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "bot": "assistant", "model": "assistant", "system": "system",
    "tool": "tool", "function": "tool", "function_response": "tool", "observation": "tool", "function_call": "assistant",
}  # fmt: skip
_SHOWN = 8  # keys of a record that an error names


@dataclass(frozen=True)
class Document:
    """A text, or what was said in a conversation, or both ways to see it.

    messages: for a chat template. text: what it is without one, None where there is no such thing.
    """

    text: str | None = None
    messages: tuple[Message, ...] = ()


def read_records(records: Iterable[tuple[str, Any]]) -> list[Document]:
    """The documents of records, each after its place, such as "line 3". TextError for what is none, or not like the first."""
    found: list[Document] = []
    kind = first = ""
    for place, record in records:
        own = kind_of(record)
        if own is None:
            raise TextError(f"{place} is {_shown(record)}: records have {KNOWN}")
        if not found:
            kind, first = own, place
        if own != kind:
            raise TextError(f"{place} has {_named(own)} and {first} {_named(kind)}: a file holds one kind of records")
        try:
            document = _READERS[own](record)
        except _Wrong as error:
            raise TextError(f"{place}: {error}") from None
        found.append(document)
    return found


def kind_of(record: Any) -> str | None:
    """The name of its kind, None for what is no record: a string, a conversation, or a mapping with known fields."""
    if isinstance(record, str):
        return "string"
    if isinstance(record, Sequence) and not isinstance(record, (bytes, bytearray)):
        inside = bool(record) and isinstance(record[0], Mapping) and ({"role", "from"} & set(record[0]))
        return "conversation" if inside else None
    if isinstance(record, Mapping):
        return next((name for name, fields in _FIELDS.items() if all(field in record for field in fields)), None)
    return None


class _Wrong(Exception):
    """What is wrong with a field; its place is put in front."""


def _text(record: Mapping[str, Any]) -> Document:
    return Document(_string(record, "text"))


def _messages(record: Mapping[str, Any]) -> Document:
    return Document(messages=_conversation(record["messages"], "messages"))


def _sharegpt(record: Mapping[str, Any]) -> Document:
    said = _conversation(record["conversations"], "conversations")
    system = record.get("system")
    if isinstance(system, str) and system and said[0]["role"] != "system":
        said = ({"role": "system", "content": system}, *said)
    return Document(messages=said)


def _completion(record: Mapping[str, Any]) -> Document:
    parts = [record["prompt"], record["completion"]]
    if all(isinstance(part, str) for part in parts):
        turns = zip(("user", "assistant"), parts, strict=True)
        return Document("".join(parts), tuple({"role": role, "content": part} for role, part in turns))
    both = zip(("prompt", "completion"), parts, strict=True)
    return Document(messages=tuple(m for name, part in both for m in _conversation(part, name)))


def _alpaca(record: Mapping[str, Any]) -> Document:
    asked = [_string(record, "instruction"), _string(record, "input") if record.get("input") else ""]
    question, answer = "\n\n".join(part for part in asked if part), _string(record, "output")
    said = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Document(f"{question}\n\n{answer}", said)


# Asked in this order: what has `messages` and also a `text` made of them is a conversation.
_FIELDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",), "conversations": ("conversations",), "completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"), "text": ("text",),
}  # fmt: skip
FIELDS = frozenset(field for fields in _FIELDS.values() for field in fields) | {"input", "system"}
_READERS: dict[str, Callable[[Any], Document]] = {
    "string": lambda text: Document(text), "conversation": lambda said: Document(messages=_conversation(said, "")),
    "messages": _messages, "conversations": _sharegpt, "completion": _completion, "alpaca": _alpaca, "text": _text,
}  # fmt: skip


def _conversation(value: Any, field: str) -> tuple[Message, ...]:
    """A list of messages with roles and contents that are text."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or not value:
        raise _Wrong(f"{field!r} is {_kind(value)} and not a list of messages")
    inside = f" of {field!r}" if field else ""
    return tuple(_message(message, f"message {i + 1}{inside}") for i, message in enumerate(value))


def _message(message: Any, place: str) -> Message:
    if not isinstance(message, Mapping):
        raise _Wrong(f"{place} is {_kind(message)} and not {{'role', 'content'}}")
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(role, str):
        raise _Wrong(f"{place} says no role (it has {_keys(message)}); messages have 'role' and 'content'")
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if len(texts) == len(parts) else content
    if not isinstance(content, str):
        raise _Wrong(f"{place} has {_kind(content)} as its content, not text")
    if "role" not in message and role.lower() not in _ROLES:
        raise _Wrong(f"{place} is from {role[:40]!r}; known are {', '.join(_ROLES)}")
    return {"role": role if "role" in message else _ROLES[role.lower()], "content": content}


def _string(record: Mapping[str, Any], field: str) -> str:
    value = record.get(field)
    if not isinstance(value, str):
        raise _Wrong(f"{field!r} is {_kind(value)} and not text")
    return value


def _named(kind: str) -> str:
    return " and ".join(repr(field) for field in _FIELDS[kind]) if kind in _FIELDS else f"a {kind}"


def _shown(record: Any) -> str:
    return f"a record with {_keys(record)}" if isinstance(record, Mapping) else _kind(record)


def _keys(record: Mapping[Any, Any]) -> str:
    keys = ", ".join(repr(str(key)[:40]) for key in list(record)[:_SHOWN]) or "no field"
    return keys + (f" and {len(record) - _SHOWN} more" if len(record) > _SHOWN else "")


def _kind(value: Any) -> str:
    """Such as "a number" in place of a Python type."""
    if value is None:
        return "nothing (null)"
    names = ((bool, "true or false"), ((int, float), "a number"), (str, "a string"), (Mapping, "an object"))
    known = next((name for kind, name in names if isinstance(value, kind)), None)
    return known or ("a list" if isinstance(value, Sequence) else f"a {type(value).__name__}")
