"""The study's tables: the records of any number of runs and sweeps, read together.

`load` finds every run below the folders it is given, finished or not, and lays out what they
recorded as tidy pandas frames. As a command, `python -m proglayer.results FOLDER...` shows them:
see `proglayer.summary`.

Reading thousands of records takes seconds, so what was read is kept in one file in each folder that
`load` was given (`.results-cache`). It is only ever a copy: a run whose files changed is read
again, and a cache that is damaged, foreign or of another version is ignored.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import secrets
import shlex
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from proglayer.config import Config
from proglayer.display import one_line
from proglayer.record import (
    HEARTBEAT,
    JOBS,
    LOST_AFTER_S,
    METRICS,
    METRICS_COLUMNS,
    RECORD_FORMAT,
    RESULT,
    Sign,
    Status,
    read_result,
    read_sign,
)

HYDRA = ".hydra"
CACHE = ".results-cache"
# Raise by hand when a cached table would be misread although its columns are the same.
CACHE_FORMAT = 2
# With fewer new runs than this, reading them again costs less than writing the cache.
CACHE_FROM_RUNS = 200
# A file this young may change once more within one tick of the file system's clock.
SETTLED_NS = 2_000_000_000
CHUNK_RUNS = 500

RUNNING = Sign.running.value
PENDING = Sign.pending.value
WAITING = "waiting"
NOT_STARTED = "not started"
LOST = "lost"
COMPLETED = Status.completed.value

# Two runs that differ in these alone are the same experiment with the same seed: they say where
# and how a run works, not what it trains. Device, threads, compiler change the rounding, no more.
NOT_THE_EXPERIMENT = (
    "plan",
    "on_error",
    "objective",
    "reuse",
    "report",
    "checkpoint_every_s",
    "logger.tensorboard",
    "logger.mlflow",
    "stages.dir",
    "threads",
    "device",
    "compile",
    "jobs_per_gpu",
    "data.cache_dir",
)
# Where the text lies; the corpus's fingerprint, where it is known, says what it is.
PLACE_OF_TEXT = ("data.path", "data.files")

GROUPS = ("model", "experiment", "data", "phase", "growth", "freeze", "lr")

# Columns: what they hold (text, a whole number, a number, yes or no, a time; with ! never missing)
# and, where it is taken from a record as it is, where it stands there.
IDENTITY_COLUMNS = {
    "run": "text",
    "sweep": "text",
    "status": "text",
    "reason": "text reason",
    **dict.fromkeys(GROUPS, "text"),
    "seed": "whole",
    "duplicate_of": "text",
}
FIGURE_COLUMNS = {
    "accuracy_points": "number changes.accuracy_points",
    "perplexity_percent": "number changes.perplexity_percent",
    "loss_nats": "number changes.loss_nats",
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
    "wall_seconds": "number seconds",
    "tokens": "whole",
    "flops": "number",
    "flops_without_head": "number",
    "peak_memory_mb": "number",
}
PLACE_COLUMNS = {
    "overrides": "text",
    "started": "time",
    "ended": "time ended",
    "last_sign": "time",
    "corpus": "text corpus.name",
    "corpus_fingerprint": "text corpus.fingerprint",
    "vocab_size": "whole corpus.vocab_size",
    "validation_tokens": "whole",
    "device": "text machine.device",
    "device_name": "text machine.device_name",
    "threads": "whole machine.threads",
    "torch": "text machine.torch",
    "python": "text environment.python",
    "proglayer": "text environment.proglayer",
    "platform": "text environment.platform",
    "host": "text environment.host",
    "scheduler": "text environment.scheduler.name",
    "scheduler_job": "text environment.scheduler.job",
    "node": "text environment.scheduler.node",
    "gpu": "text gpu.name",
    "seconds_waited_for_gpu": "number gpu.seconds_waited",
    "git_commit": "text git.commit",
    "git_changed": "flag git.changed",
    "traceback": "text traceback",
    "folder": "text",
}
PHASE_COLUMNS = {
    "run": "text",
    "phase": "whole!",
    "name": "text name",
    "layers": "whole! layers",
    "new_layers": "text new_layers",
    "parameters_total": "whole parameters_total",
    "parameters_trainable": "whole parameters_trainable",
    "frozen": "text frozen",
    "rate_new": "number rates.new",
    "rate_existing": "number rates.existing",
    "rate_embedding": "number rates.embedding",
    "rate_head": "number rates.head",
    "exit_weights": "text exit_weights",
    "epochs": "whole! epochs",
    "best_epoch": "whole! best_epoch",
    "stopped": "text stopped",
    "train_loss": "number best.train_loss",
    "validation_loss": "number best.validation_loss",
    "validation_perplexity": "number best.validation_perplexity",
    "validation_accuracy_percent": "number best.validation_accuracy_percent",
    "train_tokens": "whole train_tokens",
    "train_flops_head": "number train_flops_head",
    "train_flops_body": "number train_flops_body",
    "train_seconds": "number train_seconds",
    "evaluation_seconds": "number evaluation_seconds",
    "tokens_per_second": "number tokens_per_second",
    "epochs_trained": "whole work.epochs_trained",
    "epochs_replayed": "whole work.epochs_replayed",
    "epochs_reused": "whole work.epochs_reused",
    "seconds_saved": "number work.seconds_saved",
    "seconds_waited": "number work.seconds_waited",
    "peak_memory_mb": "number work.peak_memory_mb.process",
    "peak_device_memory_mb": "number work.peak_memory_mb.device",
    "stage": "text stage",
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
    "layer": "whole! layer",
    "validation_loss": "number validation_loss",
    "validation_perplexity": "number validation_perplexity",
    "validation_accuracy_percent": "number validation_accuracy_percent",
}
LEFT_OUT_COLUMNS = {"folder": "text", "kind": "text", "reason": "text"}


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
        failed = statuses.count(Status.failed.value) + statuses.count(LOST)
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
    roots = _roots(folders)
    above = _common_parent(roots)
    pieces: list[_Piece] = []
    runs: list[_Found] = []
    left_out: Rows = []
    codes = 0
    for root in roots:
        prefix = os.path.relpath(root, above)
        prefix = "" if prefix == "." else prefix
        own_name = Path(root).resolve().name
        found, problems = _scan(root)
        piece, read, more_problems = _read_root(root, found, codes)
        codes += len(found)
        pieces.append(piece)
        for item in read:
            sweep = item.sweep if item.sweep is None else _joined(prefix, item.sweep) or own_name
            name = _joined(prefix, item.name) or own_name
            runs.append(item._replace(name=name, sweep=sweep))
        for problem in (*problems, *more_problems):
            left_out.append(problem | {"folder": _joined(prefix, problem["folder"]) or "."})
    if len(roots) > 1:
        runs.sort(key=lambda item: _natural(item.name))
    return _results(_concatenated(pieces), runs, left_out)


# ---------------------------------------------------------------------------------------------
# Finding runs


class _Found(NamedTuple):
    """A run's folder. `seen` is what its files look like; `code` its rows' name in Arrow tables.

    `last_sign` is when a run without a record showed life last, or its sweep before it begins.
    """

    path: str
    name: str
    sweep: str | None
    seen: tuple[int, ...]
    last_sign: datetime | None
    overrides: tuple[str, ...] | None
    begun: bool = True
    code: int = -1


# Of each file: when it changed (ns), its size and inode; zeros for one that is not there.
SEEN = tuple(
    f"{file} {what}" for file in (RESULT, METRICS, HYDRA) for what in ("time", "size", "inode")
)
NO_FILE = (0, 0, 0)

Rows = list[dict[str, Any]]


def _roots(folders: Sequence[str | Path]) -> list[str]:
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


def _common_parent(roots: Sequence[str]) -> str:
    if len(roots) < 2:
        return "".join(roots) or "."
    return os.path.commonpath([os.path.abspath(root) for root in roots])


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}/{name}" if prefix and name else prefix or name


def _scan(root: str) -> tuple[list[_Found], Rows]:
    """Walk `root` for runs, and for what is none: one listing a folder, two or three stats a run.

    Runs come in the order of their names, numbers in them counted as numbers. A job that its sweep
    lists but that has no folder yet is found as not begun.
    """
    found: list[_Found] = []
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
            left_out.append(_left_out(name, "foreign", f"cannot be opened ({error.strerror})"))
            accounted_for.add(name)
            continue
        if listed is not None or not entries.keys().isdisjoint((RESULT, METRICS, HYDRA)):
            found.append(_found(path, name, sweep, listed, entries))
        jobs: dict[str, tuple[str, ...]] = {}
        if JOBS in entries:
            try:
                jobs = _listed_jobs(os.path.join(path, JOBS))
            except (OSError, ValueError, RecursionError) as error:
                reason = f"cannot be read ({_brief(error)}): waiting jobs are not known"
                left_out.append(_left_out(_joined(name, JOBS), "foreign", reason))
            signs = [_look(entries[file].stat)[0] for file in (JOBS, HEARTBEAT) if file in entries]
            sweep_signs[name] = _when(max(signs))
        is_sweep = JOBS in entries or "multirun.yaml" in entries
        for below, entry in entries.items():
            if below.startswith(".") or below == "stages":
                continue
            below_name = _joined(name, below)
            if entry.is_dir(follow_symlinks=False):
                parents[below_name] = name
                its_sweep = name if is_sweep else None
                stack.append((entry.path, below_name, its_sweep, jobs.get(below)))
            elif entry.is_symlink() and os.path.isdir(entry.path):
                reason = "a link: name the folder that it points to"
                left_out.append(_left_out(below_name, "foreign", reason))
        for job, overrides in jobs.items():
            if job not in entries:
                job_path, job_name = os.path.join(path, job), _joined(name, job)
                parents[job_name] = name
                seen = NO_FILE * 3
                found.append(_Found(job_path, job_name, name, seen, None, overrides, begun=False))
    for item in found:
        if item.sweep in sweep_signs:
            sign = item.last_sign or _when(item.seen[0])
            sweep_signs[item.sweep] = max(sign, sweep_signs[item.sweep])
    found = [
        item if item.begun else item._replace(last_sign=sweep_signs[item.sweep]) for item in found
    ]
    for item in found:
        above: str | None = item.name
        while above is not None and above not in accounted_for:
            accounted_for.add(above)
            above = parents[above]
    for name, above in parents.items():
        topmost = above is None or above in accounted_for
        # A sweep's own report is no run and no surprise.
        if topmost and name not in accounted_for and os.path.basename(name) != "report":
            left_out.append(_left_out(name, "foreign", "holds no run"))
    return sorted(found, key=lambda item: _natural(item.name)), left_out


def _left_out(name: str, kind: str, reason: str) -> dict[str, Any]:
    return {"folder": name, "kind": kind, "reason": reason}


def _found(
    path: str,
    name: str,
    sweep: str | None,
    overrides: tuple[str, ...] | None,
    entries: dict[str, os.DirEntry[str]],
) -> _Found:
    """The run in this folder. What Hydra wrote is looked at only where there is no record."""
    result = _look(entries[RESULT].stat) if RESULT in entries else NO_FILE
    metrics = _look(entries[METRICS].stat) if METRICS in entries else NO_FILE
    if result != NO_FILE:
        return _Found(path, name, sweep, result + metrics + NO_FILE, None, overrides)
    settings = _look(lambda: os.stat(os.path.join(path, HYDRA, "config.yaml")))
    times = [metrics[0], settings[0]]
    times += [
        _look(entry.stat)[0]
        for file, entry in entries.items()
        if file == HEARTBEAT or file.endswith(".log")
    ]
    last_sign = _when(max(times) or _look(lambda: os.stat(path))[0])
    return _Found(path, name, sweep, result + metrics + settings, last_sign, overrides)


def _look(stat: Callable[[], os.stat_result]) -> tuple[int, int, int]:
    try:
        status = stat()
    except OSError:
        return NO_FILE
    return status.st_mtime_ns, status.st_size, status.st_ino


def _listed_jobs(path: str) -> dict[str, tuple[str, ...]]:
    """What `jobs.json` of a sweep lists: folder -> overrides. Raises ValueError if it does not."""
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    try:
        return {str(job["folder"]): tuple(map(str, job["overrides"])) for job in content}
    except (KeyError, TypeError) as error:
        raise ValueError("no list of jobs") from error


# ---------------------------------------------------------------------------------------------
# Reading records


# What becomes the frames: Arrow tables whose rows name their run by a number, `code`.
_Piece = dict[str, pa.Table]

ARROW = {
    "text": pa.string(),
    "whole": pa.int64(),
    "number": pa.float64(),
    "flag": pa.bool_(),
    "time": pa.timestamp("us", "UTC"),
}


class _Unreadable(ValueError):
    """A run that cannot be laid out in tables, and what kind of thing it is."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class _Column(NamedTuple):
    """What a column holds, whether it must, and its place in the record (empty: computed)."""

    kind: str
    required: bool
    place: tuple[str, ...]


