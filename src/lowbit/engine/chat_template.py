"""Chat templates (Jinja, as Hugging Face folders carry them), rendered as transformers renders them, within limits."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import CodeType
from typing import Any

from lowbit.errors import SourceError

Message = Mapping[str, Any]

_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of what a model thought before it said something
_LONGEST = 1 << 20  # bytes of a file
_LEAST, _GROWTH = 1 << 20, 4  # characters of the text: so many, and so many for each of the messages


class ChatTemplate:
    """A template and the special tokens that it may write. source: Jinja, as it stood in the model's files.

    Templates come from strangers: what one does is counted, and it is stopped long before it takes seconds or gigabytes.
    """

    def __init__(self, source: str, special: Mapping[str, Any]) -> None:
        self.source, self.special = source, dict(special)

    @staticmethod
    def of(tokenizer: Any) -> ChatTemplate | None:
        """That of a tokenizer of transformers, None where it has none. SourceError for what is no template."""
        source = default_template(getattr(tokenizer, "chat_template", None))
        return None if source is None else ChatTemplate(source, getattr(tokenizer, "special_tokens_map", {}))

    def render(self, messages: Sequence[Message], answer: bool = False, tools: Any = None) -> str:
        """The text of a conversation. answer: end with what opens the model's turn.

        SourceError in a sentence when the template fails, refuses, or asks for more work than any chat needs.
        """
        from jinja2 import Template

        from lowbit.engine.template_budget import Budget

        given = [_message(m) for m in messages]
        most = _LEAST + _GROWTH * len(json.dumps(given, default=str))
        pieces, length = [], 0
        try:
            sandbox = _sandbox(Budget())
            template = Template.from_code(sandbox, _compiled(self.source), sandbox.make_globals(None))
            options = {"tools": tools, "documents": None, "add_generation_prompt": answer}
            for piece in template.generate(**{**self.special, "messages": given, **options}):
                pieces.append(piece)
                length += len(piece)
                if length > most:
                    break
            text = "".join(pieces)
        except Exception as error:  # whatever a program of a stranger comes to
            raise _refused(_reason(error)) from None
        if length > most:
            raise _refused(f"it writes more than {most} characters")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise _refused("what it writes is no Unicode text") from None
        return text


def default_template(given: Any) -> str | None:
    """The template that is meant where there may be several by name, None for none. SourceError for anything else."""
    if isinstance(given, list):
        if not all(isinstance(entry, Mapping) and {"name", "template"} <= set(entry) for entry in given):
            raise SourceError(
                "the chat template of this model is a list whose entries lack a name or a template; mend or remove it"
            )
        given = {str(entry["name"]): entry["template"] for entry in given}
    if isinstance(given, Mapping):
        given = given.get("default")
    if given is None or given == "":
        return None
    if not isinstance(given, str):
        raise SourceError(f"the chat template of this model is a {type(given).__name__}, not a text; mend or remove it")
    return given


def read_template(file: Path) -> str:
    """The text of chat_template.jinja. SourceError when it is none."""
    try:
        if file.stat().st_size > _LONGEST:
            raise SourceError(
                f"{file} has {file.stat().st_size} bytes, too many for a chat template; mend or remove it"
            )
        return file.read_text("utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise SourceError(f"{file}: the chat template cannot be read: {reason}; mend or remove it") from None


def _message(given: Message) -> dict[str, Any]:
    """A message without what is None, and what a model thought by each name that templates know."""
    found = {key: value for key, value in given.items() if value is not None}
    thought = next((found[name] for name in _REASONING if name in found), None)
    return found if thought is None else {"thinking": thought, **found, "reasoning_content": thought}


@lru_cache(maxsize=16)
def _compiled(source: str) -> CodeType:
    from lowbit.engine.template_budget import Budget

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # Python's, about what Jinja made of odd templates
        return _sandbox(Budget()).compile(source)  # type: ignore[no-any-return]


def _sandbox(budget: Any) -> Any:
    from lowbit.engine.template_sandbox import Sandbox

    found = Sandbox(budget)
    found.allow_filter("tojson", _tojson)
    found.allow("raise_exception", _raise_exception)
    found.allow("strftime_now", _strftime_now)
    return found


def _reason(error: Exception) -> str:
    """What went wrong, in a line."""
    if isinstance(error, RecursionError):
        return "it nests too deeply"
    if isinstance(error, MemoryError):
        return "it takes too much memory"
    said = " ".join(str(error).encode(errors="replace").decode().split()) or type(error).__name__
    return said if len(said) <= 200 else f"{said[:200]}..."


def _refused(reason: str) -> SourceError:
    return SourceError(
        f"the chat template of this model does not take this conversation: {reason}; give the prompt raw"
    )


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    from datetime import datetime

    if len(form) > 1000:
        raise ValueError("its format of a date has too many characters")
    return datetime.now().strftime(form)
