"""Reading runs: from records, metrics and what Hydra wrote to the rows of the frames."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.csv

from proglayer.config import flat_settings
from proglayer.results.columns import (
    COLUMNS,
    DTYPES,
    GROUPS,
    NOT_THE_EXPERIMENT,
    PLACE_OF_TEXT,
    SETTINGS,
    as_moment,
    plain_values,
    recorded,
    to_frame,
    without_gaps,
)
from proglayer.results.scan import HYDRA, Rows, RunFolder, brief, row_left_out
from proglayer.store.reading import read_regular, read_yaml
from proglayer.store.record import (
    METRICS,
    RESULT,
    RecordError,
    RunRecord,
    RunState,
    as_text,
    job_state,
    read_record,
    typed,
)

# Columns of completed runs -> those of their phases that they sum up.
SUMS = {
    "epochs": ["epochs"],
    "epochs_reused": ["epochs_reused"],
    "seconds": ["train_seconds", "evaluation_seconds"],
    "tokens": ["train_tokens"],
    "flops": ["train_flops_head", "train_flops_body"],
    "flops_without_head": ["train_flops_body"],
}
# Which of the runs of one experiment and seed stands for the others: a failed one comes last.
UNFINISHED = (RunState.interrupted, RunState.preempted, RunState.pruned, RunState.lost)
RANK = {RunState.completed: 3, RunState.running: 2, **dict.fromkeys(UNFINISHED, 1)}


def read_runs(folders: Sequence[RunFolder]) -> dict[str, pd.DataFrame]:
    """The frames of these runs, and `left_out` of those that could not be read."""
    runs: Rows = []
    phases: Rows = []
    exits: Rows = []
    left_out: Rows = []
    read: list[RunFolder] = []
    for folder in folders:
        try:
            run, its_phases, its_exits = _read_run(folder)
        except (RecordError, RecursionError) as error:
            kind = error.kind if isinstance(error, RecordError) else "damaged"
            left_out.append(row_left_out(folder.name, kind, brief(error)))
            continue
        runs.append(run)
        phases += its_phases
        exits += its_exits
        read.append(folder)
    epochs, problems = _read_epochs(read)
    _add_up_unfinished(runs, epochs)
    rows = {"runs": runs, "phases": phases, "exits": exits, "left_out": left_out + problems}
    frames = {name: to_frame(name, own) for name, own in rows.items()}
    return frames | {"epochs": epochs, "runs": _mark_duplicates(frames["runs"])}


def _read_run(folder: RunFolder) -> tuple[dict[str, Any], Rows, Rows]:
    """One run's rows: its own, its phases', its exits'. Raises RecordError."""
    path = Path(folder.path)
    record = _read_record(path)
    state = job_state(path, record, folder.last_sign, folder.sweep_sign)
    begun = state.state not in (RunState.waiting, RunState.not_started)
    run: dict[str, Any] = {
        "run": as_text(folder.name),
        "sweep": as_text(folder.sweep),
        "folder": as_text(folder.path),
        "last_sign": folder.last_sign if begun else folder.sweep_sign,
    }
    settings = record.config if record else None
    fingerprint = record.corpus.fingerprint if record and record.corpus else None
    if record and settings is not None:
        choices, overrides = record.choices, record.overrides
        run["started"] = as_moment(record.started)
    else:
        # Still running, or ended before it began: what Hydra wrote says the rest.
        names = ("config", "overrides", "hydra")
        settings, overrides, choices = (_read_yaml(path, name) for name in names)
        if begun and record is None and folder.overrides is None and not _is_ours(settings):
            reason = f"holds no {RESULT}, and no {HYDRA}/config.yaml of this tool that can be read"
            raise RecordError("foreign", reason)
        overrides = overrides or folder.overrides
        for name in ("hydra", "runtime", "choices"):
            choices = choices.get(name) if isinstance(choices, dict) else None
        run["started"] = folder.configured
    if isinstance(overrides, (list, tuple)):
        run |= _given_by_overrides([str(override) for override in overrides])
    if isinstance(choices, dict) and len(choices) <= MOST_SETTINGS:
        run |= {
            GROUPS.get(group, f"choice.{as_text(group)}"): as_text(choice)
            for group, choice in choices.items()
            if choice is not None and not str(group).startswith(("hydra", "local", "logger"))
        }
    if isinstance(settings, dict):
        flat = list(flat_settings(settings, whole=SETTINGS))
        if len(flat) > MOST_SETTINGS:
            raise RecordError("damaged", f"it has more than {MOST_SETTINGS:,} settings")
        run |= {f"config.{as_text(n)}": typed(SETTINGS.get(n, str), value) for n, value in flat}
        run["seed"] = typed(int, settings.get("seed"))
        run["experiment_key"] = experiment_key(settings, fingerprint)
    phases: Rows = []
    exits: Rows = []
    if record:
        for number, phase in enumerate(record.phases, start=1):
            place = {"run": run["run"], "phase": number}
            phases.append(place | recorded("phases", phase))
            exits += [place | recorded("exits", each) for each in phase.exits]
        run |= _of_record(record, phases)
    reason, host = as_text(state.reason), as_text(state.host)
    run |= {"status": state.state.value, "reason": reason, "host": host}
    return run, phases, exits


