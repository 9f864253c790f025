"""A run on several devices: two processes on this machine's processor."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from proglayer.run import machine

from ..helpers import Command, free_port, is_running, losses, results, start, until
from ..test_bits import TINY, outcome
from ..test_kills import members

TWO = (*TINY, "devices=2", "model=deep_supervision", "phase.batch_size=15", "hydra.run.dir=out")
LONG = ("phase.max_epochs=500", "phase.patience=500", "checkpoint_every_s=1000")


@pytest.fixture(autouse=True)
def enough_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_cores", lambda: 2)


def test_two_devices_give_the_same_bits_twice_and_the_figures_of_one(tmp_path: Path) -> None:
    settings = {"one": ("devices=1",), "two": (), "again": ()}
    for name, others in settings.items():
        (tmp_path / name).mkdir()
        process = start(tmp_path / name, *TWO, *others)
        said, _ = process.communicate()
        assert process.returncode == 0, said
        assert said.count("phase 1/2") == 1  # the first process alone shows anything
    assert outcome(tmp_path / "two" / "out") == outcome(tmp_path / "again" / "out")
    one, two, again = (results(tmp_path / name)[0] for name in settings)
    assert two["machine"]["processes"] == 2
    keys = [[phase["trajectory"] for phase in run["phases"]] for run in (one, two, again)]
    assert keys[0] != keys[1] == keys[2]
    for mine, other in zip(losses(two), losses(one), strict=True):
        assert mine[0] is other[0] is None or mine[0] == pytest.approx(other[0], rel=1e-5)
        assert mine[1] == pytest.approx(other[1], rel=1e-5)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_signal_to_any_process_ends_all_once_their_state_is_stored(
    place: int, tmp_path: Path
) -> None:
    process = start(tmp_path, *TWO, *LONG)

    def at_work() -> bool:
        path = tmp_path / "out" / "run.json"
        return path.exists() and len(json.loads(path.read_text())["epochs"]) > 1

    until(at_work, process)
    ours = [process.pid, *members(process.pid)]
    os.kill(ours[place], signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "stopped by SIGTERM; it goes on by the same command" in said
    assert not any(map(is_running, ours))
    (record,) = results(tmp_path)
    assert (record["state"], record["reason"]) == ("interrupted", "stopped by SIGTERM")
    assert len([*(tmp_path / "stages").glob("*/state-*")]) == 1


JOBLIB = (
    "-m",
    *TWO[:-1],
    "hydra/launcher=joblib",
    "hydra.launcher.n_jobs=1",
    "hydra.sweep.dir=out",
)


def test_a_worker_of_joblib_starts_the_processes_of_its_job(tmp_path: Path) -> None:
    runs = {"sweep": JOBLIB, "run": TWO}
    for name, arguments in runs.items():
        (tmp_path / name).mkdir()
        process = start(tmp_path / name, *arguments)
        said, _ = process.communicate(timeout=100)
        assert process.returncode == 0, said
    (job,) = (tmp_path / "sweep" / "out").glob("0_*")
    assert outcome(job) == outcome(tmp_path / "run" / "out")


def test_ctrl_c_at_a_terminal_lets_processes_below_a_worker_store_their_state(
    tmp_path: Path,
) -> None:
    """A terminal signals all of them, and the command passes it on to its worker once more."""
    process = start(tmp_path, *JOBLIB, *LONG, "model.dim=192")

    def at_work() -> bool:
        paths = [*tmp_path.glob("out/0_*/run.json")]
        return bool(paths) and len(json.loads(paths[0].read_text())["epochs"]) > 1

    until(at_work, process)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert results(tmp_path)[0]["state"] == "interrupted"
    assert len([*(tmp_path / "stages").glob("*/state-*")]) == 1


@pytest.mark.parametrize(
    ("setting", "named"), [("lr.base=0.5", "settings"), ("data.validation_samples=19", "text")]
)
def test_a_process_that_would_train_something_else_is_named(
    setting: str, named: str, tmp_path: Path
) -> None:
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    both = [
        start(tmp_path, *TWO, *others, **where, RANK=str(rank))
        for rank, others in enumerate([(), (setting,)])
    ]
    (said, _), _ = (process.communicate(timeout=100) for process in both)
    assert [process.returncode for process in both] == [1, 0], said
    assert re.search(f"process 1 of this run, on .*, differs from the first in .*{named}", said)
    assert results(tmp_path)[0]["state"] == "failed"


def test_a_loss_that_is_not_finite_ends_all(tmp_path: Path) -> None:
    process = start(tmp_path, *TWO, "lr.base=1e15", "optimizer.clip_norm=null")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1, said
    assert re.search(r"the (training|validation) loss became (nan|inf)", said)
    assert results(tmp_path)[0]["state"] == "failed"


def taken(monkeypatch: pytest.MonkeyPatch) -> str:
    """Have the first of a group meet a port that somebody listens at."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    monkeypatch.setattr(taken, "listener", listener, raising=False)  # until the test ends
    return in_group(monkeypatch, 0, listener.getsockname()[1])


def in_group(monkeypatch: pytest.MonkeyPatch, rank: int = 1, port: int | None = None) -> str:
    """Be one of two processes whose first is not there; gives where it should be."""
    port = port or free_port()
    where = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in where.items():
        monkeypatch.setenv(name, str(value))
    return f"127.0.0.1:{port}"


def with_mps(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    return "each takes a mps device, and there are 1 here"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("devices=0", "devices=0 should be a number of devices from 1, or auto"),
        ("devices=9", "devices=9: each takes a core, and there are 2 here"),
        ("devices=2 phase.batch_size=1", "batch_size=1 is smaller than devices=2"),
        ("devices=2 device=mps", with_mps),
        ("devices=1", lambda patch: in_group(patch) and "devices=1: this process was started as"),
        ("devices=2", in_group),
        ("devices=2", taken),
    ],
)
def test_what_cannot_work_is_one_line(
    settings: str,
    expected: str | Callable[[pytest.MonkeyPatch], str],
    train: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = expected if isinstance(expected, str) else expected(monkeypatch)
    done = train(*TINY, *settings.split(), "join_timeout_s=1", "hydra.run.dir=out")
    assert done.status == 1
    assert words in done.err
    assert done.err.count("error: ") == 1
    assert "Traceback" not in done.err


def test_a_sweep_is_not_started_by_torchrun(
    train: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_group(monkeypatch)
    done = train("-m", *TINY, "devices=2", "seed=1,2", "hydra.sweep.dir=out")
    assert done.status == 1
    assert done.err.startswith("error: -m: this process was started as one of 2 of a run")
    assert "give the command without torchrun" in done.err