def _columns(specification: dict[str, str]) -> dict[str, _Column]:
    columns = {}
    for name, text in specification.items():
        kind, _, place = text.partition(" ")
        columns[name] = _Column(
            kind.rstrip("!"), kind.endswith("!"), tuple(place.split(".")) if place else ()
        )
    return columns


def _setting_kinds(schema: type = Config, prefix: str = "") -> dict[str, str]:
    """Every setting that holds a value -> what its column holds; lists and enums are text."""
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

COLUMNS = {
    "runs": _columns(
        {
            **IDENTITY_COLUMNS,
            **FIGURE_COLUMNS,
            **PLACE_COLUMNS,
            "experiment_key": "text",
            **{f"config.{name}": kind for name, kind in SETTINGS.items()},
        }
    ),
    "phases": _columns(PHASE_COLUMNS),
    "epochs": _columns(EPOCH_COLUMNS),
    "exits": _columns(EXIT_COLUMNS),
}
# Known only once all runs are: these are not in the tables that are read and cached.
NAMED_LATER = ("run", "sweep", "duplicate_of", "last_sign", "folder")
SCHEMAS = {
    table: pa.schema(
        [
            ("code", pa.int64()),
            *((n, ARROW[column.kind]) for n, column in columns.items() if n not in NAMED_LATER),
        ]
    )
    for table, columns in COLUMNS.items()
}
RECORDED = {
    table: {name: column for name, column in columns.items() if column.place}
    for table, columns in COLUMNS.items()
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
) -> tuple[_Piece, list[_Found], Rows]:
    """Read what was found below one folder, from its cache where that is still true.

    Gives the tables, the runs in them with their codes from `first_code` on, and what was left out.
    """
    now = time.time_ns()
    kept, cached = _read_cache(root, found)
    names = {item.name for item in kept}
    fresh = [item for item in found if item.name not in names]
    runs = [item._replace(code=code) for code, item in enumerate(kept + fresh)]
    pieces = [cached]
    left_out: Rows = []
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
            if item.begun and item.name not in troubled and max(item.seen[::3]) < now - SETTLED_NS
        ]
        _write_cache(root, settled, piece)
    place = {item.name: number for number, item in enumerate(found)}
    runs.sort(key=lambda item: place[item.name])
    if first_code:
        piece = _recoded(piece, np.arange(len(found)) + first_code)
        runs = [item._replace(code=item.code + first_code) for item in runs]
    return piece, runs, left_out


