"""What a user reads of an error, and what a command leaves as its exit status."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable

import pytest

from proglayer.errors import ConfigError, StoreError, run_command

from .helpers import ROOT


def raising(error: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "lines"),
    [
        (ConfigError("a=1: too small\nb=2: too large"), 1, ["a=1: too small", "b=2: too large"]),
        (StoreError("cannot write to x"), 1, ["cannot write to x"]),
        (PermissionError(13, "no", "x.csv"), 1, ["cannot read or write x.csv (no)"]),
        (KeyboardInterrupt(), 130, []),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, []),
    ],
)
def test_what_a_user_can_mend_is_printed_in_lines(
    error: BaseException, status: int, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(raising(error)) == status
    assert capsys.readouterr().err.splitlines() == [f"error: {line}" for line in lines]


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(raising(ZeroDivisionError()))


PRINTING = (
    "import sys; from proglayer.errors import run_command\n"
    "def command():\n"
    "    for _ in range(20_000): print('a line')\n"
    "sys.exit(run_command(command))"
)


def test_a_reader_that_goes_away_ends_a_command_quietly() -> None:
    command = [sys.executable, "-c", PRINTING]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "a line\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141
