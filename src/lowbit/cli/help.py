"""What `--help` prints: options in sections, one line for each command, examples as they are typed.

The section of an option or a command is its `rich_help_panel`. Nothing here imports more than is needed to draw, so that help is quick.
"""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup

from lowbit.cli import console
from lowbit.report.layout import Lines, wrapped

if TYPE_CHECKING:
    from rich.text import Text

FEW = 6  # options, up to which sections would only get in the way
BASIC, CALIBRATION, TARGET, MEASURING = "Basic", "Calibration", "Target (mixed precision)", "Measuring"
PROGRAMS, OUTPUT, SAMPLING, ENGINE = "Other programs", "Output", "Sampling", "Engine"
SECTIONS = (BASIC, CALIBRATION, TARGET, PROGRAMS, SAMPLING, ENGINE, MEASURING, OUTPUT)
_WIDEST = 100  # columns; longer lines are hard to read
_COLUMN = 28  # columns at most for the name of an option, beside which its help stands
_VALUE = "VALUE"  # of an option that does not say what it takes


class Command(TyperCommand):
    """A command whose help has sections."""

    def invoke(self, ctx: Any) -> Any:
        """As of every command; where an error proposes a command for MODEL, it is for the model that was typed."""
        from lowbit.errors import LowbitError

        try:
            return super().invoke(ctx)
        except LowbitError as error:
            typed = ctx.params.get("model")
            if isinstance(typed, str) and error.args:
                named = shlex.quote(typed)
                text = re.sub(r"(lowbit [a-z]+) MODEL\b", lambda found: f"{found[1]} {named}", str(error.args[0]))
                error.args = (text, *error.args[1:])
            raise

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, as wide as the terminal."""
        _print(lambda width: _of_command(self, ctx, width))


class Group(TyperGroup):
    """Commands in sections, each on one line."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, as wide as the terminal."""
        _print(lambda width: _of_group(self, ctx, width))


class App(typer.Typer):
    """An app whose commands have such help, however they are registered."""

    def command(self, *args: Any, **how: Any) -> Any:
        """As of `typer.Typer`."""
        return super().command(*args, **{"cls": Command, **how})


def _print(lines_in: Callable[[int], Iterator[Text]]) -> None:
    """On stdout at once, as typer does it: what is left to the formatter is not shown where no argument was given."""
    screen = console.stdout()
    screen.print(Lines(list(lines_in(min(screen.width, _WIDEST)))))


def _of_command(command: Any, ctx: Any, width: int) -> Iterator[Text]:
    from rich.text import Text

    params = [p for p in command.get_params(ctx) if not getattr(p, "hidden", False)]
    arguments = [p for p in params if p.param_type_name == "argument"]
    options = [p for p in params if p.param_type_name != "argument"]
    needed = [f"{p.opts[0]} {p.metavar or _VALUE}" for p in options if p.required]
    usage = " ".join([ctx.command_path, *map(_placed, arguments), *needed, "[OPTIONS]"])
    yield from wrapped(Text.assemble(("Usage: ", "bold"), usage), width)
    yield from _paragraphs(command.help, width)
    rows = {"Arguments": [(_argument(p), _help(p, ctx)) for p in arguments]}
    for section, members in _sections(options):
        rows[section] = [(_option(p), _help(p, ctx)) for p in members]
    yield from _tables(rows, width)
    yield from _examples(command.epilog)


def _sections(options: list[Any]) -> list[tuple[str, list[Any]]]:
    """Options by section, in the order of `SECTIONS`; one section for a few options. What has no section is basic."""
    own = [p for p in options if p.name != "help"]
    if len(own) <= FEW:
        return [("Options", options)]
    found: dict[str, list[Any]] = {section: [] for section in SECTIONS}
    for option in own:
        found.setdefault(getattr(option, "rich_help_panel", None) or BASIC, []).append(option)
    filled = [(section, members) for section, members in found.items() if members]
    filled[-1][1].extend(p for p in options if p.name == "help")
    return filled


def _of_group(group: Any, ctx: Any, width: int) -> Iterator[Text]:
    from rich.text import Text

    yield Text.assemble(("Usage: ", "bold"), f"{ctx.command_path} COMMAND [ARGUMENTS] [OPTIONS]")
    yield from _paragraphs(group.help, width)
    rows: dict[str, list[tuple[str, Text]]] = {}
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        if command is not None and not command.hidden:
            said = command.short_help or re.split(r"(?<=\.)\s", (command.help or "").strip(), maxsplit=1)[0]
            rows.setdefault(getattr(command, "rich_help_panel", None) or "Other", []).append((name, _text(said)))
    rows["Options"] = [(_option(p), _help(p, ctx)) for p in group.get_params(ctx)]
    yield from _tables(rows, width)
    yield from _examples(group.epilog)


def _tables(rows: dict[str, list[tuple[str, Text]]], width: int) -> Iterator[Text]:
    """Sections of names with what is said of each, in one column for all of them."""
    from rich.text import Text

    column = min(_COLUMN, max(len(name) for section in rows.values() for name, _ in section)) + 4
    for section, members in rows.items():
        if members:
            yield from (Text(), Text(section, "bold"))
        for name, said in members:
            head, lines = Text(f"  {name}", "cyan"), wrapped(said, width - column)
            if head.cell_len + 2 > column:
                yield head
                head = Text()
            for line in lines:
                yield Text().append_text(head).append(" " * (column - head.cell_len)).append_text(line)
                head = Text()


def _paragraphs(text: str | None, width: int) -> Iterator[Text]:
    from rich.text import Text

    for paragraph in inspect.cleandoc(text or "").split("\n\n"):
        if paragraph:
            yield Text()
            yield from wrapped(_text(re.sub(r"\s*\n\s*", " ", paragraph)), width)


def _examples(epilog: str | None) -> Iterator[Text]:
    """Each line as it is: commands are copied."""
    from rich.text import Text

    lines = [line.strip() for line in (epilog or "").splitlines() if line.strip()]
    if lines:
        yield Text()
    for line in lines:
        yield Text(f"  {line}", "cyan") if line.startswith("lowbit") else Text(line, "bold")


def _text(markup: str) -> Text:
    from rich.text import Text

    return Text.from_markup(markup)


def _argument(param: Any) -> str:
    name: str = re.sub(r"[][]", "", param.metavar or (param.name or "").upper())
    return name + ("..." if param.nargs != 1 and not name.endswith("...") else "")


def _placed(param: Any) -> str:
    """An argument as the usage shows it."""
    return _argument(param) if param.required else f"[{_argument(param)}]"


def _option(param: Any) -> str:
    names = ", ".join(sorted(param.opts, key=len))
    if param.secondary_opts:
        names = "/".join((names, *param.secondary_opts))
    value = "" if getattr(param, "is_flag", False) else param.metavar or _VALUE
    return f"{names} {value}".strip()


def _help(param: Any, ctx: Any) -> Text:
    """What an option is for, and its default where that says something."""
    text = _text(param.help or "")
    shown, default = getattr(param, "show_default", True), param.default
    if isinstance(shown, str):
        text.append(f" (default: {shown})", "dim")
    elif shown and _tells(default) and not getattr(param, "is_flag", False):
        text.append(f" (default: {f'{default:g}' if isinstance(default, float) else default})", "dim")
    if param.required and param.param_type_name != "argument":
        text.append(" (required)", "dim")
    return text


def _tells(default: Any) -> bool:
    return isinstance(default, (str, int, float)) and default != ""
