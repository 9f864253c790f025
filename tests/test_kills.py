"""Commands that are killed at any moment, and go on when they are given again: the same bits.

`PROGLAYER_KILLS=20 python -m pytest tests/test_kills.py` kills each command twenty times.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .helpers import ROOT
from .test_bits import TINY, outcome

KILLS = int(os.environ.get("PROGLAYER_KILLS", "2"))
SINGLE = ("freeze=gradual", "model=deep_supervision", "checkpoint_every_s=0.05")
SWEEP = ("-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "growth=random,stack",
         "freeze=existing,none", "checkpoint_every_s=0.05")  # fmt: skip
LONGER = ("phase.max_epochs=6", "phase.patience=6")


def command(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start `train.py` in a process group of its own, with a store below `folder`."""
    kept = {"PROGLAYER_STORE": str(folder / "store"), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=folder, env=os.environ | kept, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


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
@pytest.mark.parametrize("kind", ["single", "sweep", "worker"])
def test_a_command_that_was_killed_goes_on_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    place = "hydra.run.dir=out" if kind == "single" else "hydra.sweep.dir=out"
    arguments = (*(SINGLE if kind == "single" else SWEEP), *TINY, *LONGER, place)
    whole = tmp_path / "whole"
    whole.mkdir()
    started = time.monotonic()
    process = command(whole, *arguments)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    took = time.monotonic() - started
    expected = outcomes(whole / "out")
    assert len(expected) == (1 if kind == "single" else 4)

    killed = tmp_path / "killed"
    killed.mkdir()
    draw = random.Random(KILLS)
    for number in range(KILLS):
        process = command(killed, *arguments)
        time.sleep(took * draw.uniform(0.1, 0.9))
        if kind == "worker":
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
    process = command(killed, *arguments)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert outcomes(killed / "out") == expected
    assert not workers(process.pid)
