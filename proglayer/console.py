"""What is printed: the console, lines for it and the log, and text that is safe to print."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
from collections.abc import Iterator

from rich.console import Console

from proglayer.errors import printable

log = logging.getLogger(__name__)

# Without a terminal there is no width to keep to; this one fits every table here.
PLAIN_WIDTH = 160


class _Console(Console):
    outlasts_reader = False

    def on_broken_pipe(self) -> None:
        """Rich would end the program here: the one place for that is `errors.run_command`."""
        if not self.outlasts_reader:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        print("warning: nobody reads the output any more: going on without it", file=sys.stderr)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)


def console() -> Console:
    """Return the console that everything is printed to; wide where no terminal sets the width."""
    file = sys.stdout
    if isinstance(file, io.TextIOWrapper):
        # A terminal that knows no box characters gets question marks, not an error.
        file.reconfigure(errors="replace")
    return _Console(
        file=file,
        width=None if file.isatty() else PLAIN_WIDTH,
        highlight=False,
        soft_wrap=not file.isatty(),
    )


@contextlib.contextmanager
def outlasting_reader() -> Iterator[None]:
    """Let a block go on where the reader of its output ends, as in `... | head -1`.

    Hours of training are not for the output alone. Standard error says so, once.
    """
    _Console.outlasts_reader = True
    try:
        yield
    finally:
        _Console.outlasts_reader = False


def tell(text: str) -> None:
    """Print a line, and write it to the log."""
    log.info("%s", text)
    console().print(printable(text), markup=False)


def one_line(text: str) -> str:
    """Return text without line breaks or anything that a terminal would act on."""
    return printable(" ".join(text.split()))


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: `1 run`, `1,200 runs`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
