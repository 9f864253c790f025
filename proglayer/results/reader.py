"""Reading runs: from records, metrics and what Hydra wrote to the rows of the frames."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from proglayer.config import flat_settings
from proglayer.files import RUN_FILE
from proglayer.results.columns import (
    GROUPS,
    NOT_THE_EXPERIMENT,
    PLACE_OF_TEXT,
    SETTINGS,
    recorded,
    to_frame,
)
from proglayer.results.scan import Rows, RunFolder, as_text, brief, row_left_out
from proglayer.run.record import ENDS, RecordError, RunRecord, RunState, read_record, state_of

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
    """Return the frames of these runs, and `left_out` of those that could not be read."""
    rows: dict[str, Rows] = {name: [] for name in ("runs", "phases", "exits", "epochs", "left_out")}
    for folder in folders:
        try:
            _read_run(folder, rows)
        except RecordError as error:
            rows["left_out"].append(row_left_out(folder.name, "damaged", brief(error)))
    frames = {name: to_frame(name, each) for name, each in rows.items()}
    return frames | {"runs": _mark_duplicates(frames["runs"])}


def _read_run(folder: RunFolder, rows: dict[str, Rows]) -> None:
    """Add one run's rows: its own, its phases', exits' and epochs'. Raises RecordError."""
    path = Path(folder.path)
    # Of a job that waits for another command, only its sweep knows.
    record = read_record(path) if (path / RUN_FILE).exists() else RunRecord(state=RunState.waiting)
    state = state_of(path, record)
    begun = record.started is not None
    run: dict[str, Any] = {
        "run": as_text(folder.name),
        "sweep": as_text(folder.sweep),
        "folder": as_text(folder.path),
        "started": record.started,
        "ended": record.ended,
        "last_sign": record.ended or state.last_sign,
        "status": state.state.value,
        "reason": as_text(state.reason),
        "host": as_text(record.host),
    }
    run |= _given_by_overrides(record.overrides or folder.overrides or ())
    run |= {
        GROUPS.get(group, f"choice.{as_text(group)}"): as_text(choice)
        for group, choice in record.choices.items()
        if not group.startswith(("hydra", "local", "logger"))
    }
    if settings := record.config:
        flat = flat_settings(settings, whole=SETTINGS)
        run |= {f"config.{name}": _cell(SETTINGS.get(name, str), value) for name, value in flat}
        run["seed"] = settings.get("seed")
    if settings and begun:
        fingerprint = record.corpus.fingerprint if record.corpus else None
        run["experiment_key"] = experiment_key(settings, fingerprint)
    phases: Rows = []
    corpus = record.corpus
    for number, phase in enumerate(record.phases if corpus else [], start=1):
        assert corpus is not None
        place = {"run": run["run"], "phase": number}
        figures = corpus.figures(phase.validation)
        if phase.test is not None:
            figures |= corpus.figures(phase.test, "test")
        phases.append(place | recorded("phases", phase) | figures)
        rows["exits"] += [
            place | {"layer": layer} | corpus.figures(score) for layer, score in phase.exits.items()
        ]
    epochs = [{"run": run["run"], **row.columns(corpus)} for row in record.epochs if corpus]
    rows["phases"] += phases
    rows["epochs"] += epochs
    rows["runs"].append(recorded("runs", record) | run | _of_phases(record, phases, epochs))


def _cell(kind: type, value: Any) -> Any:
    """Return a setting as its column holds it."""
    if kind is float and value is not None:
        return float(value)
    return as_text(value) if kind is str else value


def _of_phases(record: RunRecord, phases: Rows, epochs: Rows) -> dict[str, Any]:
    """Return what a run's phases add up to; of one that did not complete, its epochs."""
    completed = record.state is RunState.completed
    memory = max((phase["peak_memory_mb"] or 0 for phase in phases), default=0)
    run: dict[str, Any] = {}
    if record.state in ENDS and record.started is not None:
        run |= {"phases": len(phases), "seconds_saved": _total(phases, "seconds_saved")}
        run["peak_memory_mb"] = memory or None
    if record.corpus:
        run["validation_tokens"] = record.corpus.validation_windows * record.corpus.seq_len
    ends = [("first", phases[0])] if phases else []
    ends += [("last", phases[-1])] if phases and completed else []
    for which, phase in ends:
        run[f"{which}_layers"] = phase["layers"]
        for name in ("loss", "perplexity", "accuracy_percent", "bits_per_byte"):
            run[f"{which}_{name}"] = phase[f"validation_{name}"]
    if completed:
        return run | {name: _total(phases, *columns) for name, columns in SUMS.items()}
    if epochs:
        run["epochs"] = sum(row["epoch"] > 0 for row in epochs)
        run["epochs_reused"] = sum(row["reused"] for row in epochs)
        run["tokens"] = _total(epochs, "train_tokens")
        run["seconds"] = _total(epochs, "train_seconds", "evaluation_seconds")
    return run


def _total(rows: Rows, *names: str) -> Any:
    """Return the sum of these columns; None if a value is missing."""
    values = [row[name] for row in rows for name in names]
    return None if None in values else sum(values)


def _mark_duplicates(runs: pd.DataFrame) -> pd.DataFrame:
    """`runs` with `duplicate_of` of each whose experiment and seed another one stands for.

    The newest completed one does; if none completed, one that is running, then the newest.
    """
    ranked = runs.assign(rank=[RANK.get(status, 0) for status in runs["status"]])
    ordered = ranked.sort_values(["rank", "last_sign"], kind="stable", na_position="first")
    chosen = ordered.groupby("experiment_key")["run"].transform("last")
    return runs.assign(duplicate_of=chosen.where(chosen != ordered["run"]))


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


def experiment_key(settings: dict[str, Any], fingerprint: Any) -> str:
    """The same for two runs that are the same experiment, on the same text, with the same seed."""
    aside = NOT_THE_EXPERIMENT + (PLACE_OF_TEXT if fingerprint else ())
    # 1 and 1.0 are the same rate, whether JSON or YAML held it.
    same = {
        name: _cell(float, value) if SETTINGS.get(name) is float else value
        for name, value in flat_settings(settings, whole=SETTINGS)
        if name not in aside
    }
    text = json.dumps([same, fingerprint], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
