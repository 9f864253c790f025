"""The study's tables: the records of any number of runs and sweeps, read together.

`load` finds every run below the folders it is given, finished or not, and lays what they recorded
out as tidy pandas frames. `python -m proglayer.results FOLDER...` prints the table of a sweep at
any time, follows it with `--watch`, and writes the frames as CSV or Parquet.

Reading 10,000 records takes seconds, so what was read is kept in one file per folder that `load`
was given (`.results-cache`). It is only ever a copy: a run whose files changed is read again, and a
cache that is damaged, foreign or of another version is ignored.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import secrets
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from rich.table import Table
from rich.text import Text

from proglayer.config import Config
from proglayer.display import console
from proglayer.record import METRICS, METRICS_COLUMNS, RECORD_FORMAT, RESULT, Status, read_result

if TYPE_CHECKING:
    from rich.console import Console

JOBS = "jobs.json"
HYDRA = ".hydra"
CACHE = ".results-cache"
# Raise by hand when a cached table would be misread by this module.
CACHE_FORMAT = 1
# With fewer new runs than this, reading them again costs less than writing the cache.
CACHE_FROM_RUNS = 200
# A file this young may change once more within one tick of the file system's clock.
SETTLED_NS = 2_000_000_000
CHUNK_RUNS = 500

RUNNING = "running"
WAITING = "waiting"

# Two runs that differ in these alone are the same experiment with the same seed: they say where
# and how a run works, not what it trains. Device and threads change the rounding, no more.
NOT_THE_EXPERIMENT = (
    "plan",
    "on_error",
    "reuse",
    "checkpoint_every_s",
    "stages.dir",
    "threads",
    "device",
    "data.cache_dir",
)
# Where the text lies; the corpus's fingerprint, where it is known, says what it is.
PLACE_OF_TEXT = ("data.path", "data.files")

GROUPS = ("model", "experiment", "data", "phase", "growth", "freeze", "lr")

# Columns and what they hold: text, a whole number, a number, yes or no, a time. A whole number
# followed by ! is never missing.
IDENTITY_COLUMNS = {
    "run": "text",
    "sweep": "text",
    "status": "text",
    "reason": "text",
    **dict.fromkeys(GROUPS, "text"),
    "seed": "whole",
    "duplicate_of": "text",
}
FIGURE_COLUMNS = {
    "accuracy_points": "number",
    "perplexity_percent": "number",
    "loss_nats": "number",
    "first_layers": "whole",
    "first_loss": "number",
    "first_perplexity": "number",
    "first_accuracy_percent": "number",
    "last_layers": "whole",
    "last_loss": "number",
    "last_perplexity": "number",
    "last_accuracy_percent": "number",
    "phases": "whole",
    "epochs": "whole",
    "epochs_reused": "whole",
    "seconds": "number",
    "seconds_saved": "number",
    "wall_seconds": "number",
    "tokens": "whole",
    "flops": "number",
    "flops_without_head": "number",
    "peak_memory_mb": "number",
}
PLACE_COLUMNS = {
    "overrides": "text",
    "started": "time",
    "ended": "time",
    "last_sign": "time",
    "corpus": "text",
    "corpus_fingerprint": "text",
    "vocab_size": "whole",
    "validation_tokens": "whole",
    "device": "text",
    "device_name": "text",
    "threads": "whole",
    "torch": "text",
    "python": "text",
    "proglayer": "text",
    "platform": "text",
    "host": "text",
    "git_commit": "text",
    "git_changed": "flag",
    "traceback": "text",
    "folder": "text",
}
PHASE_COLUMNS = {
    "run": "text",
    "phase": "whole!",
    "name": "text",
    "layers": "whole!",
    "new_layers": "text",
    "parameters_total": "whole",
    "parameters_trainable": "whole",
    "frozen": "text",
    "rate_new": "number",
    "rate_existing": "number",
    "rate_embedding": "number",
    "rate_head": "number",
    "exit_weights": "text",
    "epochs": "whole!",
    "best_epoch": "whole!",
    "stopped": "text",
    "train_loss": "number",
    "validation_loss": "number",
    "validation_perplexity": "number",
    "validation_accuracy_percent": "number",
    "train_tokens": "whole",
    "train_flops_head": "number",
    "train_flops_body": "number",
    "train_seconds": "number",
    "evaluation_seconds": "number",
    "tokens_per_second": "number",
    "epochs_trained": "whole",
    "epochs_replayed": "whole",
    "epochs_reused": "whole",
    "seconds_saved": "number",
    "seconds_waited": "number",
    "peak_memory_mb": "number",
    "peak_device_memory_mb": "number",
    "stage": "text",
}
EPOCH_COLUMNS = {
    "run": "text",
    **dict.fromkeys(METRICS_COLUMNS, "number"),
    "phase": "whole!",
    "layers": "whole!",
    "epoch": "whole!",
    "train_tokens": "whole",
    "best": "flag",
    "reused": "flag",
}
EXIT_COLUMNS = {
    "run": "text",
    "phase": "whole!",
    "layer": "whole!",
    "validation_loss": "number",
    "validation_perplexity": "number",
    "validation_accuracy_percent": "number",
}
LEFT_OUT_COLUMNS = {"folder": "text", "kind": "text", "reason": "text"}

ARROW = {
    "text": pa.string(),
    "whole": pa.int64(),
    "whole!": pa.int64(),
    "number": pa.float64(),
    "flag": pa.bool_(),
    "time": pa.timestamp("us", "UTC"),
}


@dataclass(frozen=True)
class Results:
    """What `load` found. One row each: a run; a phase of a run; an epoch of a phase; an exit.

    `runs.status` is completed, failed, interrupted, running (no record of its end yet; also what a
    killed run looks like: see `last_sign`) or waiting (listed by its sweep, not begun). Seconds are
    what training and evaluation took originally, reused or not; what reuse saved is in
    `seconds_saved`. Figures of the last phase are given for completed runs only. Settings are
    columns `config.<setting>`: those that vary stand in front, the constant ones at the end.
    Missing numbers are NaN or NA.

    `phases` and `exits` hold finished phases; `epochs` also those of a phase that is under way.
    `left_out` names what could not be read: kind damaged (a run whose record is cut short or
    unreadable), newer (a record of a later format) or foreign (no run of this tool).
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
        """How many runs failed or left a record that cannot be read."""
        failed = self.runs["status"].tolist().count(Status.failed.value)
        return failed + self.left_out["kind"].tolist().count("damaged")

    def distinct(self) -> Results:
        """Each experiment and seed once: without the runs that `duplicate_of` marks."""
        again = self.runs.loc[self.runs["duplicate_of"].notna(), "run"].tolist()
        return replace(
            self,
            **{
                name: frame[~frame["run"].isin(again)].reset_index(drop=True)
                for name, frame in self._frames().items()
                if name != "left_out"
            },
        )

    def to_csv(self, folder: str | Path) -> None:
        """Write each frame as `<name>.csv` into `folder`.

        Text that a spreadsheet would run as a formula gets an apostrophe in front, and so does
        text that begins with one: a reader takes one leading apostrophe off any text to have the
        original back. Numbers are as they are. Parquet needs no such care.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, frame in self._frames().items():
            shown = frame.copy(deep=False)
            for column in frame.columns:
                if isinstance(frame[column].dtype, pd.StringDtype):
                    shown[column] = frame[column].map(_as_plain_text, na_action="ignore")
            shown.columns = [_as_plain_text(column) for column in frame.columns]
            shown.to_csv(Path(folder) / f"{name}.csv", index=False)

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
    roots = _roots(folders)
    above = _common_parent(roots)
    pieces: list[_Piece] = []
    found: list[_Found] = []
    left_out: list[dict[str, str]] = []
    codes = 0
    for root in roots:
        prefix = os.path.relpath(root, above)
        prefix = "" if prefix == "." else prefix
        scan = _scan(root)
        piece, here, problems = _read_root(root, scan.found, codes)
        codes += len(scan.found)
        left_out += [
            problem | {"folder": _joined(prefix, problem["folder"])}
            for problem in (*scan.left_out, *problems)
        ]
        pieces.append(piece)
        found += [
            replace(
                item,
                name=_joined(prefix, item.name) or Path(root).resolve().name,
                sweep=None
                if item.sweep is None
                else _joined(prefix, item.sweep) or Path(root).resolve().name,
            )
            for item in here
        ]
    return _results(_concatenated(pieces), found, left_out)


def summary_table(source: Results | str | Path, width: int | None = None) -> Table:
    """The table of every job: what was varied, how it ended, the figures, and why it failed.

    With `width`, in characters, the less important columns give way until it fits; what a job's
    status is, is never cut.
    """
    results = source if isinstance(source, Results) else load(source)
    runs = results.runs
    columns = _summary_columns(results)
    left = _fit(columns, width)
    main = Table(caption=f"not shown at this width: {', '.join(left)}" if left else None)
    main.caption_justify = "left"
    for column in columns:
        if column.title in left:
            continue
        main.add_column(
            column.title,
            justify="right" if column.right else "left",
            no_wrap=not column.flexible,
            overflow="ellipsis" if column.flexible else "fold",
        )
    shown = [column.cells for column in columns if column.title not in left]
    for cells in zip(*shown, strict=True):
        main.add_row(*cells)
    outer = Table.grid()
    outer.add_row(main)
    ended_badly = runs[runs["reason"].notna()]
    if len(ended_badly):
        reasons = Table.grid(padding=(0, 1))
        reasons.add_column(no_wrap=True)
        reasons.add_column(no_wrap=True)
        reasons.add_column()
        for name, status, reason in zip(
            ended_badly["run"], ended_badly["status"], ended_badly["reason"], strict=True
        ):
            reasons.add_row(Text(status), Text(_one_line(name)), _cut(reason))
        outer.add_row(reasons)
    return outer


def print_summary(*folders: str | Path) -> bool:
    """Print the table of every job in `folders` and a line of totals; True if any failed."""
    results = load(*folders)
    _print_results(results, console())
    return results.failures > 0


# ---------------------------------------------------------------------------------------------
# Finding runs


@dataclass(frozen=True)
class _Found:
    """A run's folder. `seen` is what its files looked like: times, sizes and inodes, 0 for none."""

    path: str
    name: str
    sweep: str | None
    seen: tuple[int, ...]
    last_sign: datetime | None
    overrides: tuple[str, ...] | None
    begun: bool = True
    code: int = -1

    @property
    def changed(self) -> int:
        """When its files changed last, in ns."""
        return max(self.seen[::3])


