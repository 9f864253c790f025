"""The columns of the frames, as `columns.csv` lists them, and frames with these columns.

A column is a field of a record, a setting (`config.<setting>`), or computed.
"""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import fmean
from types import NoneType
from typing import Any, get_args

import pandas as pd

from proglayer.config import setting_types

DTYPES: dict[str, Any] = {
    "text": pd.StringDtype("pyarrow"),
    "int": pd.Int64Dtype(),
    "float": "float64",
    "bool": pd.BooleanDtype(),
    "time": "datetime64[us, UTC]",
}
# Every frame -> its columns and their kinds; of those that are fields of its record, the path.
COLUMNS: dict[str, dict[str, str]] = {}
_FIELDS: dict[str, dict[str, list[str]]] = {}
with open(Path(__file__).with_name("columns.csv"), encoding="utf-8", newline="") as file:
    for frame, column, kind, field in list(csv.reader(file))[1:]:
        COLUMNS.setdefault(frame, {})[column] = kind
        if field:
            _FIELDS.setdefault(frame, {})[column] = field.split(".")


def _kind(hint: Any) -> str:
    """Return what the column of a setting holds; lists, enums and one of several types are text."""
    kinds = [kind for kind in get_args(hint) or [hint] if kind is not NoneType]
    return kinds[0].__name__ if kinds in ([bool], [int], [float]) else "text"


SETTINGS = {name: _kind(hint) for name, hint in setting_types()}
COLUMNS["runs"] |= {f"config.{name}": kind for name, kind in SETTINGS.items()}
WHICH_RUN = ("run", "variant", "model", "seed")


def recorded(frame: str, record: Any) -> dict[str, Any]:
    """Return the columns that are fields of this record; None where it lacks what holds one.

    A list is text, `1, 2`, or in a column of numbers their mean.
    """
    row = {}
    for column, path in _FIELDS[frame].items():
        value = record
        for part in path:
            value = getattr(value, part, None)
        if isinstance(value, list):
            whole = COLUMNS[frame][column] == "text"
            value = ", ".join(map(str, value)) if whole else fmean(value)
        row[column] = value
    return row


def to_frame(frame: str, rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Return a frame of these rows. Columns that it does not have hold text and come last."""
    kinds = dict.fromkeys((name for row in rows for name in row), "text") | COLUMNS[frame]
    order = [*COLUMNS[frame], *(name for name in kinds if name not in COLUMNS[frame])]
    columns = {
        name: pd.Series([row.get(name) for row in rows], dtype=DTYPES[kinds[name]])
        for name in order
    }
    return without_gaps(pd.DataFrame(columns))


def arranged(runs: pd.DataFrame, varied: list[str]) -> pd.DataFrame:
    """Return who and how, what varies, the metrics, where; then what is the same everywhere."""
    columns = [name for name in COLUMNS["runs"] if name != "experiment_key"]
    metrics, settings = columns.index("test_accuracy_change_points"), len(columns) - len(SETTINGS)
    choices = sorted(name for name in runs if name.startswith("choice.") and name not in columns)
    constant = [name for name in runs if name.startswith("config.") and name not in varied]
    front = [*columns[:metrics], *choices, *varied, *columns[metrics:settings]]
    return runs.reindex(columns=front + constant).copy()


def without_gaps(frame: pd.DataFrame) -> pd.DataFrame:
    """Give integers and truth values of which none is missing the types of NumPy."""
    plain = {"Int64": "int64", "boolean": "bool"}
    whole = [name for name in frame if str(frame.dtypes[name]) in plain and not frame[name].hasnans]
    # A copy joins the columns of one type: further columns can then be set without a warning.
    return frame.astype({name: plain[str(frame.dtypes[name])] for name in whole}).copy()


def plain_values(values: Any) -> list[Any]:
    """Return a column as Python values, None for what is missing."""
    return [None if gone else value for value, gone in zip(values, values.isna(), strict=True)]
