"""Results for people: the table of a sweep, and two runs side by side."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.text import Text

from proglayer.console import console, counted, one_line
from proglayer.errors import UserError
from proglayer.results.read import Results, load
from proglayer.results.variants import GROUPS, what_varied
from proglayer.run.record import RunState
from proglayer.table import Column, Table, is_missing

if TYPE_CHECKING:
    from rich.console import Console

STYLE = {
    RunState.completed: "green",
    RunState.failed: "bold red",
    RunState.lost: "bold red",
    RunState.interrupted: "yellow",
    RunState.running: "cyan",
    RunState.preempted: "yellow",
    RunState.pruned: "dim",
    RunState.pending: "dim",
    RunState.waiting: "dim",
    RunState.not_started: "dim",
}
# Of sweeps that Hydra named, the token is enough to tell them apart.
STAMP = re.compile(r"(?<![^/])[\d-]{10}_[\d-]{8}_(?=[0-9a-f]{6}/)")
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


# --- the table of a sweep -------------------------------------------------------------------------


def print_summary(*folders: str | Path) -> bool:
    """Print the table of the jobs in `folders` and a line of totals; True if any failed."""
    results = load(*folders)
    print_results(results, console())
    return results.failures > 0


def print_results(results: Results, out: Console) -> None:
    """Print the table of the runs, why some failed, what was left out, and a line of totals."""
    if len(results.runs):
        out.print(summary_table(results).rich(out.width))
    lines = [
        Text.assemble((status, STYLE[status]), f" {one_line(run)}: {one_line(reason)}")
        for status, run, reason in results.runs[["status", "run", "reason"]].dropna().to_numpy()
    ]
    for folder, _, reason in results.left_out.itertuples(index=False):
        lines.append(Text(f"left out: {one_line(folder)}: {one_line(reason)}"))
    for line in (*lines, Text(_totals(results))):
        out.print(line, no_wrap=True, overflow="ellipsis")


def summary_table(results: Results) -> Table:
    """Return the table of every job: what was varied, how it ended, and its metrics."""
    varied = what_varied(results.runs)
    progress = _progress(results)
    rows = results.runs.to_dict("records")
    for place, row in enumerate(rows):
        row["progress"] = progress.get(row["run"], "")
        row |= {f"varied {title}": values[place] for title, values in varied.items()}

    def figure(name: str, label: str, minor: int, form: str) -> Column:
        return Column(
            name, label, of_row=partial(pair, name=name, form=form), kind="figure", minor=minor
        )

    tokenizers = {tokenizer_of(row) for row in rows if text_of(row["corpus"])}
    # Losses and perplexities of different tokenizers do not compare.
    bits = [figure("bits_per_byte", "bits/byte", 2, ".3f")] if len(tokenizers) > 1 else []
    columns = (
        Column("run", "job", lambda run: STAMP.sub("", run), kind="prose"),
        *(Column(f"varied {title}", title, kind="prose", minor=1) for title in varied),
        Column("status", "status", style=lambda row: STYLE[row["status"]]),
        figure("layers", "layers", 6, "d"),
        Column(
            "last_perplexity",
            "perplexity",
            of_row=lambda row: row["progress"] or pair(row, "perplexity", ",.2f"),
            kind="figure",
            minor=3,
        ),
        figure("accuracy_percent", "accuracy %", 4, ".2f"),
        *bits,
        Column("accuracy_points", "change, points", "+.2f", minor=7),
        Column("perplexity_percent", "perplexity fell by, %", ".2f", minor=8),
        Column("epochs", "epochs", "d", minor=9),
        Column("epochs_reused", "reused", lambda n: f"{n:d}" if n else "", kind="figure", minor=11),
        Column("seconds", "time", duration, kind="figure", minor=5),
        Column(
            "seconds_saved", "saved", lambda s: duration(s) if s else "", kind="figure", minor=10
        ),
    )
    shown = [
        column
        for column in columns
        if column.shown_as != "figure" or any(column.cell(row).text for row in rows)
    ]
    return Table(rows, shown)


def _progress(results: Results) -> dict[str, str]:
    """Return how far each running run is: its last epoch, and the best so far of that phase."""
    runs = results.runs
    running = runs.loc[runs["status"] == RunState.running.value, "run"].tolist()
    progress = {}
    trained: Any = results.epochs[results.epochs["epoch"] > 0]
    for run, epochs in trained[trained["run"].isin(running)].groupby("run"):
        phase = epochs["phase"].max()
        epochs = epochs[epochs["phase"] == phase]
        best = epochs["validation_perplexity"].min()
        progress[str(run)] = f"{best:,.2f} (phase {phase}, epoch {epochs['epoch'].max()})"
    return progress


def _totals(results: Results) -> str:
    """Return how many runs there are of each status, in a line."""
    counts = Counter(results.runs["status"].tolist())
    parts = [f"{counts[status]} {status}" for status in STYLE if status in counts]
    repeats = results.runs["duplicate_of"].notna().tolist().count(True)
    parts += [f"{repeats} repeat another's settings and seed"] if repeats else []
    return counted(len(results.runs), "run") + (f": {', '.join(parts)}" if parts else "")


# --- two runs side by side ------------------------------------------------------------------------


def difference(a: str | Path, b: str | Path) -> Table:
    """Compare two runs, by their folders: settings, code and figures.

    Settings and what the code is are listed where they differ, figures of each phase where either
    run has them. `change` is B − A where both are numbers that compare.

    Raises:
        FileNotFoundError: for a folder that is not there.
        UserError: for one that holds no run, or several.
    """
    both = _one_run(a), _one_run(b)
    one, other = (_records(each.runs)[0] for each in both)
    settings = sorted(name for name in one | other if name.startswith("config."))
    parts = {"run": ["status"], "setting": [*GROUPS.values(), *settings], "code": CODE}
    rows = [
        _row(part, name.removeprefix("config."), one.get(name), other.get(name))
        for part, names in parts.items()
        for name in names
        if one.get(name) != other.get(name)
    ]
    same_tokens = tokenizer_of(one) == tokenizer_of(other)
    first, second = ({row["phase"]: row for row in _records(each.phases)} for each in both)
    for phase, name in itertools.product(sorted(first | second), FIGURES):
        x, y = (each.get(phase, {}).get(name) for each in (first, second))
        change = ""
        if isinstance(x, str):
            change = "the same" if x == y else ""
        elif x is not None and y is not None and (same_tokens or not PER_TOKEN.search(name)):
            change = f"{y - x:+,.6g}"
        if x is not None or y is not None:
            rows.append(_row(f"phase {phase}", name, x, y, change))
    columns = (
        Column("part", ""),
        Column("name", " ", kind="prose"),
        Column("a", f"A: {a}", kind="prose"),
        Column("b", f"B: {b}", kind="prose"),
        Column("change", "B − A", kind="figure"),
    )
    return Table(rows, columns, note="\n".join(_remarks(rows)))


def _remarks(rows: list[dict[str, str]]) -> list[str]:
    differing = {row["part"] for row in rows}
    lines = ["no setting differs"] if "setting" not in differing else []
    lines += ["no version of code, library or machine differs"] if "code" not in differing else []
    for row in rows:
        if row["name"] == "git_commit" and row["a"] and row["b"]:
            lines.append(f"git diff {row['a']} {row['b']} shows what changed in the code")
        if row["name"] == "tokenizer":
            lines.append("of different tokenizers only bits per byte compare")
    return lines


def _row(part: str, name: str, a: Any, b: Any, change: str = "") -> dict[str, str]:
    return {"part": part, "name": name, "a": _shown(a), "b": _shown(b), "change": change}


def _one_run(folder: str | Path) -> Results:
    results = load(folder)
    if len(results.runs) > 1:
        some = ", ".join(results.runs["run"].head(3))
        raise UserError(f"{folder} holds {len(results.runs)} runs ({some}, ...): name one of them")
    if results.runs.empty:
        unread = results.left_out["reason"].tolist()
        raise UserError(f"{folder}: {unread[0]}" if unread else f"no run in {folder}")
    return results


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a frame as Python values, None for what is missing."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def _shown(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,.8g}"
    text = text_of(value)
    return text[:SHORT] if re.fullmatch("[0-9a-f]{32,64}", text) else text


# --- numbers and lists as text --------------------------------------------------------------------


def duration(seconds: Any) -> str:
    """Return seconds for people: 8.4 s, 12 min 30 s, 3 h 5 min; nothing for what is not known."""
    if is_missing(seconds):
        return ""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def pair(row: Mapping[str, Any], name: str, form: str) -> str:
    """Return the metric after the first phase and after the last, as far as they are known."""
    ends = (row[f"first_{name}"], row[f"last_{name}"])
    texts = [format(end, form) for end in ends if not is_missing(end)]
    return " → ".join(dict.fromkeys(texts))


def tokenizer_of(row: Mapping[str, Any]) -> str:
    """Return what cut a run's text, with the size of its vocabulary."""
    size = row["vocab_size"]
    return text_of(row["tokenizer"]) + ("" if is_missing(size) else f" ({size:,d})")


def text_of(value: Any) -> str:
    """Return a value as text; nothing for one that is missing."""
    return "" if is_missing(value) else str(value)


def listed(names: Sequence[str], most: int) -> str:
    """Return names with commas between them, and how many more there are than `most`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def ranges(numbers: Iterable[Any]) -> str:
    """Return whole numbers for people: 1-5, 8."""
    parts: list[list[int]] = []
    for number in sorted({int(n) for n in numbers if not is_missing(n)}):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    texts = [str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a}-{b}" for a, b in parts]
    return listed(texts, 12)