def _read_record(folder: Path) -> RunRecord | None:
    try:
        return read_record(folder)
    except OSError as error:
        raise RecordError("damaged", f"{RESULT} cannot be read ({error.strerror})") from error


def _of_record(record: RunRecord, phases: Rows) -> dict[str, Any]:
    """What a record says of the run as a whole."""
    completed = record.status is RunState.completed
    memory = max((phase["peak_memory_mb"] or 0 for phase in phases), default=0)
    ended = as_moment(record.ended)
    run = recorded("runs", record) | {
        "ended": ended,
        "last_sign": ended,
        "phases": len(phases),
        "seconds_saved": _total(phases, "seconds_saved"),
        "peak_memory_mb": memory or None,
    }
    if record.corpus and record.corpus.validation_windows and record.corpus.seq_len:
        tokens = typed(int, record.corpus.validation_windows * record.corpus.seq_len)
        run["validation_tokens"] = tokens
    ends = [("first", phases[0])] if phases else []
    ends += [("last", phases[-1])] if phases and completed else []
    for which, phase in ends:
        run[f"{which}_layers"] = phase["layers"]
        for name in ("loss", "perplexity", "accuracy_percent", "bits_per_byte"):
            run[f"{which}_{name}"] = phase[f"validation_{name}"]
    if completed:
        for name, columns in SUMS.items():
            run[name] = _total(phases, *columns)
    return run


def _total(rows: Rows, *names: str) -> Any:
    """The sum of these columns; None if a value is missing, or none can hold the sum."""
    values = [row[name] for row in rows for name in names]
    if None in values:
        return None
    total = sum(values)
    return typed(int, total) if isinstance(total, int) else total


def _add_up_unfinished(runs: Rows, epochs: pd.DataFrame) -> None:
    """Give the runs that did not complete what their epochs add up to so far."""
    unfinished = {run["run"]: run for run in runs if run["status"] != RunState.completed}
    own = epochs[epochs["run"].isin(list(unfinished))]
    for name, each in own.groupby("run", sort=False):
        run = unfinished[str(name)]
        run["epochs"] = sum(epoch > 0 for epoch in each["epoch"])
        run["epochs_reused"] = sum(filter(None, plain_values(each["reused"])))
        run["tokens"] = typed(int, sum(filter(None, plain_values(each["train_tokens"]))))
        run["seconds"] = sum(each[["train_seconds", "evaluation_seconds"]].sum())


def _mark_duplicates(runs: pd.DataFrame) -> pd.DataFrame:
    """`runs` with `duplicate_of` of each whose experiment and seed another one stands for.

    The newest completed one does; if none completed, one that is running, then the newest.
    """
    ranked = runs.assign(rank=[RANK.get(status, 0) for status in runs["status"]])
    ordered = ranked.sort_values(["rank", "last_sign"], kind="stable", na_position="first")
    chosen = ordered.groupby("experiment_key")["run"].transform("last")
    return runs.assign(duplicate_of=chosen.where(chosen != ordered["run"]))


