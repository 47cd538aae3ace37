"""Errors that a user can mend become one line on stderr and an exit code; all others are bugs and show."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from typing import Any

import typer

from lowbit.cli.help import Group
from lowbit.cli.usage import is_usage_error, usage_text
from lowbit.errors import LowbitError

MISTAKE, INTERRUPTED, UNREAD, TERMINATED = 2, 130, 141, 143
_WRITING = ("quantize", "import", "export", "dequantize")  # commands of whose work a person asks what is left
_NOTHING = " before anything was finished; nothing is left behind"
_LONGEST = 1500  # characters of an error
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


class Terminated(KeyboardInterrupt):
    """The process was told to end, as by `kill` or a queue whose time is over."""


def end_in_order() -> None:
    """SIGTERM ends the command as Ctrl-C does, so that it says what it leaves."""

    def end(*args: Any) -> None:
        raise Terminated

    with contextlib.suppress(ValueError):  # in a thread, which gets no signals
        signal.signal(signal.SIGTERM, end)


class Guarded(Group):
    """A group of commands whose expected failures end quietly."""

    def main(self, *args: Any, standalone_mode: bool = True, **how: Any) -> Any:
        """As of every group of commands; what is typed wrong is one sentence too. `standalone_mode=False` raises it, as elsewhere."""
        how["standalone_mode"] = False
        if not standalone_mode:
            return super().main(*args, **how)
        code: Any
        try:
            code = super().main(*args, **how)
        except typer.Abort:  # such as Ctrl-C before the command began
            code = INTERRUPTED
        except Exception as error:
            if not is_usage_error(error):
                raise
            if type(error).__name__ != "NoArgsIsHelpError":  # the help is on the screen
                sys.stderr.write(f"error: {usage_text(error)}\n")
            code = MISTAKE
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LowbitError as error:
            fail(str(error), error)
        except KeyboardInterrupt as error:
            ended = isinstance(error, Terminated)
            left = _notes(error) or (_NOTHING if ctx.invoked_subcommand in _WRITING else "")
            sys.stderr.write(f"\n{'terminated' if ended else 'interrupted'}{left}\n")
            raise typer.Exit(TERMINATED if ended else INTERRUPTED) from None
        except BrokenPipeError:  # whoever read the output has enough
            go_nowhere(sys.stdout)
            raise typer.Exit(UNREAD) from None
        except MemoryError as error:
            fail("not enough memory; `lowbit plan MODEL RECIPE` says how much quantizing takes", error)
        except OSError as error:
            if (message := explained(error)) is None:
                raise
            fail(message, error)


def go_nowhere(stream: Any) -> None:
    """What is still to be written to a stream that nobody reads is dropped, so that Python's end does not complain of it."""
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)


def fail(message: str, error: BaseException | None = None) -> None:
    """Print the first line of `message` (the rest only points into it) and what `error` notes of what was left; exit with code 2."""
    line = message.splitlines()[0] if message else "unknown"
    if len(line) > _LONGEST:  # what a file says may be long
        line = f"{line[: _LONGEST * 2 // 3]} ... {line[-_LONGEST // 3 :]}"
    sys.stderr.write(f"error: {line}{_notes(error)}\n")
    raise typer.Exit(MISTAKE)


def _notes(error: BaseException | None) -> str:
    """What a second run goes on from, as whoever left it noted it on the error."""
    return "".join(f"; {note}" for note in getattr(error, "__notes__", ()))


def explained(error: OSError) -> str | None:
    """What is wrong and what to do for a full disk or a forbidden place, None for any other error."""
    where = f" at {error.filename}" if error.filename else ""
    if error.errno in _FULL:
        return f"no space left on the disk{where}; make room, or name another place"
    if error.errno in _FORBIDDEN:
        return f"not allowed to read or write{where}; change its permissions, or name another place"
    return None
