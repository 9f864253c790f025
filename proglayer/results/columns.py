"""The columns of the frames: a field of a record, a setting, or a sum over phases or epochs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from datetime import datetime
from types import NoneType, UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import pandas as pd
from pydantic import BaseModel

from proglayer.config import setting_types
from proglayer.run.record import METRICS_COLUMNS, Changes, EpochRow, PhaseRecord, RunRecord, Score
from proglayer.training.plan import Rates

# Two runs that differ in these alone are the same experiment with the same seed: they say where
# and how a run works, not what it trains. Device, threads, compiler change the rounding, no more.
NOT_THE_EXPERIMENT = (
    *("plan", "on_error", "objective", "report", "checkpoint_every_s", "store.dir"),
    *("logger.tensorboard", "logger.mlflow", "threads", "device", "compile", "cache_frozen"),
    *("jobs_per_gpu", "data.cache_dir"),
)
# Where the text lies; the corpus's fingerprint, where it is known, says what it is.
PLACE_OF_TEXT = ("data.path", "data.files")
# Each group of the configuration -> the column of `runs` that holds which option was chosen.
GROUPS = {
    **{group: group for group in ("model", "experiment", "data")},
    **{group: f"choice.{group}" for group in ("phase", "growth", "freeze", "lr")},
}


class Column(NamedTuple):
    """What a column holds, and the path of the field of a record that it is (empty: computed)."""

    kind: type
    path: str = ""


def _leaves(kind: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """The path of each field of a dataclass or model, those of others in it included, and its type.

    That is bool, int, float, list, or text for any other. A score is its figures.
    """
    hints = get_type_hints(kind)
    for name in getattr(kind, "model_fields", hints):
        held = _held(hints[name])
        if held is Score:
            for figure in ("loss", "perplexity", "accuracy_percent", "bits_per_byte"):
                yield f"{prefix}{name}_{figure}", float
        elif is_dataclass(held) or (isinstance(held, type) and issubclass(held, BaseModel)):
            yield from _leaves(held, f"{prefix}{name}.")
        else:
            yield prefix + name, held if held in (bool, int, float, list) else str


def _held(hint: Any) -> Any:
    """The type of what a field holds where it holds something; text for one of several."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    hint, *others = (option for option in options if option is not NoneType)
    return str if others else get_origin(hint) or hint


def _fields(record: type, but: str, renamed: Mapping[str, str] | None = None) -> dict[str, Column]:
    """A column for each field of a record, named after the last part of its path."""
    return {
        (renamed or {}).get(path, path.rpartition(".")[2]): Column(kind, path)
        for path, kind in _leaves(record)
        if path not in but.split()
    }


def _computed(kind: type, names: str) -> dict[str, Column]:
    return dict.fromkeys(names.split(), Column(kind))


