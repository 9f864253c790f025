"""Two runs side by side: the settings, the code and the figures in which they differ."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from rich.table import Table

from proglayer.console import Columns, table
from proglayer.errors import UserError
from proglayer.results.columns import GROUPS, plain_values
from proglayer.results.formatting import tokenizer_of
from proglayer.results.frames import Results, load
from proglayer.store.record import RunState

# Of hashes, as git shortens them.
SHORT = 12
SHORTENED = ("git_commit", "corpus_fingerprint", "test_fingerprint", "stage")
# What a result may depend on besides the settings: the columns of `runs`.
CODE = (
    *("git_commit", "git_changed", "git_difference", "proglayer", "python", "torch"),
    *("device", "device_name", "threads", "platform", "host"),
    *("corpus_fingerprint", "test_fingerprint"),
)
# The columns of `phases`, and how each is written.
FIGURES = {
    "stage": "s",
    "layers": "d",
    "epochs": "d",
    "best_epoch": "d",
    "train_loss": ".4f",
    "validation_loss": ".4f",
    "validation_perplexity": ",.2f",
    "validation_accuracy_percent": ".2f",
    "validation_bits_per_byte": ".4f",
    "test_loss": ".4f",
    "test_perplexity": ",.2f",
    "test_accuracy_percent": ".2f",
    "test_bits_per_byte": ".4f",
    "train_tokens": ",d",
    "train_seconds": ",.1f",
    "tokens_per_second": ",.0f",
}
# Those that are per token: of different tokenizers they do not compare.
PER_TOKEN = ("train_loss", "validation_loss", "validation_perplexity", "test_loss")
PER_TOKEN += ("validation_accuracy_percent", "test_perplexity", "test_accuracy_percent")


class Row(NamedTuple):
    """A line of the comparison. `change` is B − A where both are numbers that compare."""

    part: str
    name: str
    a: str
    b: str
    change: str = ""


def difference(a: str | Path, b: str | Path) -> list[Row]:
    """Compare two runs, by their folders.

    Settings and what the code is are listed where they differ, figures of each phase where either
    run has them.

    Raises:
        FileNotFoundError, NotADirectoryError: for a folder that is not there.
        UserError: for one that holds no run, or several.
    """
    both = _one_run(a), _one_run(b)
    rows: list[Row] = []
    first, second = (_first_row(each.runs) for each in both)
    settings = sorted(name for name in first | second if name.startswith("config."))
    ends = [_text(run["status"], "status") for run in (first, second)]
    if ends != [RunState.completed] * 2:
        rows.append(Row("run", "status", *ends))
    for part, names in (("setting", (*GROUPS.values(), *settings)), ("code", CODE)):
        for name in names:
            values = [_text(run.get(name), name) for run in (first, second)]
            if values[0] != values[1]:
                rows.append(Row(part, name.removeprefix("config."), *values))
    phases = [{row["phase"]: row for row in _rows(each.phases)} for each in both]
    tokenizers = [tokenizer_of(run) for run in (first, second)]
    other_tokens = len(set(tokenizers)) > 1
    if other_tokens:
        rows.append(Row("code", "tokenizer", tokenizers[0], tokenizers[1], "compare bits per byte"))
    for phase in sorted(phases[0] | phases[1]):
        pair = [each.get(phase, {}) for each in phases]
        for name, form in FIGURES.items():
            values = [row.get(name) for row in pair]
            if values != [None, None]:
                ours, theirs, change = _figures(name, values, form)
                compare = not other_tokens or name not in PER_TOKEN
                rows.append(Row(f"phase {phase}", name, ours, theirs, change if compare else ""))
    return rows


def difference_table(rows: list[Row], a: str, b: str) -> Table:
    """The comparison as a table, the runs named by their folders."""
    columns: Columns = (
        ("", "text", lambda row: row.part),
        ("", "long", lambda row: row.name),
        (f"A: {a}", "long", lambda row: row.a),
        (f"B: {b}", "long", lambda row: row.b),
        ("B − A", "number", lambda row: row.change),
    )
    shown = table(rows, columns)
    parts = [row.part for row in rows]
    for place, (part, following) in enumerate(itertools.pairwise(parts)):
        shown.rows[place].end_section = part != following
    lines = [
        f"no {what} differs"
        for part, what in (("setting", "setting"), ("code", "version of code, library or machine"))
        if part not in parts
    ]
    commits = [row for row in rows if row.name == "git_commit" and row.a and row.b]
    lines += [f"git diff {row.a} {row.b} shows what changed in the code" for row in commits]
    shown.caption, shown.caption_justify = "\n".join(lines) or None, "left"
    return shown


def _one_run(folder: str | Path) -> Results:
    results = load(folder)
    if len(results.runs) > 1:
        some = ", ".join(map(str, results.runs["run"].tolist()[:3]))
        raise UserError(f"{folder} holds {len(results.runs)} runs ({some}, ...): name one of them")
    if results.runs.empty:
        unread = results.left_out[results.left_out["kind"] != "foreign"]["reason"].tolist()
        raise UserError(f"{folder}: {unread[0]}" if unread else f"no run in {folder}")
    return results


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a frame as Python values, None for what is missing."""
    columns = {name: plain_values(frame[name]) for name in frame if frame[name].dtype != object}
    return [
        {name: values[place] for name, values in columns.items()} for place in range(len(frame))
    ]


def _first_row(frame: pd.DataFrame) -> dict[str, Any]:
    return _rows(frame)[0]


def _text(value: Any, name: str) -> str:
    text = "" if value is None else str(value)
    return text[:SHORT] if name in SHORTENED else text


def _figures(name: str, values: list[Any], form: str) -> tuple[str, str, str]:
    """Both values as text, and how they differ."""
    a, b = ("" if v is None else _text(v, name) if form == "s" else f"{v:{form}}" for v in values)
    if None in values or form == "s":
        return a, b, "the same" if a == b else ""
    change = values[1] - values[0]
    return a, b, f"{change:+{form}}" if change else "0"
