"""Where the commands print: results to stdout, progress and errors to stderr."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_FILE_WIDTH = 140  # columns when the output is no terminal, so that names in a log or a pipe stay whole


def prepare_streams() -> None:
    """Standard streams that take any text: one that is closed goes nowhere and gives nothing, and characters that an
    encoding lacks, such as an emoji in a pipe on Windows, become `?` rather than an error."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  as long as the process
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def stdout() -> Console:
    """The console of results."""
    return _console(sys.stdout, stderr=False)


def stderr() -> Console:
    """The console of everything else."""
    return _console(sys.stderr, stderr=True)


def _console(stream: Any, stderr: bool) -> Console:
    from rich.console import Console

    class Own(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # as of any other write: the command ends quietly

        def print(self, *objects: Any, crop: bool = False, **how: Any) -> None:
            super().print(*objects, crop=crop, **how)  # a long name runs over the edge of the terminal, and is whole

    width = None if stream.isatty() else shutil.get_terminal_size((_FILE_WIDTH, 25)).columns
    return Own(stderr=stderr, highlight=False, width=width)


def print_json(value: Any) -> None:
    """`value` as JSON on stdout and nothing else; text is taken to be JSON already."""
    text = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    sys.stdout.write(text.rstrip("\n") + "\n")


def print_result(as_json: bool, plain: Callable[[], Any], drawn: Callable[[int], Any]) -> None:
    """What a command found on stdout: `plain()` as JSON, or what `drawn` gives for so many columns."""
    if as_json:
        print_json(plain())
    else:
        screen = stdout()
        screen.print(drawn(screen.width))


def say(screen: Console, text: str, style: str = "") -> None:
    """Text without markup, wrapped between words only: a recipe or a path in it can be copied."""
    from rich.text import Text

    from lowbit.report.layout import Lines, wrapped

    screen.print(Lines(wrapped(Text(text, style), screen.width)))


def escaped(text: str) -> str:
    """`text` that is printed as it is, whatever brackets it has."""
    from rich.markup import escape

    return escape(text)


def quiet() -> None:
    """Keep the libraries below from drawing bars and advice of their own; their errors still show."""
    import logging
    import warnings

    from transformers import logging as theirs

    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(transformers|torch|huggingface_hub)(\.|$)")
    log = logging.getLogger("lowbit")  # such as "downloading SmolLM2 (93 MB, once)"
    if not log.handlers:
        handler = logging.StreamHandler()
        said: set[str] = set()  # a command may open a model several times

        def first(record: logging.LogRecord) -> bool:
            text = record.getMessage()
            return text not in said and not said.add(text)  # type: ignore[func-returns-value]

        handler.addFilter(first)
        log.addHandler(handler)
        log.setLevel(logging.INFO)


def dim(text: str) -> None:
    """One quiet line on stderr."""
    stderr().print(f"[dim]{escaped(text)}[/dim]", soft_wrap=True)


@contextmanager
def bytes_bar(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar with MB/s and the time left, moved by calls of (name, bytes done, bytes in all)."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        TimeRemainingColumn(), TextColumn("[dim]{task.fields[name]}"),
    )  # fmt: skip
    with _moving(what, columns, name="") as move:
        yield lambda name, done, total: move(done, total, name=name)


@contextmanager
def layers_bar(what: str) -> Iterator[tuple[Callable[[str, int, int], None], Callable[[Any], None]]]:
    """`bytes_bar`, and a function that takes what became of each layer: the bar then shows the error of its output,
    of round-to-nearest and of the result, and the memory of the process."""
    from lowbit.measure.memory import peak_resident

    found = {"text": ""}

    def layer(solved: Any) -> None:
        output = solved.output
        errors = f"  error {output.nearest:.3f} -> {output.final:.3f}" if output is not None else ""
        found["text"] = f"{errors}  {peak_resident() / 2**20:.0f} MiB"

    with bytes_bar(what) as move:
        yield lambda name, done, total: move(name + found["text"], done, total), layer


@contextmanager
def steps(unit: str) -> Iterator[tuple[Callable[[str], None], Callable[[int, int], None]]]:
    """What goes on, from step to step: (say(what begins), move(done, in all)), the latter for steps that are counted."""
    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
        TimeElapsedColumn(),
    )  # fmt: skip
    with _bar(*columns) as bar:
        task: Any = None

        def say(what: str) -> None:
            nonlocal task
            if bar.disable:
                _line(what)
            if task is not None:
                bar.remove_task(task)
            task = bar.add_task(what, total=None)

        def move(done: int, total: int) -> None:
            if task is not None:
                bar.update(task, completed=done, total=total)

        yield say, move


@contextmanager
def count_bar(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left, moved by calls of (done, in all)."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with _moving(what, columns) as move:
        yield move


@contextmanager
def _moving(what: str, columns: Sequence[Any], **fields: Any) -> Iterator[Callable[..., None]]:
    """A bar moved by calls of (done, in all), with other `fields` of its columns by name."""
    with _bar(*columns) as bar:
        task, begun = bar.add_task(what, total=None, **fields), False

        def move(done: int, total: int, **fields: Any) -> None:
            nonlocal begun
            if bar.disable and not begun:  # not before the first step: an error of what was asked for stands alone
                _line(what)
            begun = True
            bar.update(task, completed=done, total=total, **fields)

        yield move


def _line(what: str) -> None:
    """A step as a plain line on stderr, at once: a log or a pipe shows where a long command is."""
    sys.stderr.write(what + "\n")
    sys.stderr.flush()


def _bar(*columns: Any) -> Progress:
    """A bar on stderr that goes away when done; none where stderr is no terminal, which gets plain lines."""
    from rich.progress import Progress

    console = stderr()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
