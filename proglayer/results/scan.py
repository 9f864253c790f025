"""Finding runs: what lies in and below a folder, finished or not, and what of it is no run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from proglayer.console import one_line
from proglayer.errors import UserError
from proglayer.store.record import HEARTBEAT, JOBS, METRICS, RESULT, as_text, read_jobs

# Folders below folders that are searched for runs.
MOST_LEVELS = 50
HYDRA = ".hydra"
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, or the place of one that its sweep lists and that has not begun.

    name: the path below the folder that was scanned.
    sweep: the name of the folder of its sweep; None for a single run.
    overrides: as the sweep lists them; None where none does.
    last_sign: when a file of a run without a record last changed.
    sweep_sign: when a file of its sweep did, those of its runs included.
    configured: when Hydra wrote its settings, of a run without a record.
    """

    path: str
    name: str
    sweep: str | None = None
    overrides: tuple[str, ...] | None = None
    last_sign: datetime | None = None
    sweep_sign: datetime | None = None
    configured: datetime | None = None


class NoFolder(UserError, FileNotFoundError):
    """There is nothing where runs were to be read."""


class NotAFolder(UserError, NotADirectoryError):
    """There is something else where runs were to be read."""


def roots_of(folders: Sequence[str | Path]) -> list[str]:
    """The folders without repeats and without those inside another. Raises for one not there."""
    given: dict[str, str] = {}
    for folder in folders:
        if not os.path.exists(folder):
            raise NoFolder(f"there is no folder {folder}")
        if not os.path.isdir(folder):
            raise NotAFolder(f"{folder} is no folder")
        given.setdefault(os.path.realpath(folder), str(folder))
    return [
        folder
        for real, folder in given.items()
        if not any(real != other and Path(real).is_relative_to(other) for other in given)
    ]


def scan(*folders: str | Path) -> tuple[list[RunFolder], Rows]:
    """The runs in and below `folders`, and what there is no run.

    Runs are named relative to the folder given, or to the one that holds all of several, and come
    in the order of their names, numbers in them counted as numbers.
    """
    roots = roots_of(folders)
    above = os.path.commonpath([os.path.abspath(root) for root in roots]) if roots else ""
    found: list[RunFolder] = []
    left_out: Rows = []
    for root in roots:
        prefix = os.path.relpath(root, above) if len(roots) > 1 else ""
        own_name = Path(root).resolve().name
        runs, others = _scan(root)
        for run in runs:
            sweep = None if run.sweep is None else _joined(prefix, run.sweep) or own_name
            found.append(replace(run, name=_joined(prefix, run.name) or own_name, sweep=sweep))
        left_out += [row | {"folder": _joined(prefix, row["folder"]) or "."} for row in others]
    return sorted(found, key=lambda run: natural_order(run.name)), left_out


def _scan(root: str) -> tuple[list[RunFolder], Rows]:
    """The runs in and below one folder: one listing a folder, a few stats a run."""
    found: list[RunFolder] = []
    left_out: Rows = []
    folders = {""}
    accounted_for: set[str] = set()
    jobs_of: dict[str, dict[str, tuple[str, ...]]] = {}
    sweep_signs: dict[str | None, datetime] = {}

    def closed(error: OSError) -> None:
        name = os.path.relpath(error.filename, root)
        name = "" if name == "." else name
        left_out.append(row_left_out(name, "foreign", f"cannot be opened ({error.strerror})"))
        accounted_for.add(name)

    for path, below, files in os.walk(root, onerror=closed):
        name = "" if path == root else path[len(os.path.join(root, "")) :]
        above, _, own = name.rpartition("/")
        # Only a folder that has one above it is a job of that one's sweep.
        sweep = above if name and above in jobs_of else None
        overrides = jobs_of[above].get(own) if sweep is not None else None
        if overrides is not None or {RESULT, METRICS, HYDRA} & {*below, *files}:
            run = _run_folder(path, name, sweep, overrides, files)
            found.append(run)
            sign = run.last_sign or _last_change(path, RESULT)
            if sign and sweep in sweep_signs:
                sweep_signs[sweep] = max(sign, sweep_signs[sweep])
        below[:] = [each for each in below if not each.startswith(".") and each != "stages"]
        if name.count("/") > MOST_LEVELS:
            below.clear()
        if JOBS in files or "multirun.yaml" in files:
            jobs_of[name] = {}
        if JOBS in files:
            try:
                listed = read_jobs(Path(path))
                own_jobs = [job for job in listed if Path(job.folder).name == job.folder]
                jobs_of[name] = {job.folder: job.overrides for job in own_jobs}
            except (OSError, ValueError) as error:
                reason = f"cannot be read ({brief(error)}): waiting jobs are not known"
                left_out.append(row_left_out(_joined(name, JOBS), "foreign", reason))
            if sign := _last_change(path, JOBS, HEARTBEAT):
                sweep_signs[name] = sign
            for job, given in jobs_of[name].items():
                if job not in (*below, *files, "", ".."):
                    job_path = os.path.join(path, job)
                    found.append(RunFolder(job_path, _joined(name, job), name, given))
        for each in below:
            folders.add(_joined(name, each))
            if os.path.islink(os.path.join(path, each)):
                reason = "a link: name the folder that it points to"
                left_out.append(row_left_out(_joined(name, each), "foreign", reason))
                accounted_for.add(_joined(name, each))
    for run in found:
        parts = run.name.split("/") if run.name else []
        accounted_for |= {"/".join(parts[:depth]) for depth in range(len(parts) + 1)}
    for name in sorted(folders - accounted_for):
        above, _, own = name.rpartition("/")
        # The topmost of several. A sweep's own report is no run and no surprise.
        if own != "report" and (not name or above in accounted_for):
            left_out.append(row_left_out(name, "foreign", "holds no run"))
    return [replace(run, sweep_sign=sweep_signs.get(run.sweep)) for run in found], left_out


def _run_folder(
    path: str, name: str, sweep: str | None, overrides: tuple[str, ...] | None, files: Iterable[str]
) -> RunFolder:
    """The run in this folder. Times are looked at only where there is no record."""
    if RESULT in files:
        return RunFolder(path, name, sweep, overrides)
    configured = _last_change(path, os.path.join(HYDRA, "config.yaml"))
    own = [file for file in files if file in (METRICS, HEARTBEAT) or file.endswith(".log")]
    changes = [_last_change(path, *own) if own else None, configured]
    last_sign = max(filter(None, changes), default=_last_change(path))
    return RunFolder(path, name, sweep, overrides, last_sign, configured=configured)


def row_left_out(name: str, kind: str, reason: str) -> dict[str, Any]:
    """A row of `Results.left_out`."""
    return {"folder": as_text(name), "kind": kind, "reason": as_text(reason)}


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}/{name}" if prefix and name else prefix or name


def _last_change(folder: str, *names: str) -> datetime | None:
    """When the newest of these files, or without names the folder, changed; None if none is there.

    What no calendar holds counts as not known.
    """
    times = []
    for path in [os.path.join(folder, name) for name in names] or [folder]:
        try:
            times.append(datetime.fromtimestamp(os.stat(path).st_mtime, UTC))
        except (OSError, ValueError, OverflowError):
            continue
    return max(times, default=None)


def brief(error: Exception) -> str:
    """An error as a short line."""
    return one_line(str(error))[:120]


NUMBER = re.compile(r"([0-9]{1,18})")


def natural_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts 2_x before 10_x."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in NUMBER.split(name)]
