"""Reading runs: from records, metrics and what Hydra wrote to rows of the study's tables."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from proglayer.results.columns import (
    CLEAN,
    COLUMNS,
    COMPLETED,
    GROUPS,
    NOT_THE_EXPERIMENT,
    PLACE_OF_TEXT,
    RECORDED,
    RUNNING,
    SCHEMAS,
    SETTINGS,
    WAITING,
    Piece,
    Rows,
    as_moment,
    as_number,
    as_text,
    as_whole,
    inside,
)
from proglayer.results.scan import HYDRA, Found, brief, row_left_out, when
from proglayer.store.record import METRICS, RESULT, RecordError, read_record, to_dict


class _Unreadable(ValueError):
    """A run that cannot be laid out in tables, and what kind of thing it is."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def read_runs(found: Sequence[Found]) -> tuple[Piece, Rows]:
    """Read runs from their files; also what had to be left out, and why."""
    runs: Rows = []
    phases: Rows = []
    exits: Rows = []
    left_out: Rows = []
    with_metrics: list[Found] = []
    for item in found:
        try:
            run, its_phases, its_exits = _read_run(item)
        except _Unreadable as error:
            left_out.append(row_left_out(item.name, error.kind, str(error)))
            continue
        for row in (run, *its_phases, *its_exits):
            row["code"] = item.code
        runs.append(run)
        phases += its_phases
        exits += its_exits
        if item.seen.metrics.changed_ns:
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


def _read_run(item: Found) -> tuple[dict[str, Any], Rows, Rows]:
    """One run's rows: its own, its phases', its exits'. Raises _Unreadable."""
    if not item.begun:
        return {"status": WAITING, **_told_by_overrides(item.overrides or ())}, [], []
    result = _read_record(item.path)
    of_record = result or {}
    settings = of_record.get("config")
    overrides = of_record.get("overrides")
    choices = of_record.get("choices")
    started = as_moment(of_record.get("started"))
    if not isinstance(settings, dict):
        # Still running, or ended before it began: what Hydra wrote down tells the rest.
        settings = _read_yaml(item.path, "config.yaml")
        if result is None and item.overrides is None and not _is_ours(settings):
            raise _Unreadable("foreign", f"holds no {RESULT}, and is no job of this tool")
        overrides = _read_yaml(item.path, "overrides.yaml") or item.overrides
        hydra = _read_yaml(item.path, "hydra.yaml")
        choices = inside(hydra, ("hydra", "runtime", "choices"))
        started = when(item.seen.settings.changed_ns) if item.seen.settings.changed_ns else None
    row: dict[str, Any] = {"status": RUNNING, "started": started}
    if isinstance(overrides, (list, tuple)):
        row |= _told_by_overrides([str(override) for override in overrides])
    if isinstance(choices, dict):
        row |= {
            group if group in GROUPS else f"choice.{as_text(group)}": as_text(choice)
            for group, choice in choices.items()
            if choice is not None and not str(group).startswith(("hydra", "local", "logger"))
        }
    if isinstance(settings, dict):
        fingerprint = inside(result, ("corpus", "fingerprint"))
        row |= _settings_row(settings)
        row["seed"] = as_whole(settings.get("seed"))
        row["experiment_key"] = _experiment_key(settings, fingerprint)
    if result is None:
        return row, [], []
    phases, exits = _phase_rows(result["phases"])
    return row | _result_row(result, phases), phases, exits


def _read_record(folder: str) -> dict[str, Any] | None:
    """The record of a run if it ended. Raises _Unreadable for one that this version cannot read."""
    try:
        record = read_record(Path(folder))
    except RecordError as error:
        raise _Unreadable(error.kind, str(error)) from error
    except OSError as error:
        raise _Unreadable("damaged", f"{RESULT} cannot be read ({error.strerror})") from error
    return record and to_dict(record)


def _recorded(table: str, source: Any) -> dict[str, Any]:
    """The columns of `table` that stand in a record as they are. Raises _Unreadable."""
    row = {}
    for name, column in RECORDED[table].items():
        row[name] = CLEAN[column.kind](inside(source, column.place))
        if column.required and row[name] is None:
            place = ".".join(column.place)
            raise _Unreadable("damaged", f"{RESULT} lacks {place} where it tells of {table}")
    return row


def _result_row(result: dict[str, Any], phases: Rows) -> dict[str, Any]:
    """What a record says of the run as a whole."""
    completed = result["status"] == COMPLETED
    windows = as_whole(inside(result, ("corpus", "validation_windows")))
    seq_len = as_whole(inside(result, ("corpus", "seq_len")))
    row = _recorded("runs", result) | {
        "status": result["status"],
        "validation_tokens": windows and seq_len and as_whole(windows * seq_len),
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


def _read_epochs(found: Sequence[Found]) -> tuple[pa.Table, Rows]:
    """The epochs in the `metrics.csv` of each; those of one header are parsed at a stroke."""
    tables = [SCHEMAS["epochs"].empty_table()]
    left_out: Rows = []
    by_header: dict[bytes, list[tuple[Found, bytes]]] = {}
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
                    left_out.append(_metrics_problem(item, brief(error)))
    return pa.concat_tables(tables), left_out


def _metrics_problem(item: Found, why: str) -> dict[str, Any]:
    reason = f"{METRICS} cannot be read ({why}): its epochs are left out"
    return row_left_out(item.name, "damaged", reason)


def _parsed_epochs(header: bytes, bodies: Sequence[tuple[Found, bytes]]) -> pa.Table:
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
    row: dict[str, Any] = {"overrides": as_text(shlex.join(overrides))}
    for key, value in keys_and_values(overrides):
        if key in GROUPS:
            row[key] = as_text(value)
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
        f"config.{as_text(name)}": CLEAN[SETTINGS.get(name, "text")](value)
        for name, value in flat_settings(settings)
    }


def flat_settings(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict) and f"{prefix}{name}" not in SETTINGS:
            yield from flat_settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _experiment_key(settings: dict[str, Any], fingerprint: Any) -> str:
    """The same for two runs that are the same experiment, on the same text, with the same seed."""
    aside = NOT_THE_EXPERIMENT + (PLACE_OF_TEXT if fingerprint else ())
    flat = {name: value for name, value in flat_settings(settings) if name not in aside}
    # 1 and 1.0 are the same rate, whether JSON or YAML held it.
    same = {n: as_number(v) if SETTINGS.get(n) == "number" else v for n, v in flat.items()}
    text = json.dumps([same, fingerprint], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
