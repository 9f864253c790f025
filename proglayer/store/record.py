"""The permanent evidence of a run: `result.json` and `metrics.csv` in its folder.

`result.json` is written last and atomically: it being there means that the run ended, and it says
how. `metrics.csv` grows by a row an epoch, so it can be read while the run goes on. Until the end a
third file, `heartbeat.json`, shows that somebody is at work: see `Heartbeat`.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import socket
import threading
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from proglayer.store.stages import write_atomically

RESULT = "result.json"
METRICS = "metrics.csv"
WEIGHTS = "weights.safetensors"
JOBS = "jobs.json"
SUBMITTED = ".submitted"
FAILED_JOB = ".failed"
HEARTBEAT = "heartbeat.json"
HEARTBEAT_EVERY_S = 10.0
# A shared file system may show a change of time a minute late.
LOST_AFTER_S = 120.0
# Raise by hand when a reader of older records would misread a newer one.
RECORD_FORMAT = 1

METRICS_COLUMNS: tuple[str, ...] = (
    "phase",
    "layers",
    "epoch",
    "train_loss",
    "validation_loss",
    "validation_perplexity",
    "validation_accuracy_percent",
    "train_tokens",
    "train_seconds",
    "evaluation_seconds",
    "best",
    "reused",
)


class Status(StrEnum):
    """How a run ended. A preempted one was stopped by its scheduler, which will start it again;
    a pruned one by its search, as it promised less than other trials.
    """

    completed = "completed"
    failed = "failed"
    interrupted = "interrupted"
    preempted = "preempted"
    pruned = "pruned"


class Sign(StrEnum):
    """What a run without a record says of itself in `heartbeat.json`.

    A running one touches the file again and again; a pending one is held by a scheduler, and
    nothing touches its file until it starts; a deferred one is held in the same way by its sweep,
    as long as that lives. A lost one is no longer held, as somebody found out.
    """

    running = "running"
    pending = "pending"
    deferred = "deferred"
    lost = "lost"


def write_submission(
    sweep: Path, jobs: Mapping[str, Mapping[str, Any]], git: dict[str, Any] | None, difference: str
) -> None:
    """Keep what is submitted in the folder of a sweep: each job's settings, and the code.

    `difference` is that of the code to its commit, as `git apply` takes it. Raises StoreError.
    """
    folder = sweep / SUBMITTED
    (sweep / FAILED_JOB).unlink(missing_ok=True)
    for job, config in jobs.items():
        content = {"config": config, "git": git}
        data = json.dumps(content, indent=1).encode()
        write_atomically(folder / f"{job}.json", data, "hydra.sweep.dir")
    if difference:
        write_atomically(folder / "code.diff", difference.encode(), "hydra.sweep.dir")
    else:
        (folder / "code.diff").unlink(missing_ok=True)


def read_submission(job: Path) -> dict[str, Any] | None:
    """`config` and `git` of the job in this folder as it was submitted; None if it was not.

    Raises ValueError for a file cut short.
    """
    path = job.parent / SUBMITTED / f"{job.name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def note_failed_job(job: Path) -> None:
    """Leave word in the sweep's folder that the job in this one failed, if that is possible.

    Jobs that are not to start after a failure look for it, and need not read every record.
    """
    with contextlib.suppress(OSError):
        (job.parent / FAILED_JOB).write_text(job.name, encoding="utf-8")


def failed_job(sweep: Path) -> str | None:
    """The name of a job that failed since the sweep began, if one did."""
    with contextlib.suppress(OSError):
        return (sweep / FAILED_JOB).read_text(encoding="utf-8")
    return None


def figure(result: Mapping[str, Any], place: str) -> float:
    """The number of a record at a place such as `phases.-1.best.validation_loss`.

    Raises ValueError, with the names that there are, where no number stands.
    """
    at: Any = result
    for name in place.split("."):
        try:
            at = at[int(name)] if isinstance(at, list) else at[name]
        except (KeyError, IndexError, TypeError, ValueError):
            there = list(at) if isinstance(at, Mapping) else range(len(at)) if at else ()
            names = ", ".join(map(str, there)) or "nothing"
            raise ValueError(
                f"{place} is no place in a record: at {name} there is {names}"
            ) from None
    if isinstance(at, bool) or not isinstance(at, (int, float)):
        raise ValueError(f"{place} is no number in a record")
    return float(at)


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write `result.json`, whole or not at all. Not-finite numbers become null."""
    text = json.dumps(_finite(result), indent=2, allow_nan=False)
    write_atomically(folder / RESULT, text.encode() + b"\n", "hydra.run.dir or hydra.sweep.dir")


