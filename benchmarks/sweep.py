"""What the jobs of a sweep cost beside their training: time, memory, files.

    python benchmarks/sweep.py 1000                    # jobs; in a temporary folder
    python benchmarks/sweep.py 1000 --folder /shared   # on that disk
    python benchmarks/sweep.py 300 hydra/launcher=joblib

Four experiments of five distinct phases are swept over seeds, on so little text that a phase trains
in a blink: what is left is composing, checking, launching, the store and the records. A tenth and a
third of the jobs run first, so that what grows faster than the jobs can be seen. CPU time and
memory are with the workers of joblib; memory is of the largest process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
EXPERIMENTS = ("original", "split_lr", "control_unfrozen", "control_keep_training")
SETTINGS = (
    f"experiment={','.join(EXPERIMENTS)}",
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


def measure(command: list[str], folder: Path) -> tuple[float, float, float]:
    """Run a command of ours. Returns seconds, CPU seconds and peak memory (MB of 10^6 bytes)."""
    started = time.perf_counter()
    with open(folder / "output.txt", "w+", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=TRAIN.parent, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if status:
            output.seek(0)
            sys.exit(f"{' '.join(command)} failed: {(output.readlines() or [''])[-1].strip()}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, peak


def files_in(folder: Path) -> str:
    """How many files, and of what size together."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return f"{len(sizes):,} files of {sum(sizes) / 1e3:,.0f} kB"


def main() -> None:
    """Measure and print."""
    about = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("jobs", type=int, nargs="?", default=100)
    parser.add_argument("--folder", type=Path, help="where to write, to measure that disk")
    parser.add_argument("overrides", nargs="*", help="more settings, as of train.py -m")
    options = parser.parse_intermixed_args()
    before: dict[str, tuple[int, float, float]] = {}
    print(f"{'command':30} {'jobs':>6} {'s':>8} {'CPU s':>8} {'MB':>6}  ms (CPU ms) a further job")
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="sweep-overhead-") as scratch:
        for share in (10, 3, 1):
            seeds = max(1, options.jobs // share // len(EXPERIMENTS))
            jobs = seeds * len(EXPERIMENTS)
            folder = Path(scratch, str(share))
            folder.mkdir()
            sweep = [str(TRAIN), "-m", *SETTINGS, f"seed=range(0,{seeds})", *options.overrides]
            sweep.append(f"store.dir={folder / 'stages'}")
            first, again = (f"hydra.sweep.dir={folder / name}" for name in ("first", "again"))
            for name, command in {
                "the sweep": [*sweep, first],
                "again elsewhere, all stored": [*sweep, again],
                "again, all completed": [*sweep, again],
                "its table": ["-m", "proglayer.results", str(folder / "first")],
                "its report": [
                    *("-m", "proglayer.report", str(folder / "first"), "-o", str(folder / "report"))
                ],
            }.items():
                seconds, cpu, peak = measure(command, folder)
                further = ""
                if name in before and before[name][0] < jobs:
                    jobs_before, *times = before[name]
                    each, of_cpu = (
                        1e3 * (now - then) / (jobs - jobs_before)
                        for now, then in zip((seconds, cpu), times, strict=True)
                    )
                    further = f"{each:,.0f} ({of_cpu:,.0f})"
                before[name] = jobs, seconds, cpu
                print(f"{name:30} {jobs:6,} {seconds:8.1f} {cpu:8.1f} {peak:6,.0f}  {further}")
            print(
                f"{jobs} jobs left {files_in(folder / 'first')}, and in the store "
                f"{files_in(folder / 'stages')}"
            )


if __name__ == "__main__":
    main()
