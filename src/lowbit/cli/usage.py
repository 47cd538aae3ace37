"""What was typed wrong, as one sentence: what it was, and what to type instead."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

_NEAR = 0.7  # how alike a suggestion is
# What other programs call it -> what to write here.
_OPTIONS = {
    "--load-in-4bit": "write --bits 4", "--load-in-8bit": "write --bits 8", "--quantize": "write the recipe after the model, such as w4",
    "--quant": "write the recipe after the model, such as w4", "--wbits": "write --bits N", "--w-bits": "write --bits N",
    "--w_bit": "write --bits N", "--q_group_size": "write --group-size N", "--output": "write --out PATH",
    "--output-dir": "write --out PATH", "--outfile": "write --out PATH", "--outtype": "write the recipe after the model, such as q8_0",
}  # fmt: skip
_COMMANDS = {
    "run": "`lowbit chat MODEL` talks to a model, and `lowbit generate MODEL PROMPT` answers once",
    "serve": "`lowbit export FOLDER --as vllm` writes a folder for a server; `lowbit chat MODEL` talks to a model here",
    "convert": "`lowbit export` writes for another program, and `lowbit import` reads what one wrote",
    "eval": "write `lowbit evaluate`", "benchmark": "write `lowbit bench`", "info": "write `lowbit inspect`", "show": "write `lowbit inspect`",
}  # fmt: skip


def is_usage_error(error: BaseException) -> bool:
    """Whether the parser refused what was typed. By the name: the library that typer parses with comes with it or stands beside it."""
    return any(base.__name__ == "ClickException" for base in type(error).__mro__)


def usage_text(error: Any) -> str:
    """One sentence about what the parser refused."""
    ctx = getattr(error, "ctx", None)
    path = f"lowbit {ctx.info_name}" if ctx is not None and ctx.parent is not None else "lowbit"
    kind = type(error).__name__
    if kind == "NoSuchOption":
        return _no_option(error.option_name, ctx, path)
    if kind == "MissingParameter" and error.param is not None:
        return _missing(error.param, path)
    if kind == "BadParameter" and error.param is not None:
        if found := re.search("valid (integer|number)", error.message):
            kind = "a whole number" if found[1] == "integer" else "a number"
            return f"{_named(error.param)} takes {kind}; `{path} --help` says more of it"
        return f"{_named(error.param)}: {_sentence(error.message)}; `{path} --help` says what it takes"
    if extra := re.fullmatch(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)", error.message.strip()):
        return f"{extra[1]!r} is more than `{path}` takes; `{path} --help` shows how the command is written"
    word = _quoted(error.message)
    if ctx is not None and hasattr(ctx.command, "list_commands") and error.message.startswith("No such command"):
        return _no_command(word, ctx)
    return f"{_sentence(error.format_message())}; `{path} --help` lists what can be given"


def _no_option(name: str, ctx: Any, path: str) -> str:
    known = [option for p in ctx.command.get_params(ctx) for option in (*p.opts, *p.secondary_opts)] if ctx else []
    instead = _OPTIONS.get(name.replace("_", "-"), _OPTIONS.get(name))
    takes = any(f"--{word}" in (instead or "") for word in ("bits", "group-size", "out"))
    has_recipe = ctx is not None and any(p.name == "recipe" for p in ctx.command.get_params(ctx))
    if instead and (instead.split()[1] in known if takes else has_recipe):
        return f"there is no {name}; {instead}"
    return (
        f"there is no {name}{_near(name, (k for k in known if k.startswith('--')))}; `{path} --help` lists the options"
    )


def _no_command(word: str, ctx: Any) -> str:
    if word in _COMMANDS:
        return f"there is no command {word!r}; {_COMMANDS[word]}"
    near = _near(word, ctx.command.list_commands(ctx))
    return f"there is no command {word!r}{near}; `lowbit --help` lists them"


def _missing(param: Any, path: str) -> str:
    name = _named(param)
    more = ", or `lowbit chat MODEL` to talk" if name == "PROMPT" else ""
    return f"{name} is missing{more}; `{path} --help` shows how the command is written"


def _named(param: Any) -> str:
    if param.param_type_name == "argument":
        found: str = (param.metavar or param.name.upper()).strip("[].")
        return found
    return str(max(param.opts, key=len))


def _near(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=2, cutoff=_NEAR)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _quoted(message: str) -> str:
    parts = message.split("'")
    return parts[1] if len(parts) > 2 else ""


def _sentence(message: str) -> str:
    text = message.strip().rstrip(".")
    return text[:1].lower() + text[1:]