def _read_runs(found: Sequence[_Found]) -> tuple[_Piece, Rows]:
    """Read runs from their files; also what had to be left out, and why."""
    runs: Rows = []
    phases: Rows = []
    exits: Rows = []
    left_out: Rows = []
    with_metrics: list[_Found] = []
    for item in found:
        try:
            run, its_phases, its_exits = _read_run(item)
        except _Unreadable as error:
            left_out.append(_left_out(item.name, error.kind, str(error)))
            continue
        for row in (run, *its_phases, *its_exits):
            row["code"] = item.code
        runs.append(run)
        phases += its_phases
        exits += its_exits
        if item.seen[3]:
            with_metrics.append(item)
    epochs, problems = _read_epochs(with_metrics)
    _add_up_unfinished(runs, epochs)
    schema = SCHEMAS["runs"]
    for name in sorted({name for run in runs for name in run} - set(schema.names)):
        # Choices of other groups, and settings that this version does not have.
        schema = schema.append(pa.field(name, pa.string()))
    piece = {
        "runs": pa.Table.from_pylist(runs, schema=schema),
        "phases": pa.Table.from_pylist(phases, schema=SCHEMAS["phases"]),
        "epochs": epochs,
        "exits": pa.Table.from_pylist(exits, schema=SCHEMAS["exits"]),
    }
    return piece, left_out + problems


