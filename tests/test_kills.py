"""Commands that are killed at any moment, and go on when they are given again: the same bits.

`PROGLAYER_KILLS=20 python -m pytest tests/test_kills.py` kills each twenty times, then also a study
that adds seeds and a search: of a sweep the whole command or one of its workers, by turns; of a run
on two devices the command, its first or its other process.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest

from .helpers import is_running, start, until
from .test_bits import TINY, outcome

KILLS = int(os.environ.get("PROGLAYER_KILLS", "3"))
SINGLE = ("freeze=gradual", "checkpoint_every_s=0.05")
SWEEP = ("-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "growth=random,stack",
         "freeze=existing,none", "checkpoint_every_s=0.05")  # fmt: skip
DEVICES = ("devices=2", "model=deep_supervision", "cache_frozen=true", "checkpoint_every_s=0.05")
SETTLE = ("-m", "hydra/sweeper=settle", "experiment=original,control_unfrozen",
          "hydra.sweeper.first=2", "hydra.sweeper.step=2", "hydra.sweeper.most=4",
          "checkpoint_every_s=0.05")  # fmt: skip
SEARCH = ("-m", "hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_trials=4",
          "lr.base=0.01,0.02,0.03,0.04", "checkpoint_every_s=0.05")  # fmt: skip
# What each is, and how many runs it has.
KINDS = {"single": (SINGLE, 1), "devices": (DEVICES, 1), "sweep": (SWEEP, 4)}
if KILLS > 3:
    KINDS |= {"settle": (SETTLE, 8), "search": (SEARCH, 4)}
LONGER = ("phase.max_epochs=6", "phase.patience=6")


def workers(leader: int) -> list[int]:
    """Return the processes of the group that `leader` leads."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == leader and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def members(command: int) -> list[int]:
    """Return the processes that share a run out, the first one first."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == command and b"spawn_main" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return sorted(found)


def outcomes(folder: Path) -> dict[str, list[float]]:
    """Return what each run below `folder` left: its losses, by its weights' hash."""
    found = [outcome(path.parent) for path in folder.rglob("weights.safetensors")]
    return {each["weights"]: each["losses"] for each in found}


@pytest.mark.slow
@pytest.mark.timeout(200 + 60 * KILLS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_command_that_was_killed_goes_on_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    given, runs = KINDS[kind]
    place = "hydra.sweep.dir=out" if "-m" in given else "hydra.run.dir=out"
    set_by_it = {"settle": "seed=", "search": "lr.base="}.get(kind, "-")
    taken = [each for each in TINY if not each.startswith(set_by_it)]
    arguments = (*taken, *LONGER, *given, place)
    whole = tmp_path / "whole"
    whole.mkdir()
    started = time.monotonic()
    process = start(whole, *arguments)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    took = time.monotonic() - started
    expected = outcomes(whole / "out")
    assert len(expected) == runs

    killed = tmp_path / "killed"
    killed.mkdir()
    draw = random.Random(KILLS)
    for number in range(KILLS):
        process = start(killed, *arguments)
        time.sleep(took * draw.uniform(0.1, 0.9))
        if kind == "devices":
            ours = [process.pid, *members(process.pid)]
            with contextlib.suppress(ProcessLookupError):
                os.kill(ours[number % len(ours)], signal.SIGKILL)
            process.communicate()
            until(lambda ours=ours: not any(map(is_running, ours)))
        elif kind == "sweep" and number % 2:
            group = [pid for pid in workers(process.pid) if pid != process.pid]
            for pid in group[-1:]:
                os.kill(pid, signal.SIGKILL)
            process.communicate()
        elif process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        if len(outcomes(killed / "out")) == len(expected):  # done: from the start again
            assert outcomes(killed / "out") == expected, f"after kill {number}"
            killed = tmp_path / f"killed-{number}"
            killed.mkdir()
    process = start(killed, *arguments)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert outcomes(killed / "out") == expected
    until(lambda: not workers(process.pid))