@dataclass(frozen=True)
class _Scan:
    found: list[_Found]
    left_out: list[dict[str, str]]


NOTHING_SEEN = (0,) * 9


def _roots(folders: Sequence[str | Path]) -> list[str]:
    """The folders without repeats and without those inside another. Raises for one not there."""
    real: dict[str, str] = {}
    for folder in folders:
        if not os.path.exists(folder):
            raise FileNotFoundError(f"there is no folder {folder}")
        if not os.path.isdir(folder):
            raise NotADirectoryError(f"{folder} is no folder")
        real.setdefault(os.path.realpath(folder), str(folder))
    return [
        given
        for path, given in real.items()
        if not any(path != other and Path(path).is_relative_to(other) for other in real)
    ]


def _common_parent(roots: Sequence[str]) -> str:
    if not roots:
        return "."
    if len(roots) == 1:
        return roots[0]
    return os.path.commonpath([os.path.abspath(root) for root in roots])


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}/{name}" if prefix and name else prefix or name


def _scan(root: str) -> _Scan:
    """Walk `root` for runs; one listing a folder, and two or three stats a run."""
    found: list[_Found] = []
    left_out: list[dict[str, str]] = []
    parents: dict[str, str | None] = {}
    holds_run: set[str] = set()
    # path, name below the root, the sweep it is a job of, what its sweep says its overrides are
    stack: list[tuple[str, str, str | None, tuple[str, ...] | None]] = [(root, "", None, None)]
    parents[""] = None

    def leave_out(name: str, kind: str, reason: str) -> None:
        left_out.append({"folder": name or ".", "kind": kind, "reason": reason})

    while stack:
        path, name, sweep, listed = stack.pop()
        try:
            with os.scandir(path) as listing:
                entries = {entry.name: entry for entry in listing}
        except FileNotFoundError:
            continue
        except OSError as error:
            leave_out(name, "foreign", f"cannot be opened ({error.strerror})")
            holds_run.add(name)
            continue
        is_run = listed is not None or not entries.keys().isdisjoint((RESULT, METRICS, HYDRA))
        if is_run:
            found.append(_found(path, name, sweep, listed, entries))
            above: str | None = name
            while above is not None and above not in holds_run:
                holds_run.add(above)
                above = parents[above]
        jobs: dict[str, tuple[str, ...]] = {}
        is_sweep = JOBS in entries or "multirun.yaml" in entries
        if JOBS in entries:
            try:
                jobs = _listed_jobs(os.path.join(path, JOBS))
            except (OSError, ValueError) as error:
                leave_out(_joined(name, JOBS), "damaged", f"cannot be read ({_brief(error)})")
        for below, entry in entries.items():
            if below.startswith(".") or below == "stages":
                continue
            below_name = _joined(name, below)
            try:
                if not entry.is_dir(follow_symlinks=False):
                    if entry.is_symlink() and entry.is_dir():
                        leave_out(below_name, "foreign", "a link: name what it points to instead")
                    continue
            except OSError:
                continue
            parents[below_name] = name
            stack.append((entry.path, below_name, name if is_sweep else None, jobs.get(below)))
        for job, overrides in jobs.items():
            if job not in entries:
                found.append(
                    _Found(
                        path=os.path.join(path, job),
                        name=_joined(name, job),
                        sweep=name,
                        seen=NOTHING_SEEN,
                        last_sign=None,
                        overrides=overrides,
                        begun=False,
                    )
                )
                holds_run.add(name)
    for name, above in parents.items():
        is_top = above is None or above in holds_run
        # A sweep's own report is no run and no surprise.
        if is_top and name not in holds_run and name.rsplit("/", 1)[-1] != "report":
            leave_out(name, "foreign", "holds no run")
    return _Scan(found, left_out)


