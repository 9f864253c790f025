"""Finding runs: what lies in and below a folder, finished or not, and what of it is no run."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from proglayer.console import one_line
from proglayer.results.columns import Rows
from proglayer.store.record import HEARTBEAT, JOBS, METRICS, RESULT

HYDRA = ".hydra"


class Look(NamedTuple):
    """What a file looks like from outside; zeros for one that is not there."""

    changed_ns: int = 0
    size: int = 0
    inode: int = 0


NO_FILE = Look()


@dataclass(frozen=True)
class Seen:
    """What a run's files look like: the same look, the same content."""

    result: Look = NO_FILE
    metrics: Look = NO_FILE
    # What Hydra wrote; looked at only where there is no result.
    settings: Look = NO_FILE

    @property
    def numbers(self) -> tuple[int, ...]:
        """As SEEN names them."""
        return (*self.result, *self.metrics, *self.settings)

    @property
    def last_changed_ns(self) -> int:
        return max(look.changed_ns for look in (self.result, self.metrics, self.settings))


SEEN = tuple(
    f"{file} {what}" for file in (RESULT, METRICS, HYDRA) for what in ("time", "size", "inode")
)


class Found(NamedTuple):
    """A run's folder. `code` is its rows' name in Arrow tables.

    `last_sign` is when a run without a record showed life last, or its sweep before it begins;
    `sweep_sign` is when its sweep did, which the run's own signs are among.
    """

    path: str
    name: str
    sweep: str | None
    seen: Seen
    last_sign: datetime | None
    overrides: tuple[str, ...] | None
    begun: bool = True
    code: int = -1
    sweep_sign: datetime | None = None


def roots_of(folders: Sequence[str | Path]) -> list[str]:
    """The folders without repeats and without those inside another. Raises for one not there."""
    given: dict[str, str] = {}
    for folder in folders:
        if not os.path.exists(folder):
            raise FileNotFoundError(f"there is no folder {folder}")
        if not os.path.isdir(folder):
            raise NotADirectoryError(f"{folder} is no folder")
        given.setdefault(os.path.realpath(folder), str(folder))
    return [
        folder
        for real, folder in given.items()
        if not any(real != other and Path(real).is_relative_to(other) for other in given)
    ]


def common_parent(roots: Sequence[str]) -> str:
    if len(roots) < 2:
        return "".join(roots) or "."
    return os.path.commonpath([os.path.abspath(root) for root in roots])


def joined(prefix: str, name: str) -> str:
    return f"{prefix}/{name}" if prefix and name else prefix or name


