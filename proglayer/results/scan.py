"""Finding runs: what lies in and below a folder, finished or not."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from proglayer.console import one_line
from proglayer.errors import UserError
from proglayer.files import RUN_FILE, SWEEP_FILE, FolderKind
from proglayer.run.record import RecordError, read_sweep

# Folders below folders that are searched for runs.
MOST_LEVELS = 50
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, or the place of one that its sweep lists and that has not begun.

    name: the path below the folder that was scanned.
    sweep: the name of the folder of its sweep; None for a single run.
    overrides: as the sweep lists them; None where none does.
    """

    path: str
    name: str
    sweep: str | None = None
    overrides: tuple[str, ...] | None = None


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
    """Yield the runs in and below one folder, with paths for names."""
    jobs_of: dict[str, dict[str, tuple[str, ...]]] = {}

    def closed(error: OSError) -> None:
        reason = f"cannot be opened ({error.strerror})"
        left_out.append(row_left_out(error.filename, "foreign", reason))

    for path, below, files in os.walk(root, onerror=closed):
        above, name = os.path.split(path)
        sweep = above if above in jobs_of else None
        overrides = jobs_of[above].get(name) if sweep is not None else None
        if overrides is not None or RUN_FILE in files:
            yield RunFolder(path, "", sweep, overrides)
        below[:] = [each for each in below if not each.startswith(".")]
        if FolderKind.store.mark in files:
            below.clear()
        for each in below:
            if os.path.islink(link := os.path.join(path, each)):
                reason = "a link: name the folder that it points to"
                left_out.append(row_left_out(link, "foreign", reason))
        if path.removeprefix(root).count(os.sep) > MOST_LEVELS:
            below.clear()
        if SWEEP_FILE in files:
            jobs_of[path] = {}
            try:
                jobs = read_sweep(Path(path)).jobs
                jobs_of[path] = {
                    job.folder: tuple(job.overrides)
                    for job in jobs
                    if Path(job.folder).name == job.folder
                }
            except RecordError as error:
                reason = f"{brief(error)}: waiting jobs are not known"
                left_out.append(row_left_out(os.path.join(path, SWEEP_FILE), "foreign", reason))
            for job, given in jobs_of[path].items():
                if job not in (*below, *files, "", ".."):
                    yield RunFolder(os.path.join(path, job), "", path, given)


def row_left_out(name: str, kind: str, reason: str) -> dict[str, Any]:
    """A row of `Results.left_out`."""
    return {"folder": as_text(name), "kind": kind, "reason": as_text(reason)}


def as_text(value: Any) -> str | None:
    """Return text that every file format can hold; other values as JSON writes them."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def brief(error: Exception) -> str:
    """An error as a short line."""
    return one_line(str(error))[:120]


NUMBER = re.compile(r"([0-9]{1,18})")


def natural_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts 2_x before 10_x."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in NUMBER.split(name)]
