"""What a start leaves behind, and what a sweep says and does before and after its jobs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .helpers import ROOT
from .test_train import SHORT, Command, results, train  # noqa: F401 (a fixture)

# One epoch of a run that takes a moment.
QUICK = (*SHORT, "phase.max_epochs=1")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("given", ["plan=true", "model.num_heads=3", "data.samples=1000000"])
def test_a_start_that_trains_nothing_takes_away_only_what_it_made(
    train: Command,  # noqa: F811
    tmp_path: Path,
    given: str,
) -> None:
    (tmp_path / "other.log").write_text("a user's own")
    train(*QUICK[1:], given, "hydra.run.dir=.")
    assert list(contents(tmp_path)) == ["other.log"]
    # Nor does it take a folder that was there and empty.
    (tmp_path / "empty").mkdir()
    train(*QUICK[1:], given, "hydra.run.dir=empty")
    train(*QUICK[1:], given, "hydra.run.dir=new")
    assert (tmp_path / "empty").is_dir()
    assert not (tmp_path / "new").exists()


def test_a_mistake_leaves_a_finished_run_in_the_same_folder(
    train: Command,  # noqa: F811
    tmp_path: Path,
) -> None:
    assert train(*QUICK, "hydra.run.dir=run").status == 0
    before = contents(tmp_path / "run")
    assert train(*QUICK, "model.num_heads=3", "hydra.run.dir=run").status == 1
    after = contents(tmp_path / "run")
    assert after.keys() == before.keys()
    assert after["train.log"] == before["train.log"]


def command(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """A sweep in a process of its own, which has `folder` for its results and its store."""
    variables = {
        **os.environ,
        "PROGLAYER_STAGES": str(folder / "stages"),
        "PYTHONPATH": str(ROOT),  # workers import the package by name, wherever they start
    }
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "-m", *arguments],
        cwd=folder, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


def test_jobs_of_joblib_store_their_state_when_stopped_and_are_skipped_once_complete(
    train: Command,  # noqa: F811
    tmp_path: Path,
) -> None:
    pytest.importorskip("joblib")
    jobs = (
        *SHORT, "phase=from_scratch", "phase.max_epochs=12", "phase.patience=12", "seed=1,2,3",
        "hydra.sweep.dir=s", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2",
    )  # fmt: skip
    process = command(tmp_path, *jobs)
    deadline = time.monotonic() + 100
    while len(at_work := list((tmp_path / "s").glob("*/metrics.csv"))) < 2:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    # A terminal tells every process of the command, `kill` only the first: so one worker is told by
    # both, the other by the first process alone.
    worker = json.loads(at_work[0].with_name("heartbeat.json").read_text())["process"]
    assert worker != process.pid
    os.kill(worker, signal.SIGINT)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "Traceback" not in out
    assert [r["reason"] for r in results(tmp_path / "s")] == ["stopped by SIGINT"] * 2
    assert "2 interrupted, 1 waiting" in out
    process = command(tmp_path, *jobs)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 0, out
    records = results(tmp_path / "s")
    assert [r["status"] for r in records] == ["completed"] * 3
    assert all(r["phases"][0]["work"]["epochs_reused"] >= 1 for r in records[:2])
    # Threads that the launcher shared out are no other setting.
    assert "3 jobs in s, 3 finished before" in train("-m", *jobs).out
