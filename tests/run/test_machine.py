"""What a run may use of its machine, and signals that end it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from proglayer.run import machine
from proglayer.run.environment import available_cores
from proglayer.run.signals import Stop, on_signals

from ..helpers import ROOT, config


def test_cores_are_those_of_the_mask_and_the_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    quota = tmp_path / "cpu.max"
    assert available_cores(quota) == 4
    for content, cores in ("50000 100000", 1), ("300000 100000", 3), ("max 100000", 4):
        quota.write_text(content + "\n")
        assert available_cores(quota) == cores


def test_the_first_signal_is_noted_and_the_second_acts_as_without() -> None:
    stop = Stop()
    with pytest.raises(KeyboardInterrupt), stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_signals_in_a_row_print_nothing() -> None:
    code = (
        "import os, signal, time\n"
        "from proglayer.run.signals import Stop\n"
        "with Stop().listening():\n"
        "    print(flush=True)\n"
        "    time.sleep(20)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        for _ in range(3):
            process.terminate()
            time.sleep(0.005)
        _, err = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM
    assert err == b""


def test_every_signal_acts_where_each_is_asked_for() -> None:
    came: list[int] = []
    with on_signals(lambda number, *_: came.append(number), once=False):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
    assert came == [signal.SIGTERM] * 3


def test_workers_share_out_the_gpus_by_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    properties = SimpleNamespace(uuid="GPU-a")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext(used.append(index)))
    for worker in range(6):
        with machine.gpu_of(worker, torch.device("cuda")) as gpu:
            assert gpu == "GPU-a"
    assert used == [0, 1, 2, 0, 1, 2]
    assert machine.places(config("device=cuda", "jobs_per_gpu=2")) == 6
    assert machine.places(config("device=cuda", "jobs_per_gpu=2", "devices=2")) == 3
    assert machine.places(config("device=cuda", "devices=auto")) == 1
    assert machine.places(config("device=cpu", "jobs_per_gpu=2")) is None
    monkeypatch.setattr(machine, "available_cores", lambda: 8)
    assert machine.places(config("device=cpu", "devices=2")) == 4
    with machine.gpu_of(5, torch.device("cpu")) as gpu:
        assert gpu is None