def _read_run(item: _Found) -> tuple[dict[str, Any], Rows, Rows]:
    """One run's rows: its own, its phases', its exits'. Raises _Unreadable."""
    if not item.begun:
        return {"status": WAITING, **_told_by_overrides(item.overrides or ())}, [], []
    result = _read_record(item.path)
    of_record = result or {}
    settings = of_record.get("config")
    overrides = of_record.get("overrides")
    choices = of_record.get("choices")
    started = _moment(of_record.get("started"))
    if not isinstance(settings, dict):
        # Still running, or ended before it began: what Hydra wrote down tells the rest.
        settings = _read_yaml(item.path, "config.yaml")
        if result is None and item.overrides is None and not _is_ours(settings):
            raise _Unreadable("foreign", f"holds no {RESULT}, and is no job of this tool")
        overrides = _read_yaml(item.path, "overrides.yaml") or item.overrides
        hydra = _read_yaml(item.path, "hydra.yaml")
        choices = _inside(hydra, ("hydra", "runtime", "choices"))
        started = _when(item.seen[6]) if item.seen[6] else None
    row: dict[str, Any] = {"status": RUNNING, "started": started}
    if isinstance(overrides, (list, tuple)):
        row |= _told_by_overrides([str(override) for override in overrides])
    if isinstance(choices, dict):
        row |= {
            group if group in GROUPS else f"choice.{_text(group)}": _text(choice)
            for group, choice in choices.items()
            if choice is not None and not str(group).startswith(("hydra", "local", "logger"))
        }
    if isinstance(settings, dict):
        fingerprint = _inside(result, ("corpus", "fingerprint"))
        row |= _settings_row(settings)
        row["seed"] = _whole(settings.get("seed"))
        row["experiment_key"] = _experiment_key(settings, fingerprint)
    if result is None:
        return row, [], []
    phases, exits = _phase_rows(result["phases"])
    return row | _result_row(result, phases), phases, exits


