"""Errors that a user can mend, and the one place that turns errors into lines and exit statuses."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Iterator

FAILED = 1
INTERRUPTED = 130
# What a shell reports of a program whose reader went away (128 + SIGPIPE).
PIPE_CLOSED = 141


class UserError(Exception):
    """Something that a user can mend. The message has one line per problem; each names the setting,
    the file or the command to change.
    """


class ConfigError(UserError, ValueError):
    """A setting that cannot work."""


class StoreError(UserError, OSError):
    """Something cannot be written: the message says where, why and which setting moves it."""


def run_command(command: Callable[[], int | None], failed: int = FAILED) -> int:
    """Run a command and return its exit status.

    A UserError is printed as `error: ...` lines on stderr, and so is an OSError that names a file.
    A reader of the output that goes away (`... | head -1`) ends the command quietly. Any other
    exception is a fault of the program and is raised, with its traceback.

    failed: the status where an error was printed.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Better a question mark for an arrow than no table where the locale knows only ASCII.
            stream.reconfigure(errors="replace")
    try:
        try:
            return command() or 0
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
        return PIPE_CLOSED
    except KeyboardInterrupt:
        return INTERRUPTED
    except UserError as error:
        print_error(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        print_error(f"cannot read or write {error.filename} ({error.strerror})")
    return failed


def print_error(lines: str) -> None:
    """Print each line as an error."""
    for line in lines.splitlines():
        print(f"error: {printable(line)}", file=sys.stderr)


def printable(text: str) -> str:
    """Return text without what a terminal would act on, such as escapes in a folder's name."""
    return "".join(c if c.isprintable() else " " for c in text)


def install_command(extra: str) -> str:
    """Return what installs an extra of this checkout, in versions that work together."""
    return f"pip install -c constraints.txt -e '.[{extra}]'"


def check_installed(choice: str, module: str) -> None:
    """Raise ConfigError where a choice, such as `hydra/launcher=ray`, needs a module not here.

    The extra that brings it has the choice's name.
    """
    if importlib.util.find_spec(module) is None:
        extra = choice.rpartition("=")[2]
        raise ConfigError(f"{choice} is not installed: {install_command(extra)}")


@contextlib.contextmanager
def raised_as(
    kind: type[UserError], said: str, *errors: type[BaseException], then: str = ""
) -> Iterator[None]:
    """Turn errors of these types into one that a user can mend: what is said, the reason in
    parentheses, and then what to do.
    """
    try:
        yield
    except errors as error:
        raise kind(f"{said} ({first_line(error)}){then}") from error


def first_line(error: BaseException) -> str:
    """Return what an error says, in one line; its type's name where it says nothing."""
    said = str(getattr(error, "strerror", None) or error)  # an OSError's without path and number
    return next(filter(None, map(str.strip, said.splitlines())), type(error).__name__)


def with_type(error: BaseException) -> str:
    """Return an error that nobody foresaw in one line: its type and all that it says."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def discard_output() -> None:
    """Send what is still to be printed nowhere: Python would fail at it once more when it ends."""
    with contextlib.suppress(OSError):  # a stand-in for stdout has no number
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
