"""Sweeps that are killed at any moment, and go on when they are given again: the same bits.

`PROGLAYER_KILLS=20 python -m pytest tests/test_kills.py` kills it twenty times: the whole command
or one of its workers, by turns. A single run is killed in test_entries.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from .helpers import start
from .test_bits import TINY, outcome

KILLS = int(os.environ.get("PROGLAYER_KILLS", "3"))
SWEEP = ("-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "growth=random,stack",
         "freeze=existing,none", "checkpoint_every_s=0.05")  # fmt: skip
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


def outcomes(folder: Path) -> dict[str, dict[str, object]]:
    """Return what each run below `folder` left, by the run's number."""
    runs = sorted(path.parent for path in folder.rglob("weights.safetensors"))
    return {run.name.split("_")[0]: outcome(run) for run in runs}


@pytest.mark.slow
@pytest.mark.timeout(200 + 60 * KILLS)
def test_a_sweep_that_was_killed_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    arguments = (*SWEEP, *TINY, *LONGER, "hydra.sweep.dir=out")
    whole = tmp_path / "whole"
    whole.mkdir()
    started = time.monotonic()
    process = start(whole, *arguments)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    took = time.monotonic() - started
    expected = outcomes(whole / "out")
    assert len(expected) == 4

    killed = tmp_path / "killed"
    killed.mkdir()
    draw = random.Random(KILLS)
    for number in range(KILLS):
        process = start(killed, *arguments)
        time.sleep(took * draw.uniform(0.1, 0.9))
        if number % 2:
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
    assert not workers(process.pid)