def remove_result(folder: Path) -> None:
    """Take away the record of an earlier try and what belongs to it: this one counts as running."""
    for name in (RESULT, METRICS, WEIGHTS):
        (folder / name).unlink(missing_ok=True)


def read_result(folder: Path) -> dict[str, Any] | None:
    """The record of an ended run; None if there is none. Raises ValueError for one cut short."""
    try:
        text = (folder / RESULT).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    return json.loads(text)


class Heartbeat(contextlib.AbstractContextManager["Heartbeat"]):
    """Shows that the run in `folder` is alive: a file that is touched while the block lasts.

    A thread of its own does it, so that a long step or a wait for another job is no silence. A run
    that is killed leaves the file behind, and its time tells when. That a file cannot be written
    is no reason to end a run: it then shows no sign.
    """

    def __init__(self, folder: Path, every_s: float = HEARTBEAT_EVERY_S) -> None:
        self._folder = folder
        self._every_s = every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        write_sign(self._folder, Sign.running)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        # Whatever else was written since is no sign of this block's.
        if read_sign(self._folder) in ({}, _own_sign(Sign.running)):
            with contextlib.suppress(OSError):
                (self._folder / HEARTBEAT).unlink()

    def _beat(self) -> None:
        while not self._ended.wait(self._every_s):
            try:
                os.utime(self._folder / HEARTBEAT)
            except FileNotFoundError:
                write_sign(self._folder, Sign.running)
            except OSError:
                continue


def write_sign(folder: Path, sign: Sign) -> None:
    """Write `heartbeat.json` with this process's host and number, if that is possible.

    A reader that comes in between may find it empty.
    """
    with contextlib.suppress(OSError):
        (folder / HEARTBEAT).write_text(json.dumps(_own_sign(sign)) + "\n", encoding="utf-8")


def _own_sign(sign: Sign) -> dict[str, Any]:
    return {"sign": sign.value, "host": socket.gethostname(), "process": os.getpid()}


def mark_lost(folder: Path, reason: str) -> None:
    """Tell of a run without a record that nobody is at work on it, nor will be, and why."""
    lost = {"sign": Sign.lost.value, "reason": reason}
    content = {"host": None, "process": None} | read_sign(folder) | lost
    with contextlib.suppress(OSError):
        (folder / HEARTBEAT).write_text(json.dumps(content) + "\n", encoding="utf-8")


def read_sign(folder: Path) -> dict[str, Any]:
    """What `heartbeat.json` holds; nothing where it is not there or cannot be read."""
    try:
        content = json.loads((folder / HEARTBEAT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def write_metrics(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write every epoch so far; a reader sees the old rows or the new ones, never half a row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, METRICS_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    content = text.getvalue().encode()
    write_atomically(folder / METRICS, content, "hydra.run.dir or hydra.sweep.dir")


def changes(phases: list[dict[str, Any]]) -> dict[str, float]:
    """What changed from the first phase to the last: a plus is an improvement in each but the loss,
    which is given as after - before.
    """
    before, after = phases[0]["best"], phases[-1]["best"]
    old, new = before["validation_perplexity"], after["validation_perplexity"]
    return {
        "accuracy_points": after["validation_accuracy_percent"]
        - before["validation_accuracy_percent"],
        "perplexity_percent": (old - new) / old * 100,
        "loss_nats": after["validation_loss"] - before["validation_loss"],
    }


def _finite(value: Any) -> Any:
    """`value` with numbers that JSON cannot hold as None."""
    if isinstance(value, float) and value - value != 0:
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