def _found(
    path: str,
    name: str,
    sweep: str | None,
    overrides: tuple[str, ...] | None,
    entries: dict[str, os.DirEntry[str]],
) -> _Found:
    seen: tuple[int, ...] = ()
    last_sign = None
    for file in (RESULT, METRICS):
        seen += _look(entries[file].stat if file in entries else None)
    if RESULT in entries:
        return _Found(path, name, sweep, (*seen, 0, 0, 0), last_sign, overrides)
    settings = os.path.join(path, HYDRA, "config.yaml")
    seen += _look((lambda: os.stat(settings)) if HYDRA in entries else None)
    times = [time_ns for time_ns in (seen[3], seen[6]) if time_ns]
    times += [_look(e.stat)[0] for file, e in entries.items() if file.endswith(".log")]
    last_sign = _when(max(times)) if times else None
    return _Found(path, name, sweep, seen, last_sign, overrides)


def _look(stat: Callable[[], os.stat_result] | None) -> tuple[int, int, int]:
    """Time of change in ns, size and inode; zeros for a file that is not there (any more)."""
    if stat is None:
        return 0, 0, 0
    try:
        status = stat()
    except OSError:
        return 0, 0, 0
    return status.st_mtime_ns, status.st_size, status.st_ino


def _listed_jobs(path: str) -> dict[str, tuple[str, ...]]:
    """What `jobs.json` of a sweep lists: folder -> overrides. Raises ValueError if it does not."""
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    try:
        return {str(job["folder"]): tuple(map(str, job["overrides"])) for job in content}
    except (KeyError, TypeError) as error:
        raise ValueError("not a list of jobs") from error


# ---------------------------------------------------------------------------------------------
# Reading records


