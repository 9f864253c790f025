"""Finding runs: what lies in and below a folder, finished or not."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
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
    given: dict[Path, str] = {}
    for folder in folders:
        if not os.path.exists(folder):
            raise NoFolder(f"there is no folder {folder}")
        if not os.path.isdir(folder):
            raise NotAFolder(f"{folder} is no folder")
        given.setdefault(Path(folder).resolve(), str(Path(folder)))
    return [path for real, path in given.items() if given.keys().isdisjoint(real.parents)]


def scan(*folders: str | Path) -> tuple[list[RunFolder], Rows]:
    """The runs in and below `folders`, and what there cannot be read.

    Runs are named relative to the folder given, or to the one that holds all of several, and come
    in the order of their names, numbers in them counted as numbers.
    """
    roots = roots_of(folders)
    above = os.path.commonpath(map(os.path.abspath, roots)) if roots else ""

    def named(path: str) -> str:
        name = os.path.relpath(path, above)
        return Path(path).resolve().name if name == "." else name

    found: list[RunFolder] = []
    left_out: Rows = []
    for root in roots:
        for run in _scan(root, left_out):
            sweep = None if run.sweep is None else named(run.sweep)
            found.append(replace(run, name=named(run.path), sweep=sweep))
    rows = [row | {"folder": as_text(os.path.relpath(row["folder"], above))} for row in left_out]
    return sorted(found, key=lambda run: natural_order(run.name)), rows


def _scan(root: str, left_out: Rows) -> Iterator[RunFolder]:
    """The runs in and below one folder, with paths for names: one listing a folder, a few stats a
    run.
    """
    found: list[RunFolder] = []
    jobs_of: dict[str, dict[str, tuple[str, ...]]] = {}
    sweep_signs: dict[str | None, datetime] = {}

    def closed(error: OSError) -> None:
        reason = f"cannot be opened ({error.strerror})"
        left_out.append(row_left_out(error.filename, "foreign", reason))

    for path, below, files in os.walk(root, onerror=closed):
        above, own = os.path.split(path)
        sweep = above if above in jobs_of else None
        overrides = jobs_of[above].get(own) if sweep is not None else None
        if overrides is not None or {RESULT, METRICS, HYDRA} & {*below, *files}:
            run = _run_folder(path, sweep, overrides, files)
            found.append(run)
            sign = run.last_sign or _last_change(path, RESULT)
            if sign and sweep in sweep_signs:
                sweep_signs[sweep] = max(sign, sweep_signs[sweep])
        below[:] = [each for each in below if not each.startswith(".") and each != "stages"]
        for each in below:
            if os.path.islink(link := os.path.join(path, each)):
                reason = "a link: name the folder that it points to"
                left_out.append(row_left_out(link, "foreign", reason))
        if path.removeprefix(root).count(os.sep) > MOST_LEVELS:
            below.clear()
        if JOBS in files or "multirun.yaml" in files:
            jobs_of[path] = {}
        if JOBS in files:
            try:
                listed = read_jobs(Path(path))
                own_jobs = [job for job in listed if Path(job.folder).name == job.folder]
                jobs_of[path] = {job.folder: job.overrides for job in own_jobs}
            except (OSError, ValueError) as error:
                reason = f"cannot be read ({brief(error)}): waiting jobs are not known"
                left_out.append(row_left_out(os.path.join(path, JOBS), "foreign", reason))
            if sign := _last_change(path, JOBS, HEARTBEAT):
                sweep_signs[path] = sign
            for job, given in jobs_of[path].items():
                if job not in (*below, *files, "", ".."):
                    found.append(RunFolder(os.path.join(path, job), "", path, given))
    return (replace(run, sweep_sign=sweep_signs.get(run.sweep)) for run in found)


def _run_folder(
    path: str, sweep: str | None, overrides: tuple[str, ...] | None, files: Sequence[str]
) -> RunFolder:
    """The run in this folder. Times are looked at only where there is no record."""
    if RESULT in files:
        return RunFolder(path, "", sweep, overrides)
    configured = _last_change(path, os.path.join(HYDRA, "config.yaml"))
    own = [file for file in files if file in (METRICS, HEARTBEAT) or file.endswith(".log")]
    changes = [_last_change(path, *own) if own else None, configured]
    last_sign = max(filter(None, changes), default=_last_change(path))
    return RunFolder(path, "", sweep, overrides, last_sign, configured=configured)


def row_left_out(name: str, kind: str, reason: str) -> dict[str, Any]:
    """A row of `Results.left_out`."""
    return {"folder": as_text(name), "kind": kind, "reason": as_text(reason)}


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
