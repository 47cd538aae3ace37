"""Chat templates (Jinja, as Hugging Face folders carry them), rendered as transformers renders them, without it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lowbit.errors import SourceError

Message = Mapping[str, str]


def render(template: str, messages: Sequence[Message], answer: bool, special: Mapping[str, Any]) -> str:
    """The text of a conversation. answer: end with what opens the model's turn; special: bos_token and the like.

    Templates come from strangers, so they run in a sandbox. SourceError when the template fails or refuses.
    """
    from jinja2.exceptions import TemplateError

    try:
        compiled = _environment().from_string(template)
        return compiled.render(messages=[dict(m) for m in messages], add_generation_prompt=answer, **special)
    except (TemplateError, TypeError, ValueError) as error:
        raise SourceError(
            f"the chat template of this model does not take this conversation: {error}; give the prompt raw"
        ) from error


def _environment() -> Any:
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_tag(), loopcontrols]
    )
    found.filters["tojson"] = _tojson
    found.globals["raise_exception"] = _raise_exception
    found.globals["strftime_now"] = _strftime_now
    return found


def _generation_tag() -> Any:
    """`{% generation %}`, with which templates mark what the assistant said; here it only passes through."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012  Jinja declares it so

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    return Generation


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)
