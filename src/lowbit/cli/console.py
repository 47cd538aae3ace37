"""Where the commands print: results to stdout, progress and errors to stderr."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from lowbit.report.progress_view import Shown

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

        class ToStderr(logging.StreamHandler):  # type: ignore[type-arg]
            def emit(self, record: logging.LogRecord) -> None:
                self.stream = (
                    sys.stderr
                )  # the one of now: whoever runs commands in one process may put another in its place
                super().emit(record)

        handler = ToStderr()
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
def progress(what: str, unit: str = "") -> Iterator[Shown]:
    """What a long call reports, drawn on stderr: two moving lines that go away when it is done, and where stderr is no terminal a plain
    line when work begins and every ten seconds."""
    from lowbit.interchange.pace import Tracker
    from lowbit.report.progress_view import drawn

    with drawn(Tracker(what, unit), stderr(), _line) as shown:
        yield shown


@contextmanager
def bytes_bar(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar with the time left, moved by calls of (name, bytes done, bytes in all)."""
    with progress(what, "bytes") as shown:
        yield lambda name, done, total: shown.move(done, total, name)


@contextmanager
def share_bar(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """The same, which shows the share alone: what is counted is not bytes throughout."""
    with progress(what, "%") as shown:
        yield lambda name, done, total: shown.move(done, total, name)


@contextmanager
def layers_bar(what: str) -> Iterator[tuple[Callable[[str, int, int], None], Callable[[Any], None]]]:
    """A bar moved by calls of (name, done, in all), which shows the share, and a function that takes what became of each layer: the bar then shows the error of its output,
    of round-to-nearest and of the result, and the memory of the process."""
    from lowbit.interchange.progress import TEXT
    from lowbit.measure.memory import peak_resident

    found = {"name": "", "text": ""}

    def layer(solved: Any) -> None:
        output = solved.output
        errors = ""
        if output is not None:
            errors = f", error of its output {100 * output.final:.2g} % (by rounding to nearest {100 * output.nearest:.2g} %)"
        found["name"], found["text"] = solved.plan.name, f"{errors}, {peak_resident() / 2**20:.0f} MiB of memory"

    with progress(what, "%") as shown:
        yield (
            lambda name, done, total: shown.move(
                done, total, name + (found["text"] if name == found["name"] else ""), name == TEXT
            ),
            layer,
        )


@contextmanager
def steps() -> Iterator[tuple[Callable[[str], None], Callable[[int, int], None]]]:
    """What goes on, from step to step: (say(what begins), move(done, in all)), the latter for steps that are counted."""
    with progress("") as shown:
        yield shown.say, shown.move


@contextmanager
def count_bar(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left, moved by calls of (done, in all)."""
    with progress(what, unit) as shown:
        yield shown.move


def _line(what: str) -> None:
    """A plain line on stderr, at once."""
    sys.stderr.write(what + "\n")
    sys.stderr.flush()