class _Unreadable(ValueError):
    """A run that cannot be laid out in tables."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


# What a piece of the results is before it becomes frames: Arrow tables whose rows name their run
# by a number, `code`.
_Piece = dict[str, pa.Table]


def _setting_kinds(schema: type = Config, prefix: str = "") -> dict[str, str]:
    """Every setting that holds a value -> what its column holds."""
    kinds: dict[str, str] = {}
    for name, hint in get_type_hints(schema).items():
        if is_dataclass(hint) and isinstance(hint, type):
            kinds |= _setting_kinds(hint, f"{prefix}{name}.")
            continue
        if get_origin(hint) in (Union, UnionType):
            options = [option for option in get_args(hint) if option is not NoneType]
            hint = options[0] if len(options) == 1 else str
        kinds[prefix + name] = {bool: "flag", int: "whole", float: "number"}.get(hint, "text")
    return kinds


SETTINGS = _setting_kinds()


def _schema(columns: dict[str, str]) -> pa.Schema:
    return pa.schema([("code", pa.int64()), *((n, ARROW[k]) for n, k in columns.items())])


RAW_RUN_COLUMNS = {
    **{n: k for n, k in IDENTITY_COLUMNS.items() if n not in ("run", "sweep", "duplicate_of")},
    **FIGURE_COLUMNS,
    **{n: k for n, k in PLACE_COLUMNS.items() if n not in ("folder", "last_sign")},
    "experiment_key": "text",
    **{f"config.{name}": kind for name, kind in SETTINGS.items()},
}
SCHEMAS = {
    "runs": _schema(RAW_RUN_COLUMNS),
    "phases": _schema({n: k for n, k in PHASE_COLUMNS.items() if n != "run"}),
    "epochs": _schema({n: k for n, k in EPOCH_COLUMNS.items() if n != "run"}),
    "exits": _schema({n: k for n, k in EXIT_COLUMNS.items() if n != "run"}),
}


def _empty_piece() -> _Piece:
    return {name: schema.empty_table() for name, schema in SCHEMAS.items()}


def _concatenated(pieces: Sequence[_Piece]) -> _Piece:
    if not pieces:
        return _empty_piece()
    return {
        name: pa.concat_tables([piece[name] for piece in pieces], promote_options="default")
        for name in SCHEMAS
    }


def _read_root(
    root: str, found: list[_Found], first_code: int
) -> tuple[_Piece, list[_Found], list[dict[str, str]]]:
    """Read what was found below one folder, from its cache where that is still true.

    Gives the tables, the runs in them with their codes from `first_code` on, and what was left out.
    """
    now = time.time_ns()
    kept, cached = _read_cache(root, found)
    names = {item.name for item in kept}
    fresh = [item for item in found if item.name not in names]
    runs = [replace(item, code=code) for code, item in enumerate(kept + fresh)]
    pieces = [cached]
    left_out: list[dict[str, str]] = []
    for start in range(len(kept), len(runs), CHUNK_RUNS):
        chunk, problems = _read_runs(runs[start : start + CHUNK_RUNS])
        pieces.append(chunk)
        left_out += problems
    piece = _concatenated(pieces)
    read = set(piece["runs"]["code"].to_pylist())
    runs = [item for item in runs if item.code in read]
    if len(fresh) >= CACHE_FROM_RUNS:
        troubled = {problem["folder"] for problem in left_out}
        settled = [
            item
            for item in runs
            if item.begun and item.name not in troubled and item.changed < now - SETTLED_NS
        ]
        _write_cache(root, settled, piece)
    codes = np.arange(len(kept) + len(fresh)) + first_code
    runs = [replace(item, code=item.code + first_code) for item in runs]
    return _recoded(piece, codes), runs, left_out


def _read_runs(found: Sequence[_Found]) -> tuple[_Piece, list[dict[str, str]]]:
    """Read runs from their files; also what had to be left out, and why."""
    runs: list[dict[str, Any]] = []
    phases: list[dict[str, Any]] = []
    exits: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []
    with_metrics: list[_Found] = []
    for item in found:
        try:
            run, its_phases, its_exits = _read_run(item)
        except _Unreadable as error:
            left_out.append({"folder": item.name or ".", "kind": error.kind, "reason": str(error)})
            continue
        for row in (run, *its_phases, *its_exits):
            row["code"] = item.code
        runs.append(run)
        phases += its_phases
        exits += its_exits
        if item.seen[3]:
            with_metrics.append(item)
    epochs, problems = _read_epochs(with_metrics)
    _count_unfinished(runs, epochs)
    schema = SCHEMAS["runs"]
    others = sorted({name for run in runs for name in run} - set(schema.names))
    for name in others:
        schema = schema.append(pa.field(name, pa.string()))
    piece = {
        "runs": pa.Table.from_pylist(runs, schema=schema),
        "phases": pa.Table.from_pylist(phases, schema=SCHEMAS["phases"]),
        "epochs": epochs,
        "exits": pa.Table.from_pylist(exits, schema=SCHEMAS["exits"]),
    }
    return piece, left_out + problems


Rows = list[dict[str, Any]]


def _read_run(item: _Found) -> tuple[dict[str, Any], Rows, Rows]:
    """One run's rows: of itself, its phases, its exits. Raises _Unreadable."""
    result: dict[str, Any] | None = None
    if not item.begun:
        return _described_by_overrides({"status": WAITING}, item.overrides or ()), [], []
    try:
        result = read_result(Path(item.path))
    except RecursionError:
        raise _Unreadable("damaged", f"{RESULT} cannot be read (nested too deeply)") from None
    except ValueError as error:
        raise _Unreadable(
            "damaged", f"{RESULT} is cut short or damaged ({_brief(error)})"
        ) from error
    except OSError as error:
        raise _Unreadable("damaged", f"{RESULT} cannot be read ({error.strerror})") from error
    if result is not None:
        _check_format(result)
    settings = result.get("config") if result else None
    choices = result.get("choices") if result else None
    overrides = result.get("overrides") if result else None
    started = result.get("started") if result else None
    if not isinstance(settings, dict):
        settings = _read_yaml(item.path, "config.yaml")
        if result is None and item.overrides is None and not item.seen[3]:
            if settings is None:
                raise _Unreadable("foreign", f"holds neither {RESULT} nor {HYDRA}/config.yaml")
            if not isinstance(settings, dict) or "initial_layers" not in settings:
                raise _Unreadable("foreign", "a Hydra job, but none of this tool")
        overrides = overrides or _read_yaml(item.path, "overrides.yaml") or item.overrides
        choices = _chosen(_read_yaml(item.path, "hydra.yaml"))
    if started is None and item.seen[6]:
        started = _when(item.seen[6]).isoformat()
    row: dict[str, Any] = {
        "status": RUNNING if result is None else result["status"],
        "started": _moment(started),
    }
    given = (
        [str(override) for override in overrides] if isinstance(overrides, (list, tuple)) else []
    )
    _described_by_overrides(row, given)
    if isinstance(settings, dict):
        row |= _settings_row(settings)
        row["seed"] = _whole(settings.get("seed"))
        fingerprint = _inside(result, "corpus", "fingerprint")
        row["experiment_key"] = _experiment_key(settings, fingerprint)
    if isinstance(choices, dict):
        for group, choice in choices.items():
            row[group if group in GROUPS else f"choice.{_text(group)}"] = _text(choice)
    if result is None:
        return row, [], []
    phases, exits = _phase_rows(result["phases"])
    return row | _result_row(result, phases), phases, exits


def _check_format(result: Any) -> None:
    """Raise _Unreadable unless this is a record that this version can read."""
    if not isinstance(result, dict) or not isinstance(result.get("format"), int):
        raise _Unreadable("foreign", f"{RESULT} is no record of this tool")
    if result["format"] > RECORD_FORMAT:
        raise _Unreadable(
            "newer",
            f"{RESULT} has format {result['format']}, newer than {RECORD_FORMAT}: "
            "read it with a newer version",
        )
    if result.get("status") not in list(Status):
        raise _Unreadable("damaged", f"{RESULT} does not say how the run ended")
    if not isinstance(result.get("phases"), list):
        raise _Unreadable("damaged", f"{RESULT} has no list of phases")


