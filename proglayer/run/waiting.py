"""How the threads of a run wait for each other: spinning, or asleep where others use their cores.

At the end of a parallel loop a thread of libgomp, which torch's wheels for Linux bring, spins for
milliseconds: no time is lost in waking it up, but on a machine that does other work it may keep a
core from the thread that it waits for. With more threads than cores libgomp lets them sleep at once
(its manual, GOMP_SPINCOUNT); so while others use the cores, idle threads are added. Which thread
computes what stays the same, and so do the bits. Figures: docs/performance.md.
"""

from __future__ import annotations

import math
import os
import threading
import time

import torch

from proglayer.run.environment import available_cores

# Steps of so many seconds tell whether the cores are free.
WINDOW_S = 1.0
# Threads sleep so long until it is tried whether they can spin again: twice as long each time.
SHORTEST_S, LONGEST_S = 2.0, 32.0
# A run goes so long without cores until it says so.
SAID_S = 60.0
# On cores that nobody else uses, threads that spin get at least this share of the time.
FREE = 0.85
# Where the user chose how threads wait they may sleep on free cores, too.
CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
FREE_AS_CHOSEN = 0.5
# Beyond this most cores have no thread of the run, and the system finds it another.
MOST_IDLE = 16


class CoreWatch:
    """Sees whether steps on the processor get the cores that their threads ask for."""

    def __init__(self) -> None:
        self._threads = torch.get_num_threads()
        self._chosen = any(name in os.environ for name in CHOICES)
        self._wall = self._cpu = 0.0  # of the steps since cores were last looked at
        self._last = time.monotonic(), time.process_time()
        self._until = 0.0
        self._rest = SHORTEST_S
        self._idle: threading.Event | None = None
        self._short: float | None = None
        self._said = False

    def step(self, first: bool) -> str | None:
        """See the end of a step. Returns a line, once, after a minute without cores.

        first: the step is the first after something else.
        """
        last, self._last = self._last, (time.monotonic(), time.process_time())
        now = self._last[0]
        if first or self._threads == 1:
            return None
        if self._idle is not None:
            if now > self._until:
                self.close()
            return None
        self._wall += now - last[0]
        self._cpu += self._last[1] - last[1]
        if self._wall < WINDOW_S:
            return None
        cores = self._cpu / self._wall
        self._wall = self._cpu = 0.0
        if cores > self._threads * (FREE_AS_CHOSEN if self._chosen else FREE):
            self._short, self._rest = None, SHORTEST_S
            return None
        if not self._chosen:
            self._until, self._rest = now + self._rest, min(2 * self._rest, LONGEST_S)
            self._sleep()
        if self._short is None:
            self._short = now
        if self._said or now - self._short < SAID_S:
            return None
        self._said = True
        return (
            f"slow for want of cores: {cores:.1f} of the {self._threads} that its threads ask for "
            "were its own for a minute: set threads=1, or run fewer jobs at once"
        )

    def _sleep(self) -> None:
        """Add so many idle threads that there are more than cores."""
        others = math.ceil((available_cores() + 1 - self._threads) / (self._threads - 1))
        self._idle = threading.Event()
        if others <= MOST_IDLE:
            for _ in range(others):
                threading.Thread(
                    target=_idle, args=(self._threads, self._idle), daemon=True
                ).start()

    def close(self) -> None:
        """Let go of the idle threads: threads spin again."""
        if self._idle is not None:
            self._idle.set()
        self._idle = None


def _idle(threads: int, until: threading.Event) -> None:
    """Hold a team of OpenMP's threads, which has nothing to do."""
    torch.zeros(threads * 65_536).add_(1)
    until.wait()
