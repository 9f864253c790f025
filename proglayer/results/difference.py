"""Two runs side by side: the settings, the code and the figures in which they differ."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from rich.table import Table

from proglayer.console import Columns, table
from proglayer.errors import UserError
from proglayer.results.columns import GROUPS
from proglayer.results.formatting import tokenizer_of
from proglayer.results.frames import Results, load

# Of hashes, as git shortens them.
SHORT = 12
# What a result may depend on besides the settings: the columns of `runs`.
CODE = (
    *("git_commit", "git_changed", "git_difference", "proglayer", "python", "torch"),
    *("device", "device_name", "threads", "platform", "host"),
    *("corpus_fingerprint", "test_fingerprint", "tokenizer", "vocab_size"),
)
# The columns of `phases`.
FIGURES = (
    *("stage", "layers", "epochs", "best_epoch", "train_loss"),
    *("validation_loss", "validation_perplexity", "validation_accuracy_percent"),
    *("validation_bits_per_byte", "test_loss", "test_perplexity", "test_accuracy_percent"),
    *("test_bits_per_byte", "train_tokens", "train_seconds", "tokens_per_second"),
)
# Of different tokenizers they do not compare.
PER_TOKEN = re.compile("loss|perplexity|accuracy")


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
    one, other = (_rows(each.runs)[0] for each in both)
    settings = sorted(name for name in one | other if name.startswith("config."))
    parts = {"run": ["status"], "setting": [*GROUPS.values(), *settings], "code": CODE}
    rows = [
        Row(part, name.removeprefix("config."), _text(one.get(name)), _text(other.get(name)))
        for part, names in parts.items()
        for name in names
        if _text(one.get(name)) != _text(other.get(name))
    ]
    same_tokens = tokenizer_of(one) == tokenizer_of(other)
    first, second = ({row["phase"]: row for row in _rows(each.phases)} for each in both)
    for phase, name in itertools.product(sorted(first | second), FIGURES):
        x, y = (each.get(phase, {}).get(name) for each in (first, second))
        change = ""
        if isinstance(x, str):
            change = "the same" if x == y else ""
        elif x is not None and y is not None and (same_tokens or not PER_TOKEN.search(name)):
            change = f"{y - x:+,.6g}"
        if x is not None or y is not None:
            rows.append(Row(f"phase {phase}", name, _text(x), _text(y), change))
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
    for place, (row, following) in enumerate(itertools.pairwise(rows)):
        shown.rows[place].end_section = row.part != following.part
    lines = [
        f"no {what} differs"
        for part, what in (("setting", "setting"), ("code", "version of code, library or machine"))
        if part not in {row.part for row in rows}
    ]
    commits = [row for row in rows if row.name == "git_commit" and row.a and row.b]
    lines += [f"git diff {row.a} {row.b} shows what changed in the code" for row in commits]
    if any(row.name == "tokenizer" for row in rows):
        lines.append("of different tokenizers only bits per byte compare")
    shown.caption, shown.caption_justify = "\n".join(lines) or None, "left"
    return shown


def _one_run(folder: str | Path) -> Results:
    results = load(folder)
    if len(results.runs) > 1:
        some = ", ".join(results.runs["run"].head(3))
        raise UserError(f"{folder} holds {len(results.runs)} runs ({some}, ...): name one of them")
    if results.runs.empty:
        unread = results.left_out["reason"].tolist()
        raise UserError(f"{folder}: {unread[0]}" if unread else f"no run in {folder}")
    return results


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a frame as Python values, None for what is missing."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,.8g}"
    text = str(value)
    return text[:SHORT] if re.fullmatch("[0-9a-f]{32,64}", text) else text