def _result_row(result: dict[str, Any], phases: Rows) -> dict[str, Any]:
    """What a record says of the run as a whole."""
    completed = result["status"] == Status.completed
    row: dict[str, Any] = {
        "reason": _text(result.get("reason")),
        "traceback": _text(result.get("traceback")),
        "ended": _moment(result.get("ended")),
        "wall_seconds": _number(result.get("seconds")),
        "phases": len(phases),
        "corpus": _text(_inside(result, "corpus", "name")),
        "corpus_fingerprint": _text(_inside(result, "corpus", "fingerprint")),
        "vocab_size": _whole(_inside(result, "corpus", "vocab_size")),
        "git_commit": _text(_inside(result, "git", "commit")),
        "git_changed": _flag(_inside(result, "git", "changed")),
    }
    windows = _whole(_inside(result, "corpus", "validation_windows"))
    seq_len = _whole(_inside(result, "corpus", "seq_len"))
    if windows is not None and seq_len is not None:
        row["validation_tokens"] = _whole(windows * seq_len)
    for name in ("device", "device_name", "torch"):
        row[name] = _text(_inside(result, "machine", name))
    row["threads"] = _whole(_inside(result, "machine", "threads"))
    for name in ("python", "proglayer", "platform", "host"):
        row[name] = _text(_inside(result, "environment", name))
    for name in ("accuracy_points", "perplexity_percent", "loss_nats"):
        row[name] = _number(_inside(result, "changes", name))
    ends = [("first", phases[0])] if phases else []
    ends += [("last", phases[-1])] if phases and completed else []
    for which, phase in ends:
        row[f"{which}_layers"] = phase["layers"]
        row[f"{which}_loss"] = phase["validation_loss"]
        row[f"{which}_perplexity"] = phase["validation_perplexity"]
        row[f"{which}_accuracy_percent"] = phase["validation_accuracy_percent"]
    if completed:
        row["epochs"] = _total(phases, "epochs")
        row["epochs_reused"] = _total(phases, "epochs_reused")
        row["seconds"] = _total(phases, "train_seconds", "evaluation_seconds")
        row["tokens"] = _total(phases, "train_tokens")
        row["flops"] = _total(phases, "train_flops_head", "train_flops_body")
        row["flops_without_head"] = _total(phases, "train_flops_body")
    row["seconds_saved"] = _total(phases, "seconds_saved")
    peaks = [phase["peak_memory_mb"] for phase in phases if phase["peak_memory_mb"] is not None]
    row["peak_memory_mb"] = max(peaks, default=None)
    return row


def _phase_rows(phases: list[Any]) -> tuple[Rows, Rows]:
    """The rows of a record's phases and of their exits. Raises _Unreadable."""
    rows: Rows = []
    exit_rows: Rows = []
    for number, phase in enumerate(phases, start=1):
        row: dict[str, Any] = {"phase": number}
        for name in ("layers", "epochs", "best_epoch"):
            row[name] = _whole(_inside(phase, name))
            if row[name] is None:
                raise _Unreadable("damaged", f"{RESULT} gives no {name} for phase {number}")
        for name in ("name", "stopped", "stage"):
            row[name] = _text(phase.get(name))
        for name in ("new_layers", "frozen", "exit_weights"):
            row[name] = _listed(phase.get(name))
        for role in ("new", "existing", "embedding", "head"):
            row[f"rate_{role}"] = _number(_inside(phase, "rates", role))
        for name in ("parameters_total", "parameters_trainable", "train_tokens"):
            row[name] = _whole(phase.get(name))
        for name in (
            "train_flops_head",
            "train_flops_body",
            "train_seconds",
            "evaluation_seconds",
            "tokens_per_second",
        ):
            row[name] = _number(phase.get(name))
        for name in (
            "train_loss",
            "validation_loss",
            "validation_perplexity",
            "validation_accuracy_percent",
        ):
            row[name] = _number(_inside(phase, "best", name))
        for name in ("epochs_trained", "epochs_replayed", "epochs_reused"):
            row[name] = _whole(_inside(phase, "work", name))
        for name in ("seconds_saved", "seconds_waited"):
            row[name] = _number(_inside(phase, "work", name))
        memory = _inside(phase, "work", "peak_memory_mb")
        row["peak_memory_mb"] = _number(_inside(memory, "process"))
        row["peak_device_memory_mb"] = _number(_inside(memory, "device"))
        rows.append(row)
        exits = phase.get("exits")
        for exit in exits if isinstance(exits, list) else ():
            layer = _whole(_inside(exit, "layer"))
            if layer is None:
                raise _Unreadable("damaged", f"{RESULT} has an exit without layer in {number}")
            exit_rows.append(
                {
                    "phase": number,
                    "layer": layer,
                    "validation_loss": _number(exit.get("validation_loss")),
                    "validation_perplexity": _number(exit.get("validation_perplexity")),
                    "validation_accuracy_percent": _number(exit.get("validation_accuracy_percent")),
                }
            )
    return rows, exit_rows


def _count_unfinished(runs: Rows, epochs: pa.Table) -> None:
    """Give the runs that did not complete what their epochs add up to so far."""
    sums = epochs.group_by("code").aggregate(
        [("epoch", "count")]
        + [(c, "sum") for c in ("reused", "train_seconds", "evaluation_seconds", "train_tokens")]
    )
    by_code = {row["code"]: row for row in sums.to_pylist()}
    for run in runs:
        row = by_code.get(run["code"])
        if row is not None and run["status"] != Status.completed:
            run["epochs"] = row["epoch_count"]
            run["epochs_reused"] = row["reused_sum"]
            run["tokens"] = row["train_tokens_sum"]
            run["seconds"] = (row["train_seconds_sum"] or 0) + (row["evaluation_seconds_sum"] or 0)


def _read_epochs(found: Sequence[_Found]) -> tuple[pa.Table, list[dict[str, str]]]:
    """The epochs in the `metrics.csv` of each; those of one header are parsed at a stroke."""
    tables = [SCHEMAS["epochs"].empty_table()]
    left_out: list[dict[str, str]] = []
    by_header: dict[bytes, list[tuple[_Found, bytes]]] = {}
    for item in found:
        try:
            with open(os.path.join(item.path, METRICS), "rb") as file:
                header, _, body = file.read().replace(b"\r\n", b"\n").partition(b"\n")
        except FileNotFoundError:
            continue
        except OSError as error:
            left_out.append(_metrics_problem(item, error.strerror or str(error)))
            continue
        body = body if not body or body.endswith(b"\n") else body + b"\n"
        by_header.setdefault(header, []).append((item, body))
    for header, bodies in by_header.items():
        try:
            tables.append(_parsed_epochs(header, bodies))
        except (pa.ArrowInvalid, ValueError):
            for item, body in bodies:
                try:
                    tables.append(_parsed_epochs(header, [(item, body)]))
                except (pa.ArrowInvalid, ValueError) as error:
                    left_out.append(_metrics_problem(item, _brief(error)))
    return pa.concat_tables(tables), left_out


def _metrics_problem(item: _Found, why: str) -> dict[str, str]:
    return {
        "folder": item.name or ".",
        "kind": "damaged",
        "reason": f"{METRICS} cannot be read ({why}): its epochs are left out",
    }