def scan(root: str) -> tuple[list[Found], Rows]:
    """Walk `root` for runs, and for what is none: one listing a folder, two or three stats a run.

    Runs come in the order of their names, numbers in them counted as numbers. A job that its sweep
    lists but that has no folder yet is found as not begun.
    """
    found: list[Found] = []
    left_out: Rows = []
    parents: dict[str, str | None] = {"": None}
    sweep_signs: dict[str | None, datetime] = {}
    accounted_for: set[str] = set()
    # path, name below the root, the sweep it is a job of, the overrides that the sweep lists
    stack: list[tuple[str, str, str | None, tuple[str, ...] | None]] = [(root, "", None, None)]
    while stack:
        path, name, sweep, listed = stack.pop()
        try:
            with os.scandir(path) as listing:
                entries = {entry.name: entry for entry in listing}
        except FileNotFoundError:
            continue
        except OSError as error:
            left_out.append(row_left_out(name, "foreign", f"cannot be opened ({error.strerror})"))
            accounted_for.add(name)
            continue
        if listed is not None or not entries.keys().isdisjoint((RESULT, METRICS, HYDRA)):
            found.append(_found(path, name, sweep, listed, entries))
        jobs: dict[str, tuple[str, ...]] = {}
        if JOBS in entries:
            try:
                jobs = _listed_jobs(os.path.join(path, JOBS))
            except (OSError, ValueError, RecursionError) as error:
                reason = f"cannot be read ({brief(error)}): waiting jobs are not known"
                left_out.append(row_left_out(joined(name, JOBS), "foreign", reason))
            signs = [_look(entries[file].stat) for file in (JOBS, HEARTBEAT) if file in entries]
            sweep_signs[name] = when(max(sign.changed_ns for sign in signs))
        is_sweep = JOBS in entries or "multirun.yaml" in entries
        for below, entry in entries.items():
            if below.startswith(".") or below == "stages":
                continue
            below_name = joined(name, below)
            if entry.is_dir(follow_symlinks=False):
                parents[below_name] = name
                its_sweep = name if is_sweep else None
                stack.append((entry.path, below_name, its_sweep, jobs.get(below)))
            elif entry.is_symlink() and os.path.isdir(entry.path):
                reason = "a link: name the folder that it points to"
                left_out.append(row_left_out(below_name, "foreign", reason))
        for job, overrides in jobs.items():
            if job not in entries:
                job_path, job_name = os.path.join(path, job), joined(name, job)
                parents[job_name] = name
                found.append(Found(job_path, job_name, name, Seen(), None, overrides, begun=False))
    for item in found:
        if item.sweep in sweep_signs:
            sign = item.last_sign or when(item.seen.result.changed_ns)
            sweep_signs[item.sweep] = max(sign, sweep_signs[item.sweep])
    for place, item in enumerate(found):
        sign = sweep_signs.get(item.sweep)
        last_sign = item.last_sign if item.begun else sign
        found[place] = item._replace(last_sign=last_sign, sweep_sign=sign)
    for item in found:
        above: str | None = item.name
        while above is not None and above not in accounted_for:
            accounted_for.add(above)
            above = parents[above]
    for name, above in parents.items():
        topmost = above is None or above in accounted_for
        # A sweep's own report is no run and no surprise.
        if topmost and name not in accounted_for and os.path.basename(name) != "report":
            left_out.append(row_left_out(name, "foreign", "holds no run"))
    return sorted(found, key=lambda item: natural_order(item.name)), left_out


def row_left_out(name: str, kind: str, reason: str) -> dict[str, Any]:
    return {"folder": name, "kind": kind, "reason": reason}


def _found(
    path: str,
    name: str,
    sweep: str | None,
    overrides: tuple[str, ...] | None,
    entries: dict[str, os.DirEntry[str]],
) -> Found:
    """The run in this folder. What Hydra wrote is looked at only where there is no record."""
    result = _look(entries[RESULT].stat) if RESULT in entries else NO_FILE
    metrics = _look(entries[METRICS].stat) if METRICS in entries else NO_FILE
    if result != NO_FILE:
        return Found(path, name, sweep, Seen(result, metrics), None, overrides)
    settings = _look(lambda: os.stat(os.path.join(path, HYDRA, "config.yaml")))
    times = [metrics.changed_ns, settings.changed_ns]
    times += [
        _look(entry.stat).changed_ns
        for file, entry in entries.items()
        if file == HEARTBEAT or file.endswith(".log")
    ]
    last_sign = when(max(times) or _look(lambda: os.stat(path)).changed_ns)
    return Found(path, name, sweep, Seen(result, metrics, settings), last_sign, overrides)


def _look(stat: Callable[[], os.stat_result]) -> Look:
    try:
        status = stat()
    except OSError:
        return NO_FILE
    return Look(status.st_mtime_ns, status.st_size, status.st_ino)


def _listed_jobs(path: str) -> dict[str, tuple[str, ...]]:
    """What `jobs.json` of a sweep lists: folder -> overrides. Raises ValueError if it does not."""
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    try:
        return {str(job["folder"]): tuple(map(str, job["overrides"])) for job in content}
    except (KeyError, TypeError) as error:
        raise ValueError("no list of jobs") from error


def when(time_ns: int) -> datetime:
    return datetime.fromtimestamp(time_ns / 1e9, UTC)


def brief(error: Exception) -> str:
    return one_line(str(error))[:120]


NUMBER = re.compile(r"([0-9]{1,18})")


def natural_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts 2_x before 10_x."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in NUMBER.split(name)]