def _read_record(folder: str) -> dict[str, Any] | None:
    """The record of a run if it ended. Raises _Unreadable for one that this version cannot read."""
    try:
        result = read_result(Path(folder))
    except (ValueError, RecursionError) as error:
        reason = f"{RESULT} is cut short or damaged ({_brief(error)})"
        raise _Unreadable("damaged", reason) from error
    except OSError as error:
        raise _Unreadable("damaged", f"{RESULT} cannot be read ({error.strerror})") from error
    if result is None:
        if os.path.exists(os.path.join(folder, RESULT)):
            raise _Unreadable("damaged", f"{RESULT} holds nothing")
        return None
    form = _whole(_inside(result, ("format",)))
    if form is None:
        raise _Unreadable("foreign", f"{RESULT} is no record of this tool")
    if form > RECORD_FORMAT:
        newer = f"{RESULT} has format {form}, newer than {RECORD_FORMAT}: update to read it"
        raise _Unreadable("newer", newer)
    if result.get("status") not in list(Status) or not isinstance(result.get("phases"), list):
        raise _Unreadable("damaged", f"{RESULT} does not say how the run ended")
    return result


def _recorded(table: str, source: Any) -> dict[str, Any]:
    """The columns of `table` that stand in a record as they are. Raises _Unreadable."""
    row = {}
    for name, column in RECORDED[table].items():
        row[name] = CLEAN[column.kind](_inside(source, column.place))
        if column.required and row[name] is None:
            place = ".".join(column.place)
            raise _Unreadable("damaged", f"{RESULT} lacks {place} where it tells of {table}")
    return row