def _parsed_epochs(header: bytes, bodies: Sequence[tuple[_Found, bytes]]) -> pa.Table:
    """Rows of CSV under one header, as the table of epochs. Raises ValueError or ArrowInvalid."""
    schema = SCHEMAS["epochs"]
    names = header.decode().split(",")
    needed = {name for name, kind in EPOCH_COLUMNS.items() if kind.endswith("!")}
    if missing := sorted(needed - set(names)):
        raise ValueError(f"it has no column {missing[0]}")
    counts = [body.count(b"\n") for _, body in bodies]
    joined = b"".join(body for _, body in bodies)
    if not joined:
        return schema.empty_table()
    known = [name for name in schema.names if name in names]
    table = pyarrow.csv.read_csv(
        io.BytesIO(joined),
        read_options=pyarrow.csv.ReadOptions(column_names=names, use_threads=False),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types={name: schema.field(name).type for name in known},
            include_columns=known,
        ),
    )
    if table.num_rows != sum(counts):
        raise ValueError("it has empty lines")
    if any(table[name].null_count for name in needed):
        raise ValueError("a row names no phase, layers or epoch")
    codes = np.repeat([item.code for item, _ in bodies], counts)
    columns = [
        pa.array(codes, pa.int64())
        if field.name == "code"
        else table[field.name]
        if field.name in known
        else pa.nulls(len(codes), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def _described_by_overrides(row: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Put the overrides into `row`, with the group choices and the seed that they name."""
    row["overrides"] = _text(" ".join(overrides))
    for key, value in _keys_and_values(overrides):
        if key in GROUPS:
            row[key] = _text(value)
        elif key == "seed" and re.fullmatch(r"\d{1,18}", value):
            row["seed"] = int(value)
    return row


def _keys_and_values(overrides: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Overrides as key and value, without those of Hydra itself."""
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if not key.startswith("hydra."):
            yield key, value


def _read_yaml(folder: str, name: str) -> Any:
    """A file that Hydra wrote about a job; None where it is not there or not to be read."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        with open(os.path.join(folder, HYDRA, name), encoding="utf-8") as file:
            return yaml.load(file, loader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None


def _chosen(hydra: Any) -> dict[str, Any] | None:
    choices = _inside(hydra, "hydra", "runtime", "choices")
    if not isinstance(choices, dict):
        return None
    return {
        str(group): choice
        for group, choice in choices.items()
        if choice is not None and not str(group).startswith("hydra")
    }


def _settings_row(settings: dict[str, Any]) -> dict[str, Any]:
    """The configuration as columns; settings that this version does not have become text."""
    row: dict[str, Any] = {}
    for name, value in _flat(settings):
        kind = SETTINGS.get(name, "text")
        row[f"config.{_text(name)}"] = CLEAN[kind](value)
    return row


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict) and f"{prefix}{name}" not in SETTINGS:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _experiment_key(settings: dict[str, Any], fingerprint: Any) -> str:
    """The same for two runs that are the same experiment, on the same text, with the same seed."""
    aside = NOT_THE_EXPERIMENT + (PLACE_OF_TEXT if fingerprint else ())
    flat = {
        name: float(value) if SETTINGS.get(name) == "number" and _number(value) else value
        for name, value in _flat(settings)
        if name not in aside
    }
    text = json.dumps([flat, fingerprint], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _inside(value: Any, *names: str) -> Any:
    """What lies in nested objects under these names; None where the way ends."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _total(rows: Rows, *names: str) -> Any:
    """The sum of these columns; None if a figure is missing."""
    values = [row[name] for row in rows for name in names]
    return None if None in values else sum(values)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _whole(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
        return None
    return value


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _text(value: Any) -> str | None:
    """Text that every file format can hold; other values as JSON writes them."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if text.isascii():
        return text
    return text.encode("utf-8", "backslashreplace").decode()


def _listed(value: Any) -> str | None:
    return ", ".join(map(str, value)) if isinstance(value, list) else _text(value)


def _when(time_ns: int) -> datetime:
    return datetime.fromtimestamp(time_ns / 1e9, UTC)


def _moment(value: Any) -> datetime | None:
    try:
        moment = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return moment if moment.tzinfo else moment.astimezone()


CLEAN: dict[str, Callable[[Any], Any]] = {
    "text": _text,
    "whole": _whole,
    "number": _number,
    "flag": _flag,
}


def _brief(error: Exception) -> str:
    return _one_line(str(error))[:120]


# ---------------------------------------------------------------------------------------------
# The cache


def _cache_version() -> str:
    """Changes with everything that a cached table depends on besides the runs' files."""
    shape = [CACHE_FORMAT, RECORD_FORMAT, NOT_THE_EXPERIMENT, PLACE_OF_TEXT]
    text = json.dumps(shape) + "".join(str(schema) for schema in SCHEMAS.values())
    return hashlib.sha256(text.encode()).hexdigest()


def _read_cache(root: str, found: list[_Found]) -> tuple[list[_Found], _Piece]:
    """The runs whose files are as the cache has seen them, and their tables: codes 0, 1, ...

    Nothing if there is no sound cache.
    """
    try:
        with zipfile.ZipFile(os.path.join(root, CACHE)) as archive:
            if archive.comment.decode() != _cache_version():
                return [], _empty_piece()
            tables = {
                # Reading a member checks its CRC.
                name: pyarrow.parquet.read_table(io.BytesIO(archive.read(name)))
                for name in ("seen", *SCHEMAS)
            }
    except (OSError, ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile):
        return [], _empty_piece()
    columns = tables.pop("seen").to_pydict()
    names = columns.pop("name")
    looks = enumerate(zip(*columns.values(), strict=True))
    cached = dict(zip(names, looks, strict=True))
    new_codes = np.full(len(cached), -1)
    kept: list[_Found] = []
    for item in found:
        code, seen = cached.get(item.name, (-1, None))
        if item.begun and item.seen == seen:
            new_codes[code] = len(kept)
            kept.append(item)
    return kept, _recoded(tables, new_codes)


def _write_cache(root: str, found: list[_Found], piece: _Piece) -> None:
    """Keep what was read of these runs, whole or not at all; a folder that refuses has no cache."""
    new_codes = np.full(1 + max(piece["runs"]["code"].to_pylist(), default=-1), -1)
    new_codes[[item.code for item in found]] = np.arange(len(found))
    seen = {"name": [item.name for item in found]}
    seen |= {f"seen{i}": [item.seen[i] for item in found] for i in range(len(NOTHING_SEEN))}
    tables = {"seen": pa.table(seen), **_recoded(piece, new_codes)}
    temporary = os.path.join(root, f"{CACHE}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with zipfile.ZipFile(temporary, "x", zipfile.ZIP_STORED) as archive:
            archive.comment = _cache_version().encode()
            for name, table in tables.items():
                content = io.BytesIO()
                pyarrow.parquet.write_table(table, content, compression="zstd")
                archive.writestr(name, content.getbuffer())
        os.replace(temporary, os.path.join(root, CACHE))
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _recoded(piece: _Piece, new_codes: np.ndarray) -> _Piece:
    """`piece` with `new_codes[code]` for each code; rows for which that is negative are dropped."""
    recoded = {}
    for name, table in piece.items():
        codes = new_codes[table["code"].to_numpy()]
        table = table.set_column(0, SCHEMAS[name].field("code"), pa.array(codes, pa.int64()))
        recoded[name] = table if (codes >= 0).all() else table.filter(pa.array(codes >= 0))
    return recoded


# ---------------------------------------------------------------------------------------------
# Tables -> frames


def _results(piece: _Piece, found: list[_Found], left_out: list[dict[str, str]]) -> Results:
    """The frames: runs in the order of their names, numbers in them counted as numbers."""
    found = sorted(found, key=lambda item: _natural(item.name))
    places = np.zeros(1 + max((item.code for item in found), default=-1), dtype=np.int64)
    places[[item.code for item in found]] = np.arange(len(found))
    names = pa.array([_text(item.name) for item in found], pa.string())

    def ordered(name: str) -> tuple[pa.Table, np.ndarray]:
        table = piece[name]
        order = places[table["code"].to_numpy()]
        by_run = np.argsort(order, kind="stable")
        return table.take(by_run).drop_columns("code"), order[by_run]

    table, _ = ordered("runs")
    runs = _frame(table)
    runs.insert(0, "run", _texts(item.name for item in found))
    runs.insert(1, "sweep", _texts(item.sweep for item in found))
    runs["folder"] = _texts(item.path for item in found)
    signs = pa.array([item.last_sign for item in found], ARROW["time"]).to_pandas()
    runs["last_sign"] = signs.fillna(runs["ended"])
    frames = {}
    for name, columns in (
        ("phases", PHASE_COLUMNS),
        ("epochs", EPOCH_COLUMNS),
        ("exits", EXIT_COLUMNS),
    ):
        table, order = ordered(name)
        frame = _frame(table.add_column(0, "run", names.take(order)))
        sure = {column: "int64" for column, kind in columns.items() if kind.endswith("!")}
        frames[name] = frame.astype(sure)[list(columns)]
    runs["duplicate_of"] = _texts(_duplicates(runs))
    runs = _in_order(runs)
    listed = pa.Table.from_pylist(
        [{k: _text(v) for k, v in problem.items()} for problem in left_out],
        schema=pa.schema([(n, ARROW[k]) for n, k in LEFT_OUT_COLUMNS.items()]),
    )
    missing = _frame(listed).sort_values("folder", kind="stable").reset_index(drop=True)
    return Results(runs=runs, left_out=missing, **frames)


def _frame(table: pa.Table) -> pd.DataFrame:
    kinds = {
        pa.string(): pd.StringDtype("pyarrow"),
        pa.int64(): pd.Int64Dtype(),
        pa.bool_(): pd.BooleanDtype(),
    }
    return table.to_pandas(types_mapper=kinds.get, self_destruct=False)


def _texts(values: Iterable[str | None]) -> Any:
    return pd.array([_text(value) for value in values], dtype=pd.StringDtype("pyarrow"))


def _natural(name: str) -> list[Any]:
    """A key that sorts 2_x before 10_x."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in NUMBER.split(name)]


NUMBER = re.compile(r"([0-9]{1,18})")


def _duplicates(runs: pd.DataFrame) -> list[str | None]:
    """For each run the one that counts in its place; None where it counts itself.

    Of several runs of one experiment and seed the newest completed one counts; if none completed,
    one that is running, then the newest.
    """
    rank = {Status.completed.value: 3, RUNNING: 2, Status.interrupted.value: 1}
    columns = [_plain(runs[name]) for name in ("experiment_key", "run", "status", "last_sign")]
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
    known = runs[runs["config.seed"].notna()]
    settings = [column for column in runs.columns if column.startswith("config.")]
    return [column for column in settings if len(known[column].unique()) > 1]


def _in_order(runs: pd.DataFrame) -> pd.DataFrame:
    """Who and how, what varies, the figures, where; then what is the same everywhere."""
    varied = _varied(runs)
    settings = [column for column in runs.columns if column.startswith("config.")]
    choices = sorted(column for column in runs.columns if column.startswith("choice."))
    constant = [column for column in settings if column not in varied]
    front = [*IDENTITY_COLUMNS, *choices, *varied, *FIGURE_COLUMNS, *PLACE_COLUMNS]
    return runs.reindex(columns=front + constant)


def _as_plain_text(text: str) -> str:
    """Text that a spreadsheet shows as it is, with an apostrophe in front where it would not."""
    return "'" + text if text.startswith(FORMULA_STARTS) else text


# = + - @, their full-width twins, and what a spreadsheet skips before it looks for them.
FORMULA_STARTS = ("=", "+", "-", "@", "＝", "＋", "－", "＠", "\t", "\r", "\n", "'")


# ---------------------------------------------------------------------------------------------
# The table of a sweep


@dataclass(frozen=True)
class _Column:
    """A column of the summary. Those with a `give_way` leave a narrow table, highest first."""

    title: str
    cells: list[Text]
    right: bool = False
    flexible: bool = False
    give_way: int = 0

    def narrowest(self) -> int:
        width = max((cell.cell_len for cell in (Text(self.title), *self.cells)), default=0)
        return min(width, NARROW) if self.flexible else width


NARROW = 10
STATUS_STYLE = {
    Status.completed.value: "green",
    Status.failed.value: "bold red",
    Status.interrupted.value: "yellow",
    RUNNING: "cyan",
    WAITING: "dim",
}


def _summary_columns(results: Results) -> list[_Column]:
    runs = results.runs
    progress = _progress(results)
    columns = [_Column("job", [_cut(name) for name in runs["run"]], flexible=True)]
    for title, values in _what_varied(runs).items():
        columns.append(_Column(title, [_cut(value) for value in values], flexible=True))
    status = [Text(value, STATUS_STYLE.get(value, "")) for value in runs["status"]]
    columns.append(_Column("status", status))
    rows = runs.to_dict("records")

    def column(title: str, give_way: int, cell: Callable[[dict[str, Any]], str]) -> None:
        cells = [Text(cell(row)) for row in rows]
        if any(cells):
            columns.append(_Column(title, cells, right=True, give_way=give_way))

    column("layers", 3, lambda row: _pair(row, "layers", "d"))
    column(
        "perplexity", 0, lambda row: progress.get(row["run"]) or _pair(row, "perplexity", ",.2f")
    )
    column("accuracy %", 1, lambda row: _pair(row, "accuracy_percent", ".2f"))
    column("± points", 4, lambda row: _figure(row["accuracy_points"], "+.2f"))
    column("± ppl %", 5, lambda row: _figure(row["perplexity_percent"], "+.2f"))
    column("epochs", 6, lambda row: _figure(row["epochs"], "d"))
    column("reused", 8, lambda row: _figure(row["epochs_reused"], "d"))
    column("time", 2, lambda row: _duration(row["seconds"]))
    column("saved", 7, lambda row: _duration(row["seconds_saved"]))
    return columns


def _fit(columns: Sequence[_Column], width: int | None) -> list[str]:
    """The titles of the columns that leave so that the rest fits into `width`."""
    if width is None:
        return []
    left: list[str] = []
    for column in sorted(columns, key=lambda column: -column.give_way):
        need = 1 + sum(c.narrowest() + 3 for c in columns if c.title not in left)
        if need <= width or not column.give_way:
            break
        left.append(column.title)
    return left


def _what_varied(runs: pd.DataFrame) -> dict[str, list[str]]:
    """Short title -> each run's value, for the overrides that differ between the runs."""
    given = [dict(_keys_and_values((text or "").split(" "))) for text in _plain(runs["overrides"])]
    keys = dict.fromkeys(key for overrides in given for key in overrides if key)
    varied: dict[str, list[str]] = {}
    for key in keys:
        column = key if key in GROUPS else f"config.{key}"
        recorded = _plain(runs[column]) if column in runs else [None] * len(runs)
        values = [
            overrides[key] if key in overrides else "" if value is None else str(value)
            for overrides, value in zip(given, recorded, strict=True)
        ]
        if len(set(values)) > 1:
            varied[key] = values
    leaves = Counter(key.rsplit(".", 1)[-1] for key in varied)
    titles = {key: key.rsplit(".", 1)[-1] for key in varied}
    return {
        titles[key] if leaves[titles[key]] == 1 else key: values for key, values in varied.items()
    }


def _progress(results: Results) -> dict[str, str]:
    """How far each running run is: its last epoch, and the best so far of that phase."""
    runs = results.runs
    running = runs.loc[runs["status"] == RUNNING, "run"]
    progress = {}
    for run, epochs in results.epochs[results.epochs["run"].isin(running)].groupby("run"):
        phase = epochs["phase"].max()
        epochs = epochs[epochs["phase"] == phase]
        best = epochs["validation_perplexity"].min()
        progress[run] = f"{best:,.2f} (phase {phase}, epoch {epochs['epoch'].max()})"
    return progress


def _print_results(results: Results, out: Console) -> None:
    if len(results.runs):
        out.print(summary_table(results, out.width))
    lines = [
        Text(f"left out: {_one_line(folder)}: {_one_line(reason)}")
        for folder, reason in zip(
            results.left_out["folder"], results.left_out["reason"], strict=True
        )
    ]
    for line in lines:
        line.truncate(out.width, overflow="ellipsis")
        out.print(line)
    out.print(Text(_totals(results)))


def _totals(results: Results) -> str:
    """How many runs there are of each status, in a line."""
    counts = Counter(results.runs["status"].tolist())
    parts = [
        f"{counts[status]} {status}"
        for status in (*(status.value for status in Status), RUNNING, WAITING)
        if status in counts
    ]
    repeats = results.runs["duplicate_of"].notna().tolist().count(True)
    parts += [f"{repeats} repeat another's settings and seed"] if repeats else []
    number = len(results.runs)
    return f"{number} run{'' if number == 1 else 's'}" + (f": {', '.join(parts)}" if parts else "")


def _plain(values: Any) -> list[Any]:
    """A column as Python values, None for what is missing."""
    return [
        None if missing else value for value, missing in zip(values, values.isna(), strict=True)
    ]


def _pair(row: dict[str, Any], name: str, form: str) -> str:
    first, last = _figure(row[f"first_{name}"], form), _figure(row[f"last_{name}"], form)
    return f"{first} → {last}" if first else ""


def _figure(value: Any, form: str) -> str:
    return "" if pd.isna(value) else format(value, form)


def _duration(seconds: Any) -> str:
    """Seconds for people: 8.4 s, 12 min 30 s, 3 h 5 min."""
    if pd.isna(seconds):
        return ""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds) // 60
    if minutes < 100:
        return f"{minutes} min {round(seconds) % 60} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def _one_line(text: str) -> str:
    """Text without line breaks or anything that a terminal would act on."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


def _cut(text: str) -> Text:
    return Text(_one_line(text), no_wrap=True, overflow="ellipsis")


# ---------------------------------------------------------------------------------------------
# The command line


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Gives its exit status: 1 if any run failed, 2 for a folder that is not there."""
    parser = argparse.ArgumentParser(
        prog="python -m proglayer.results",
        description="Print the table of every run in sweeps or single runs, finished or not.",
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a sweep, a run, or a pile")
    parser.add_argument("--csv", metavar="DIR", help="also write the tables as CSV")
    parser.add_argument("--parquet", metavar="DIR", help="also write the tables as Parquet")
    options = parser.parse_args(arguments)
    try:
        results = load(*options.folders)
        _print_results(results, console())
        if options.csv:
            results.to_csv(options.csv)
        if options.parquet:
            results.to_parquet(options.parquet)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main())
