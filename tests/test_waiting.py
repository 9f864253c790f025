"""Threads spin on cores that are free and sleep where others use them; bits do not tell."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from proglayer.run import waiting
from proglayer.run.waiting import CoreWatch


class Clock:
    """Steps of a second, with a share of the time of two threads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall = self.cpu = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.wall)
        monkeypatch.setattr(time, "process_time", lambda: self.cpu)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        monkeypatch.setattr(waiting, "available_cores", lambda: 2)
        for name in waiting.CHOICES:
            monkeypatch.delenv(name, raising=False)

    def steps(self, watch: CoreWatch, number: int, share: float) -> list[str]:
        told = []
        for step in range(number):
            self.wall += 1
            self.cpu += 2 * share
            told.append(watch.step(first=step == 0))
        return [line for line in told if line]


def idle_threads() -> int:
    return sum("_idle" in thread.name for thread in threading.enumerate())


def test_threads_sleep_while_others_use_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, watch = Clock(monkeypatch), CoreWatch()
    assert clock.steps(watch, 20, 0.99) == []
    assert idle_threads() == 0
    clock.steps(watch, 3, 0.6)
    assert idle_threads() == 1
    # Asleep, they get less of the time in any case; soon it is tried whether they can spin.
    clock.steps(watch, 10, 0.7)
    clock.steps(watch, 40, 0.99)
    time_to_end(0)
    clock.steps(watch, 3, 0.6)
    watch.close()
    time_to_end(0)


def time_to_end(number: int) -> None:
    for _ in range(10_000):
        if idle_threads() == number:
            return
        threading.Event().wait(0.001)
    raise AssertionError(f"{idle_threads()} idle threads")


@pytest.mark.parametrize(("share", "chosen"), [(0.3, False), (0.3, True)])
def test_a_minute_without_cores_is_told_once(
    monkeypatch: pytest.MonkeyPatch, share: float, chosen: bool
) -> None:
    clock = Clock(monkeypatch)
    if chosen:
        monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    watch = CoreWatch()
    (line,) = clock.steps(watch, 300, share)
    assert line.startswith("slow for want of cores: 0.6 of the 2 that its threads ask for")
    assert not (chosen and idle_threads())
    watch.close()
    time_to_end(0)


def test_threads_of_the_users_choice_may_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setenv("GOMP_SPINCOUNT", "0")
    watch = CoreWatch()
    assert clock.steps(watch, 300, 0.7) == []
    assert idle_threads() == 0


def test_bits_are_the_same_beside_idle_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def products() -> torch.Tensor:
        draw = torch.Generator().manual_seed(0)
        a = torch.randn(300, 700, generator=draw)
        return torch.softmax(a @ a.T, -1).sum(0).exp_() @ a

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected, watch = products(), CoreWatch()
        watch._sleep()
        time_to_end(1)
        assert torch.equal(products(), expected)
        watch.close()
        time_to_end(0)
        assert torch.equal(products(), expected)
    finally:
        torch.set_num_threads(threads)
