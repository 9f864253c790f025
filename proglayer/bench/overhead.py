"""What the jobs of a sweep cost beside their training: time, memory, files."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from proglayer.config import ConfigError

TRAIN = Path(__file__).resolve().parents[2] / "train.py"

# Four experiments of five distinct phases on so little text that a phase trains in a blink: what
# is left is composing, checking, launching, the store and the records.
SWEPT = (
    "experiment=original,split_lr,control_unfrozen,control_keep_training",
    "data.samples=64",
    "data.validation_samples=32",
    "data.max_vocab=200",
    "model.dim=8",
    "model.num_heads=2",
    "phase.max_epochs=1",
    "phase.batch_size=64",
    "threads=1",
    "report=false",
)
EXPERIMENTS = 4
ALONE = (
    "the sweep",
    "again elsewhere, all stored",
    "again, all completed",
    "its table",
    "its report",
)


@dataclass(frozen=True)
class Spent:
    """What a command over the jobs of a sweep took, with its workers: time and CPU time in seconds,
    the largest peak of memory of a process in MB (10^6 bytes).
    """

    jobs: int
    command: str
    seconds: float
    cpu_seconds: float
    peak_mb: float


@dataclass(frozen=True)
class Left:
    """What a sweep left on disk: files, and bytes in them, of its folder and of the store; and the
    locks among the store's files. A job holds one of them at a time.
    """

    jobs: int
    files: int
    bytes: int
    stored_files: int
    stored_bytes: int
    locks: int


def measure_sweep(jobs: int, folder: Path, overrides: Sequence[str]) -> tuple[list[Spent], Left]:
    """Run a sweep of about `jobs` jobs in an empty folder, and all that reads it.

    Raises ConfigError with what a command said that failed.
    """
    seeds = max(1, jobs // EXPERIMENTS)
    train = [str(TRAIN), "-m", *SWEPT, f"seed=range(0,{seeds})"]
    train += [f"stages.dir={folder / 'stages'}", f"hydra.sweep.dir={folder / 'again'}", *overrides]
    first, read = f"hydra.sweep.dir={folder / 'first'}", str(folder / "first")
    commands = (
        [*train, first],
        train,
        train,
        ["-m", "proglayer.results", read],
        ["-m", "proglayer.report", read, "-o", str(folder / "report")],
    )
    spent = []
    for name, command in zip(ALONE, commands, strict=True):
        with open(folder / "said.txt", "w+", encoding="utf-8") as said:
            began = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, *command], cwd=folder, stdout=said, stderr=subprocess.STDOUT
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            seconds = time.perf_counter() - began
            if status:
                said.seek(0)
                raise ConfigError(f"--sweep: {name}: {(said.readlines() or [''])[-1].strip()}")
        cpu, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e6
        peak *= 1 if sys.platform == "darwin" else 1024
        spent.append(Spent(seeds * EXPERIMENTS, name, seconds, cpu, peak))
    sizes = {
        name: [path.stat().st_size for path in (folder / name).rglob("*") if path.is_file()]
        for name in ("first", "stages")
    }
    left = Left(
        jobs=seeds * EXPERIMENTS,
        files=len(sizes["first"]),
        bytes=sum(sizes["first"]),
        stored_files=len(sizes["stages"]),
        stored_bytes=sum(sizes["stages"]),
        locks=sum(1 for _ in (folder / "stages").rglob("lock")),
    )
    return spent, left