def _result_row(result: dict[str, Any], phases: Rows) -> dict[str, Any]:
    """What a record says of the run as a whole."""
    completed = result["status"] == COMPLETED
    windows = _whole(_inside(result, ("corpus", "validation_windows")))
    seq_len = _whole(_inside(result, ("corpus", "seq_len")))
    row = _recorded("runs", result) | {
        "status": result["status"],
        "validation_tokens": windows and seq_len and _whole(windows * seq_len),
        "phases": len(phases),
        "seconds_saved": _total(phases, "seconds_saved"),
        "peak_memory_mb": max((phase["peak_memory_mb"] or 0 for phase in phases), default=0)
        or None,
    }
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
    return row


def _phase_rows(phases: list[Any]) -> tuple[Rows, Rows]:
    """The rows of a record's phases and of their exits. Raises _Unreadable."""
    rows: Rows = []
    exit_rows: Rows = []
    for number, phase in enumerate(phases, start=1):
        rows.append({"phase": number, **_recorded("phases", phase)})
        exits = phase.get("exits")
        for exit in exits if isinstance(exits, list) else ():
            exit_rows.append({"phase": number, **_recorded("exits", exit)})
    return rows, exit_rows


def _total(rows: Rows, *names: str) -> Any:
    """The sum of these columns; None if a figure is missing."""
    values = [row[name] for row in rows for name in names]
    return None if None in values else sum(values)


def _add_up_unfinished(runs: Rows, epochs: pa.Table) -> None:
    """Give the runs that did not complete what their epochs add up to so far."""
    summed = ("reused", "train_seconds", "evaluation_seconds", "train_tokens")
    sums = epochs.group_by("code").aggregate(
        [("epoch", "count"), *((name, "sum") for name in summed)]
    )
    by_code = {row["code"]: row for row in sums.to_pylist()}
    for run in runs:
        row = by_code.get(run["code"])
        if row is not None and run["status"] != COMPLETED:
            run["epochs"] = row["epoch_count"]
            run["epochs_reused"] = row["reused_sum"]
            run["tokens"] = row["train_tokens_sum"]
            run["seconds"] = (row["train_seconds_sum"] or 0) + (row["evaluation_seconds_sum"] or 0)


def _read_epochs(found: Sequence[_Found]) -> tuple[pa.Table, Rows]:
    """The epochs in the `metrics.csv` of each; those of one header are parsed at a stroke."""
    tables = [SCHEMAS["epochs"].empty_table()]
    left_out: Rows = []
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
        except ValueError:  # Arrow's own is one of these
            for item, body in bodies:
                try:
                    tables.append(_parsed_epochs(header, [(item, body)]))
                except ValueError as error:
                    left_out.append(_metrics_problem(item, _brief(error)))
    return pa.concat_tables(tables), left_out


def _metrics_problem(item: _Found, why: str) -> dict[str, Any]:
    reason = f"{METRICS} cannot be read ({why}): its epochs are left out"
    return _left_out(item.name, "damaged", reason)