# The columns of `runs` in their order: who and how, then what came of it, then the others; between
# them the settings that vary, and at the end those that don't.
WHICH_RUN = ("run", "variant", "model", "seed")
IDENTITY_COLUMNS = (
    *(*WHICH_RUN, "sweep", "status", "reason", "duplicate_of"),
    *(column for group, column in GROUPS.items() if group != "model"),
)
METRIC_COLUMNS = (
    *("accuracy_points", "perplexity_percent", "loss_nats"),
    *("first_layers", "first_loss", "first_perplexity", "first_accuracy_percent"),
    *("last_layers", "last_loss", "last_perplexity", "last_accuracy_percent"),
    *("phases", "epochs", "epochs_reused", "seconds", "seconds_saved", "wall_seconds", "tokens"),
    *("flops", "flops_without_head", "peak_memory_mb"),
    *("first_bits_per_byte", "last_bits_per_byte"),
)
_RUN_COLUMNS = {
    **_computed(str, "overrides"),
    **_computed(datetime, "started ended last_sign"),
    **_fields(
        RunRecord,
        "format state reason submitted started overrides choices config gpu.index phases epochs "
        "environment.process ended mlflow_run weights_sha256 traceback seconds objective",
        {
            "corpus.name": "corpus",
            "corpus.fingerprint": "corpus_fingerprint",
            "environment.scheduler.name": "scheduler",
            "environment.scheduler.job": "scheduler_job",
            "gpu.name": "gpu",
            "gpu.seconds_waited": "seconds_waited_for_gpu",
            "git.commit": "git_commit",
            "git.changed": "git_changed",
            "git.difference": "git_difference",
        },
    ),
    **{name: Column(float, f"changes.{name}") for name in Changes._fields},
    **{name: Column(str, name) for name in ("weights_sha256", "traceback")},
    "wall_seconds": Column(float, "seconds"),
    "objective": Column(float, "objective"),
    **_computed(int, "first_layers last_layers phases epochs epochs_reused tokens"),
    **_computed(float, "first_loss first_perplexity first_accuracy_percent first_bits_per_byte"),
    **_computed(float, "last_loss last_perplexity last_accuracy_percent last_bits_per_byte"),
    **_computed(float, "seconds seconds_saved flops flops_without_head peak_memory_mb"),
    **_computed(int, "seed validation_tokens"),
    **dict.fromkeys(GROUPS.values(), Column(str)),
    **_computed(str, "run variant sweep status reason duplicate_of folder"),
}
PLACE_COLUMNS = [name for name in _RUN_COLUMNS if name not in IDENTITY_COLUMNS + METRIC_COLUMNS]
_EPOCH = _fields(EpochRow, "")
# Every setting that holds a value -> what its column holds; lists and enums are text.
SETTINGS = {
    name: held if (held := _held(kind)) in (bool, int, float) else str
    for name, kind in setting_types()
}
COLUMNS: dict[str, dict[str, Column]] = {
    "runs": {
        **_RUN_COLUMNS,
        **_computed(str, "experiment_key"),
        **{f"config.{name}": Column(kind) for name, kind in SETTINGS.items()},
    },
    "phases": {
        **_computed(str, "run"),
        **_computed(int, "phase"),
        **_fields(
            PhaseRecord,
            "exits",
            {
                "trajectory": "stage",
                "work.peak_memory_mb.process": "peak_memory_mb",
                "work.peak_memory_mb.device": "peak_device_memory_mb",
                **{f"rates.{role}": f"rate_{role}" for role in get_type_hints(Rates)},
            },
        ),
    },
    "epochs": {**_computed(str, "run"), **{name: _EPOCH[name] for name in METRICS_COLUMNS}},
    "exits": {
        **_computed(str, "run"),
        **_computed(int, "phase layer"),
        **{name: column for name, column in _EPOCH.items() if name.startswith("validation")},
    },
    "left_out": _computed(str, "folder kind reason"),
}
_PATHS = {
    table: [(name, column.path.split(".")) for name, column in columns.items() if column.path]
    for table, columns in COLUMNS.items()
}
DTYPES: dict[type, Any] = {
    str: pd.StringDtype("pyarrow"),
    int: pd.Int64Dtype(),
    float: "float64",
    bool: pd.BooleanDtype(),
    datetime: "datetime64[us, UTC]",
    list: object,
}


def recorded(table: str, record: Any) -> dict[str, Any]:
    """The columns of `table` that are fields of this record; None where it lacks what holds one."""
    row = {}
    for name, path in _PATHS[table]:
        value = record
        for part in path:
            value = getattr(value, part, None)
        row[name] = value
    return row


def to_frame(table: str, rows: list[dict[str, Any]]) -> pd.DataFrame:
    """A frame of these rows. Columns that `table` does not have hold text and come last."""
    kinds = {name: column.kind for name, column in COLUMNS[table].items()}
    kinds |= {name: str for row in rows for name in row if name not in kinds}
    columns = {
        name: pd.Series([row.get(name) for row in rows], dtype=DTYPES[kind])
        for name, kind in kinds.items()
    }
    return without_gaps(pd.DataFrame(columns))


def without_gaps(frame: pd.DataFrame) -> pd.DataFrame:
    """`frame` with NumPy's own types for integers and truth values of which none is missing."""
    plain = {"Int64": "int64", "boolean": "bool"}
    whole = [name for name in frame if str(frame.dtypes[name]) in plain and not frame[name].hasnans]
    # A copy joins the columns of one type: further columns can then be set without a warning.
    return frame.astype({name: plain[str(frame.dtypes[name])] for name in whole}).copy()


def plain_values(values: Any) -> list[Any]:
    """A column as Python values, None for what is missing."""
    return [None if gone else value for value, gone in zip(values, values.isna(), strict=True)]
