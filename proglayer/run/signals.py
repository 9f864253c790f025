"""Signals that ask a command to stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


def stop_signals() -> list[int]:
    """The numbers of those that this system has; without SIGHUP where `nohup` says to ignore it."""
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    return [
        number
        for number in numbers
        if number != getattr(signal, "SIGHUP", None) or signal.getsignal(number) != signal.SIG_IGN
    ]


@contextlib.contextmanager
def on_signals(act: Callable[[int, object, Any], object], once: bool = True) -> Iterator[None]:
    """Have these signals call `act` until the block ends. Outside the main thread nothing changes.

    act: is given a signal's number, the frame, and the handler that it would have had.
    once: whether a second signal acts as it would have without this.
    """
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: object) -> None:
        if once:
            restore()
        act(number, frame, before[number])

    try:
        if threading.current_thread() is threading.main_thread():
            for number in stop_signals():
                before[number] = signal.getsignal(number)
                signal.signal(number, handle)
        yield
    finally:
        restore()


def interrupt(*_: object) -> NoReturn:
    """Act as Ctrl-C does: raises KeyboardInterrupt."""
    raise KeyboardInterrupt
