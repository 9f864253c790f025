"""What is printed: the console, lines for it and the log, and text that is safe to print."""

from __future__ import annotations

import logging
import sys

from rich.console import Console

from proglayer.errors import discard_output, printable

log = logging.getLogger(__name__)

# Without a terminal there is no width to keep to; this one fits every table here.
PLAIN_WIDTH = 160


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Go on where nobody reads the output any more: work is not for the output alone."""
        discard_output()


def console() -> Console:
    """Return the console that everything is printed to; wide where no terminal sets the width."""
    terminal = sys.stdout.isatty()
    return _Console(
        width=None if terminal else PLAIN_WIDTH, highlight=False, soft_wrap=not terminal
    )


def say(text: str) -> None:
    """Print lines."""
    for line in text.splitlines():
        console().print(printable(line), markup=False)


def tell(text: str) -> None:
    """Print lines, and write them to the log."""
    log.info("%s", text)
    say(text)


def one_line(text: str) -> str:
    """Return text without line breaks or anything that a terminal would act on."""
    return printable(" ".join(text.split()))


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: `1 run`, `1,200 runs`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