# --- metrics.csv ----------------------------------------------------------------------------------

_ARROW = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
_EPOCHS = pa.schema({name: _ARROW[column.kind] for name, column in COLUMNS["epochs"].items()})
_CSV = {
    "read_options": pyarrow.csv.ReadOptions(use_threads=False),
    "parse_options": pyarrow.csv.ParseOptions(ignore_empty_lines=False),
    "convert_options": pyarrow.csv.ConvertOptions(
        column_types=_EPOCHS, include_columns=_EPOCHS.names[1:], include_missing_columns=True
    ),
}
# The columns that say which epoch a row is: each row has them.
_NEEDED = ("phase", "layers", "epoch")
# 400,000 epochs.
MOST_BYTES_OF_METRICS = 64_000_000
# More settings, or choices of groups, are none of ours.
MOST_SETTINGS = 1_000


def _read_epochs(folders: Sequence[RunFolder]) -> tuple[pd.DataFrame, Rows]:
    """The epochs in the `metrics.csv` of each, and which cannot be read."""
    tables = [_EPOCHS.empty_table()]
    left_out: Rows = []
    for folder in folders:
        try:
            content = read_regular(Path(folder.path, METRICS), MOST_BYTES_OF_METRICS)
            whole = content if content.endswith(b"\n") else content + b"\n"
            names = whole.splitlines()[0].decode().split(",")
            if missing := [name for name in _NEEDED if name not in names]:
                raise ValueError(f"it has no column {missing[0]}")
            rows = pyarrow.csv.read_csv(io.BytesIO(whole), **_CSV)
            if any(rows[name].null_count for name in _NEEDED):
                raise ValueError("a row names no phase, layers or epoch")
            runs = pa.repeat(pa.scalar(as_text(folder.name)), len(rows))
            tables.append(rows.add_column(0, "run", runs))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:  # Arrow's own is one of these
            why = error.strerror if isinstance(error, OSError) else brief(error)
            reason = f"{METRICS} cannot be read ({why}): its epochs are left out"
            left_out.append(row_left_out(folder.name, "damaged", reason))
    types = {pa.string(): DTYPES[str], pa.int64(): DTYPES[int], pa.bool_(): DTYPES[bool]}
    return without_gaps(pa.concat_tables(tables).to_pandas(types_mapper=types.get)), left_out


# --- overrides and settings -----------------------------------------------------------------------


def _given_by_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """The overrides as a shell takes them, and the group choices and the seed that they name."""
    row: dict[str, Any] = {"overrides": as_text(shlex.join(overrides))}
    for key, value in keys_and_values(overrides):
        if key in GROUPS:
            row[GROUPS[key]] = as_text(value)
        elif key == "seed" and re.fullmatch(r"\d{1,18}", value):
            row["seed"] = int(value)
    return row


def keys_and_values(overrides: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Overrides as key and value, without those of Hydra itself."""
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key and not key.startswith("hydra"):
            yield key, value


def _read_yaml(folder: Path, name: str) -> Any:
    """A file that Hydra wrote about a job; None where it is not there or cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        return read_yaml(folder / HYDRA / f"{name}.yaml")
    return None


def _is_ours(settings: Any) -> bool:
    return isinstance(settings, dict) and {"initial_layers", "added_layers"} <= settings.keys()


def experiment_key(settings: dict[str, Any], fingerprint: Any) -> str:
    """The same for two runs that are the same experiment, on the same text, with the same seed."""
    aside = NOT_THE_EXPERIMENT + (PLACE_OF_TEXT if fingerprint else ())
    # 1 and 1.0 are the same rate, whether JSON or YAML held it.
    same = {
        name: typed(float, value) if SETTINGS.get(name) is float else value
        for name, value in flat_settings(settings, whole=SETTINGS)
        if name not in aside
    }
    text = json.dumps([same, fingerprint], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
