"""The study's tables: the records of any number of runs and sweeps, read together.

`load` finds every run below the folders it is given, finished or not, and lays out what they
recorded as tidy pandas frames. As a command, `python -m proglayer.results FOLDER...` shows them:
see `proglayer.results.summary`.

Reading thousands of records takes seconds, so what was read is kept in one file in each folder that
`load` was given (`.results-cache`). It is only ever a copy: a run whose files changed is read
again, and a cache that is damaged, foreign or of another version is ignored.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from proglayer.results.cache import read_cache, write_cache
from proglayer.results.columns import (
    ARROW,
    COLUMNS,
    COMPLETED,
    FIGURE_COLUMNS,
    IDENTITY_COLUMNS,
    LEFT_OUT_COLUMNS,
    LOST,
    PENDING,
    PLACE_COLUMNS,
    RUNNING,
    WAITING,
    Piece,
    Rows,
    as_text,
    concatenated,
    recoded,
)
from proglayer.results.reader import read_runs
from proglayer.results.scan import Found, common_parent, joined, natural_order, roots_of, scan
from proglayer.store.record import RunState, job_state

# With fewer new runs than this, reading them again costs less than writing the cache.
CACHE_FROM_RUNS = 200
# A file this young may change once more within one tick of the file system's clock.
SETTLED_NS = 2_000_000_000
CHUNK_RUNS = 500


@dataclass(frozen=True)
class Results:
    """What `load` found. One row each: a run; a phase of a run; an epoch of a phase; an exit.

    `runs.status` is how a run ended (completed, failed, interrupted, preempted), or running (no
    record of its end yet), lost (the same without a sign of life for LOST_AFTER_S: killed, or its
    machine died), pending (a scheduler holds it), waiting (listed by its sweep, not begun) or not
    started (the same of a sweep that shows no life either). What shows life again runs again.
    Seconds are what training and evaluation took originally, reused or not; what reuse saved is in
    `seconds_saved`, what the run itself took in `wall_seconds`. Changes and figures of the last
    phase are given for completed runs only. Settings are columns `config.<setting>`: those that
    vary stand in front, the constant ones at the end. What is missing is NaN or NA.

    `phases` and `exits` hold finished phases; `epochs` also those of a phase under way. Phases,
    epochs and layers count from 1. `left_out` names what could not be read: of kind damaged (a run
    whose record is cut short or unreadable), newer (a record of a later format) or foreign (no run
    of this tool).
    """

    runs: pd.DataFrame
    phases: pd.DataFrame
    epochs: pd.DataFrame
    exits: pd.DataFrame
    left_out: pd.DataFrame

    @property
    def varied(self) -> list[str]:
        """The columns `config.<setting>` of `runs` that differ between runs."""
        return _varied(self.runs)

    @property
    def failures(self) -> int:
        """How many runs failed, were lost, or left a record that cannot be read."""
        statuses = self.runs["status"].tolist()
        failed = statuses.count(RunState.failed.value) + statuses.count(LOST)
        return failed + self.left_out["kind"].tolist().count("damaged")

    def distinct(self) -> Results:
        """Each experiment and seed once: without the runs that `duplicate_of` marks."""
        again = self.runs.loc[self.runs["duplicate_of"].notna(), "run"].tolist()
        frames = {
            name: frame[~frame["run"].isin(again)].reset_index(drop=True)
            for name, frame in self._frames().items()
            if name != "left_out"
        }
        return replace(self, **frames)

    def fingerprint(self) -> str:
        """A hash of all that stands in the frames, and in their order."""
        digest = hashlib.sha256()
        for frame in self._frames().values():
            table = pa.Table.from_pandas(frame).combine_chunks()
            stream = pa.BufferOutputStream()
            with pa.ipc.new_stream(stream, table.schema) as writer:
                writer.write_table(table)
            digest.update(stream.getvalue())
        return digest.hexdigest()

    def to_csv(self, folder: str | Path) -> None:
        """Write each frame as `<name>.csv` into `folder`.

        As `write_csv` does it. Parquet needs no such care.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, frame in self._frames().items():
            write_csv(frame, Path(folder) / f"{name}.csv")

    def to_parquet(self, folder: str | Path) -> None:
        """Write each frame as `<name>.parquet` into `folder`, with its types."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, frame in self._frames().items():
            frame.to_parquet(Path(folder) / f"{name}.parquet", engine="pyarrow", index=False)

    def _frames(self) -> dict[str, pd.DataFrame]:
        return {
            "runs": self.runs,
            "phases": self.phases,
            "epochs": self.epochs,
            "exits": self.exits,
            "left_out": self.left_out,
        }


def load(*folders: str | Path) -> Results:
    """Read every run in and below `folders`, each of them a sweep, a run or a pile of both.

    Runs are named by their folder relative to the folder given (to the one that holds all those
    given, if several). Folders that are links, hidden, or a store of stages are not entered. A run
    that cannot be read is named in `left_out`; only a folder that is not there raises
    (FileNotFoundError or NotADirectoryError, with a message of one line).
    """
    roots = roots_of(folders)
    above = common_parent(roots)
    pieces: list[Piece] = []
    runs: list[Found] = []
    left_out: Rows = []
    codes = 0
    for root in roots:
        prefix = os.path.relpath(root, above)
        prefix = "" if prefix == "." else prefix
        own_name = Path(root).resolve().name
        found, problems = scan(root)
        piece, read, more_problems = _read_root(root, found, codes)
        codes += len(found)
        pieces.append(piece)
        for item in read:
            sweep = item.sweep if item.sweep is None else joined(prefix, item.sweep) or own_name
            name = joined(prefix, item.name) or own_name
            runs.append(item._replace(name=name, sweep=sweep))
        for problem in (*problems, *more_problems):
            left_out.append(problem | {"folder": joined(prefix, problem["folder"]) or "."})
    if len(roots) > 1:
        runs.sort(key=lambda item: natural_order(item.name))
    return _results(concatenated(pieces), runs, left_out)


def _read_root(root: str, found: list[Found], first_code: int) -> tuple[Piece, list[Found], Rows]:
    """Read what was found below one folder, from its cache where that is still true.

    Gives the tables, the runs in them with their codes from `first_code` on, and what was left out.
    """
    now = time.time_ns()
    kept, cached = read_cache(root, found)
    names = {item.name for item in kept}
    fresh = [item for item in found if item.name not in names]
    runs = [item._replace(code=code) for code, item in enumerate(kept + fresh)]
    pieces = [cached]
    left_out: Rows = []
    for start in range(len(kept), len(runs), CHUNK_RUNS):
        chunk, problems = read_runs(runs[start : start + CHUNK_RUNS])
        pieces.append(chunk)
        left_out += problems
    piece = concatenated(pieces)
    read = set(piece["runs"]["code"].to_pylist())
    runs = [item for item in runs if item.code in read]
    if len(fresh) >= CACHE_FROM_RUNS:
        troubled = {problem["folder"] for problem in left_out}
        settled = [
            item
            for item in runs
            if item.begun
            and item.name not in troubled
            and item.seen.last_changed_ns < now - SETTLED_NS
        ]
        write_cache(root, settled, piece)
    place = {item.name: number for number, item in enumerate(found)}
    runs.sort(key=lambda item: place[item.name])
    if first_code:
        piece = recoded(piece, np.arange(len(found)) + first_code)
        runs = [item._replace(code=item.code + first_code) for item in runs]
    return piece, runs, left_out


def _results(piece: Piece, found: list[Found], left_out: Rows) -> Results:
    """The frames. Rows follow the order of `found`."""
    places = np.zeros(1 + max((item.code for item in found), default=-1), dtype=np.int64)
    places[[item.code for item in found]] = np.arange(len(found))
    names = pa.array([as_text(item.name) for item in found], pa.string())

    def in_order(table: str) -> tuple[pa.Table, np.ndarray]:
        order = places[piece[table]["code"].to_numpy()]
        rows = piece[table].drop_columns("code")
        if (np.diff(order) >= 0).all():
            return rows, order
        by_run = np.argsort(order, kind="stable")
        return rows.take(by_run), order[by_run]

    frames = {}
    for name in ("phases", "epochs", "exits"):
        table, order = in_order(name)
        sure = {column: "int64" for column, holds in COLUMNS[name].items() if holds.required}
        frames[name] = _frame(table.add_column(0, "run", names.take(order))).astype(sure)
    runs = _frame(in_order("runs")[0])
    runs["run"] = _texts(item.name for item in found)
    runs["sweep"] = _texts(item.sweep for item in found)
    runs["folder"] = _texts(item.path for item in found)
    signs = pa.array([item.last_sign for item in found], ARROW["time"]).to_pandas()
    runs["last_sign"] = signs.fillna(runs["ended"])
    _add_signs_of_life(runs, found)
    runs["duplicate_of"] = _texts(_duplicates(runs))
    columns = {name: _texts(row[name] for row in left_out) for name in LEFT_OUT_COLUMNS}
    listed = pd.DataFrame(columns).sort_values("folder", kind="stable", ignore_index=True)
    return Results(runs=_arranged(runs), left_out=listed, **frames)


def _add_signs_of_life(runs: pd.DataFrame, found: Sequence[Found]) -> None:
    """The states of the runs without a record: they change while no file does."""
    columns = {name: plain_values(runs[name]) for name in ("status", "reason", "host")}
    for place, item in enumerate(found):
        if columns["status"][place] in (WAITING, RUNNING):
            state, reason, host = job_state(
                Path(item.path), last_sign=item.last_sign, sweep_sign=item.sweep_sign
            )
            # Whoever holds a job that is to come, its scheduler or its sweep, it is pending.
            columns["status"][place] = PENDING if state is RunState.deferred else state.value
            columns["reason"][place] = reason
            columns["host"][place] = host
    for name, values in columns.items():
        runs[name] = _texts(values)


def _frame(table: pa.Table) -> pd.DataFrame:
    kinds = {
        pa.string(): pd.StringDtype("pyarrow"),
        pa.int64(): pd.Int64Dtype(),
        pa.bool_(): pd.BooleanDtype(),
    }
    return table.to_pandas(types_mapper=kinds.get)


def _texts(values: Iterable[str | None]) -> Any:
    return pd.array([as_text(value) for value in values], dtype=pd.StringDtype("pyarrow"))


def _duplicates(runs: pd.DataFrame) -> list[str | None]:
    """For each run the one that counts in its place; None where it counts itself.

    Of several runs of one experiment and seed the newest completed one counts; if none completed,
    one that is running, then the newest.
    """
    unfinished = (
        RunState.interrupted.value,
        RunState.preempted.value,
        RunState.pruned.value,
        LOST,
    )
    rank = {COMPLETED: 3, RUNNING: 2, **dict.fromkeys(unfinished, 1)}
    columns = [
        plain_values(runs[name]) for name in ("experiment_key", "run", "status", "last_sign")
    ]
    rows = [
        (key, run, (rank.get(status, 0), sign.timestamp() if sign else 0.0))
        for key, run, status, sign in zip(*columns, strict=True)
    ]
    counts: dict[str, tuple[tuple[int, float], str]] = {}
    for key, run, standing in rows:
        if key and (key not in counts or counts[key][0] <= standing):
            counts[key] = standing, run
    return [counts[key][1] if key and counts[key][1] != run else None for key, run, _ in rows]


def _varied(runs: pd.DataFrame) -> list[str]:
    known: Any = runs[runs["config.seed"].notna()]
    settings = [column for column in runs.columns if column.startswith("config.")]
    return [column for column in settings if len(known[column].unique()) > 1]


def _arranged(runs: pd.DataFrame) -> pd.DataFrame:
    """Who and how, what varies, the figures, where; then what is the same everywhere."""
    varied = _varied(runs)
    choices = sorted(column for column in runs.columns if column.startswith("choice."))
    settings = [column for column in runs.columns if column.startswith("config.")]
    constant = [column for column in settings if column not in varied]
    front = [*IDENTITY_COLUMNS, *choices, *varied, *FIGURE_COLUMNS, *PLACE_COLUMNS]
    return runs.reindex(columns=front + constant)


def plain_values(values: Any) -> list[Any]:
    """A column as Python values, None for what is missing."""
    return [None if gone else value for value, gone in zip(values, values.isna(), strict=True)]


# = + - @, their full-width twins, and what a spreadsheet skips before it looks for them.
FORMULA_STARTS = ("=", "+", "-", "@", "＝", "＋", "－", "＠", "\t", "\r", "\n", "'")


def spreadsheet_safe(text: str) -> str:
    """Text that a spreadsheet shows as it is, with an apostrophe in front where it would not."""
    return "'" + text if text.startswith(FORMULA_STARTS) else text


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write a frame for spreadsheets and for programs.

    Text that a spreadsheet would run as a formula gets an apostrophe in front, and so does text
    that begins with one, in names of columns, too: take one leading apostrophe off any text to have
    the original back. Numbers are as they are.
    """
    shown = frame.copy(deep=False)
    for column in frame.columns:
        dtype = frame[column].dtype
        if isinstance(dtype, pd.StringDtype) or pd.api.types.is_object_dtype(dtype):
            shown[column] = [
                spreadsheet_safe(value) if isinstance(value, str) else value
                for value in frame[column]
            ]
    shown.columns = [spreadsheet_safe(column) for column in frame.columns]
    # With this line end, text that holds either character is put in quotes.
    shown.to_csv(path, index=False, lineterminator="\r\n")
