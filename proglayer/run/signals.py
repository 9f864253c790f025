"""Signals that ask a command to stop."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

# How often a process looks whether its parent lives.
LOOK_S = 1.0
# In a process that works for another one: the signals that what it does has seen.
stopped: list[int] = []
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


def stop_signals() -> list[int]:
    """Return the numbers of those that this system has; no SIGHUP where `nohup` ignores it."""
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
    once: a second signal acts as it would have without this.
    """
    before: dict[int, Any] = {}
    came: list[int] = []

    def handle(number: int, frame: object) -> None:
        came.append(number)
        if not once or not came[1:]:
            act(number, frame, before[number])
        elif callable(before[number]):
            before[number](number, frame)
        else:
            # Python says that it ignored a signal whose handler went meanwhile: so it goes here.
            signal.signal(number, before[number])
            os.kill(os.getpid(), number)

    try:
        if threading.current_thread() is threading.main_thread():
            for number in stop_signals():
                before[number] = signal.getsignal(number)
                signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def signal_children(number: int) -> None:
    """Send a signal to each process that this one started by multiprocessing and that is there."""
    for child in multiprocessing.active_children():
        if child.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, number)


@functools.cache
def follow_parent(parent: int) -> None:
    """Once the parent of this process is gone, stop what it does, and it as soon as `stopped` has a
    signal: then its state is stored.
    """

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_S)
        os.kill(os.getpid(), signal.SIGTERM)
        while not stopped:
            time.sleep(LOOK_S / 10)
        os._exit(1)

    threading.Thread(target=follow, name="follow-parent", daemon=True).start()


def end_unless_at_work(number: int, _: object) -> None:
    """Be the handler of a process that a signal ends at once, but for a run's own, which notes it:
    a second one to a process that stores its state changes nothing.
    """
    if signal.getsignal(number) is end_unless_at_work:
        os._exit(128 + number)


def interrupt(*_: object) -> NoReturn:
    """Act as Ctrl-C does: raises KeyboardInterrupt."""
    raise KeyboardInterrupt


@dataclass
class Stop:
    """What the training loop asks once a step: whether a signal came that ends the run.

    signal: its name.
    requeue: what a user's signal would have done without this, if somebody listened to it: the way
        in which a scheduler's agent learns that its job is to be put back into the queue. To be
        called once the state is stored; it may end the process.
    """

    signal: str | None = None
    requeue: Callable[[], object] | None = None

    def listening(self) -> contextlib.AbstractContextManager[None]:
        """Note the first signal while the block lasts; a second one ends the process at once."""
        return on_signals(self.note)

    def note(self, number: int, frame: object, before: Any) -> None:
        """Take note of a signal, as `on_signals` has it."""
        self.signal = signal.Signals(number).name
        ours = str(getattr(before, "__module__", "")).startswith("proglayer.")
        if callable(before) and not ours and self.signal.startswith("SIGUSR"):
            self.requeue = functools.partial(before, number, frame)