def _parsed_epochs(header: bytes, bodies: Sequence[tuple[_Found, bytes]]) -> pa.Table:
    """Rows of CSV under one header, as the table of epochs. Raises ValueError."""
    schema = SCHEMAS["epochs"]
    names = header.decode().split(",")
    needed = {name for name, column in COLUMNS["epochs"].items() if column.required}
    if missing := sorted(needed - set(names)):
        raise ValueError(f"it has no column {missing[0]}")
    counts = [body.count(b"\n") for _, body in bodies]
    if not sum(counts):
        return schema.empty_table()
    known = [name for name in schema.names if name in names]
    table = pyarrow.csv.read_csv(
        io.BytesIO(b"".join(body for _, body in bodies)),
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
    code = pa.array(np.repeat([item.code for item, _ in bodies], counts), pa.int64())
    columns = {"code": code, **{name: table[name] for name in known}}
    columns |= {
        name: pa.nulls(len(code), schema.field(name).type)
        for name in schema.names
        if name not in columns
    }
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _told_by_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """The overrides as a shell takes them, and the group choices and the seed that they name."""
    row: dict[str, Any] = {"overrides": _text(shlex.join(overrides))}
    for key, value in keys_and_values(overrides):
        if key in GROUPS:
            row[key] = _text(value)
        elif key == "seed" and re.fullmatch(r"\d{1,18}", value):
            row["seed"] = int(value)
    return row


def keys_and_values(overrides: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Overrides as key and value, without those of Hydra itself."""
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key and not key.startswith("hydra"):
            yield key, value


def _read_yaml(folder: str, name: str) -> Any:
    """A file that Hydra wrote about a job; None where it is not there or cannot be read."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        with open(os.path.join(folder, HYDRA, name), encoding="utf-8") as file:
            return yaml.load(file, loader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None


def _is_ours(settings: Any) -> bool:
    return isinstance(settings, dict) and {"initial_layers", "added_layers"} <= settings.keys()


def _settings_row(settings: dict[str, Any]) -> dict[str, Any]:
    """The configuration as columns; settings that this version does not have become text."""
    return {
        f"config.{_text(name)}": CLEAN[SETTINGS.get(name, "text")](value)
        for name, value in _flat(settings)
    }


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict) and f"{prefix}{name}" not in SETTINGS:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _experiment_key(settings: dict[str, Any], fingerprint: Any) -> str:
    """The same for two runs that are the same experiment, on the same text, with the same seed."""
    aside = NOT_THE_EXPERIMENT + (PLACE_OF_TEXT if fingerprint else ())
    flat = {name: value for name, value in _flat(settings) if name not in aside}
    # 1 and 1.0 are the same rate, whether JSON or YAML held it.
    same = {n: _number(v) if SETTINGS.get(n) == "number" else v for n, v in flat.items()}
    text = json.dumps([same, fingerprint], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _inside(value: Any, place: Iterable[str]) -> Any:
    """What lies in nested objects under these names; None where the way ends."""
    for name in place:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _number(value: Any) -> float | None:
    if isinstance(value, float):
        return value
    if not isinstance(value, int) or isinstance(value, bool):
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
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _moment(value: Any) -> datetime | None:
    """A time as the record writes it."""
    try:
        return datetime.fromisoformat(value).astimezone(UTC)
    except (TypeError, ValueError, OverflowError):
        return None


def _when(time_ns: int) -> datetime:
    return datetime.fromtimestamp(time_ns / 1e9, UTC)


CLEAN: dict[str, Callable[[Any], Any]] = {
    "text": _text,
    "whole": _whole,
    "number": _number,
    "flag": _flag,
    "time": _moment,
}


def _brief(error: Exception) -> str:
    return one_line(str(error))[:120]


# ---------------------------------------------------------------------------------------------
# The cache


def _cache_version() -> str:
    """Changes with everything that a cached table depends on besides the runs' files."""
    shape = [CACHE_FORMAT, RECORD_FORMAT, NOT_THE_EXPERIMENT, PLACE_OF_TEXT]
    shape += [{n: list(c) for n, c in columns.items()} for columns in COLUMNS.values()]
    return hashlib.sha256(json.dumps(shape).encode()).hexdigest()


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
    looks = zip(*(columns[name] for name in SEEN), strict=True)
    cached = {
        name: (code, look) for code, (name, look) in enumerate(zip(names, looks, strict=True))
    }
    new_codes = np.full(len(names), -1)
    kept: list[_Found] = []
    for item in found:
        code, look = cached.get(item.name, (-1, None))
        if item.begun and item.seen == look:
            new_codes[code] = len(kept)
            kept.append(item)
    return kept, _recoded(tables, new_codes)


def _write_cache(root: str, found: list[_Found], piece: _Piece) -> None:
    """Keep what was read of these runs, whole or not at all; a folder that refuses has no cache."""
    new_codes = np.full(1 + max(piece["runs"]["code"].to_pylist(), default=-1), -1)
    new_codes[[item.code for item in found]] = np.arange(len(found))
    looks = {name: [item.seen[i] for item in found] for i, name in enumerate(SEEN)}
    tables = {
        "seen": pa.table({"name": [_text(item.name) for item in found], **looks}),
        **_recoded(piece, new_codes),
    }
    temporary = os.path.join(root, f"{CACHE}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with zipfile.ZipFile(temporary, "x", zipfile.ZIP_STORED) as archive:
            archive.comment = _cache_version().encode()
            for name, table in tables.items():
                content = io.BytesIO()
                pyarrow.parquet.write_table(table, content, compression="zstd")
                archive.writestr(name, content.getvalue())
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


def _results(piece: _Piece, found: list[_Found], left_out: Rows) -> Results:
    """The frames. Rows follow the order of `found`."""
    places = np.zeros(1 + max((item.code for item in found), default=-1), dtype=np.int64)
    places[[item.code for item in found]] = np.arange(len(found))
    names = pa.array([_text(item.name) for item in found], pa.string())

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


def _add_signs_of_life(runs: pd.DataFrame, found: Sequence[_Found]) -> None:
    """Tell of the runs without a record whether they live: that changes while no file does."""
    told = {name: plain_values(runs[name]) for name in ("status", "reason", "host")}
    for place, item in enumerate(found):
        status = told["status"][place]
        if status == WAITING and (since := _lost_since(item)):
            told["status"][place] = NOT_STARTED
            told["reason"][place] = f"its sweep shows no sign of life since {since}"
        elif status == RUNNING:
            sign = read_sign(Path(item.path))
            host = told["host"][place] = _text(sign.get("host"))
            if sign.get("sign") == PENDING:
                told["status"][place] = PENDING
            elif sign.get("sign") == Sign.lost:
                told["status"][place] = LOST
                given = _text(sign.get("reason"))
                told["reason"][place] = given or "it was ended from outside and left no record"
            elif since := _lost_since(item):
                told["status"][place] = LOST
                where = f" (it ran on {host})" if host else ""
                told["reason"][place] = f"no sign of life since {since}{where}"
    for name, values in told.items():
        runs[name] = _texts(values)


def _lost_since(item: _Found) -> str | None:
    """When a run without a record, or its sweep, last showed life, if that is too long ago."""
    sign = item.last_sign  # None: its record was taken away just now, for it begins anew
    if sign is None or (datetime.now(UTC) - sign).total_seconds() <= LOST_AFTER_S:
        return None
    return f"{sign:%Y-%m-%d %H:%M} UTC"


def _frame(table: pa.Table) -> pd.DataFrame:
    kinds = {
        pa.string(): pd.StringDtype("pyarrow"),
        pa.int64(): pd.Int64Dtype(),
        pa.bool_(): pd.BooleanDtype(),
    }
    return table.to_pandas(types_mapper=kinds.get)


def _texts(values: Iterable[str | None]) -> Any:
    return pd.array([_text(value) for value in values], dtype=pd.StringDtype("pyarrow"))


NUMBER = re.compile(r"([0-9]{1,18})")


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts 2_x before 10_x."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in NUMBER.split(name)]


def _duplicates(runs: pd.DataFrame) -> list[str | None]:
    """For each run the one that counts in its place; None where it counts itself.

    Of several runs of one experiment and seed the newest completed one counts; if none completed,
    one that is running, then the newest.
    """
    unfinished = (Status.interrupted.value, Status.preempted.value, LOST)
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


if __name__ == "__main__":
    from proglayer.summary import main

    sys.exit(main())
