"""The summary of a sweep for people: its table, and following it while it runs."""

from __future__ import annotations

import contextlib
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from proglayer.console import Columns, console, counted, one_line, plain_cell, table
from proglayer.results.formatting import duration, listed, number_text, pair, text_of, tokenizer_of
from proglayer.results.frames import Results, load, what_varied
from proglayer.run.record import RunState

if TYPE_CHECKING:
    from rich.console import Console

# What a column of text keeps in a narrow table: as wide as the longest name of a model.
NARROW = 16
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
STAMP = re.compile(r"(?<![^/])[\d-]{10}_[\d-]{8}_(?=[0-9a-f]{6}/)")
# Will start, or start again, without anybody's doing.
TO_COME = [str(state) for state in (RunState.preempted, RunState.pending, RunState.waiting)]
# Of those that run, and of those that failed, so many are named on a terminal that follows them.
MOST_LINES = 8


def summary_table(source: Results | str | Path, width: int | None = None) -> Table:
    """The table of every job: what was varied, how it ended, the metrics, and why it failed.

    With `width`, in characters, the less important columns give way until it fits; a job's status
    is never cut.
    """
    results = source if isinstance(source, Results) else load(source)
    rows = _rows(results)
    columns = _columns(rows)
    gone = _too_wide(rows, columns, width)
    jobs = table(rows, [column for column in columns if column[0] not in gone])
    jobs.caption = f"not shown at this width: {', '.join(gone)}" if gone else None
    jobs.caption_justify = "left"
    outer = Table.grid()
    outer.add_row(jobs)
    outer.add_row(_lines(_reasons(results.runs)))
    return outer


def print_summary(*folders: str | Path) -> bool:
    """Print the table of the jobs in `folders` and a line of totals; True if any failed."""
    results = load(*folders)
    print_results(results, console())
    return results.failures > 0


# --- the table ------------------------------------------------------------------------------------


def _rows(results: Results) -> list[dict[str, Any]]:
    """The runs, each with what varied and how far it is."""
    progress = _progress(results)
    varied = what_varied(results.runs)
    rows = results.runs.to_dict("records")
    for place, row in enumerate(rows):
        row["progress"] = progress.get(row["run"])
        row["varied"] = {title: values[place] for title, values in varied.items()}
    return rows


def _columns(rows: list[dict[str, Any]]) -> Columns:
    """Title, kind and cell of each column that has something to show."""

    def number(name: str, form: str) -> Callable[[dict[str, Any]], str]:
        return lambda row: number_text(row[name], form)

    def varied(title: str) -> Callable[[dict[str, Any]], Text]:
        return lambda row: _cut(row["varied"][title])

    # Losses and perplexities of different tokenizers do not compare.
    bits = ("bits/byte", "number", lambda row: pair(row, "bits_per_byte", ".3f"))
    # Of sweeps that Hydra named, the token is enough to tell them apart.
    columns: Columns = (
        ("job", "long", lambda row: _cut(STAMP.sub("", row["run"]))),
        *((title, "long", varied(title)) for title in (rows[0]["varied"] if rows else ())),
        ("status", "text", lambda row: Text(row["status"], STYLE[row["status"]])),
        ("layers", "number", lambda row: pair(row, "layers", "d")),
        ("perplexity", "number", lambda row: row["progress"] or pair(row, "perplexity", ",.2f")),
        ("accuracy %", "number", lambda row: pair(row, "accuracy_percent", ".2f")),
        *([bits] if len({tokenizer_of(row) for row in rows if text_of(row["corpus"])}) > 1 else []),
        ("change, points", "number", number("accuracy_points", "+.2f")),
        ("perplexity fell by, %", "number", number("perplexity_percent", ".2f")),
        ("epochs", "number", number("epochs", "d")),
        ("reused", "number", lambda row: number_text(row["epochs_reused"] or pd.NA, "d")),
        ("time", "number", lambda row: duration(row["seconds"])),
        ("saved", "number", lambda row: duration(row["seconds_saved"] or pd.NA)),
    )
    return [
        (title, kind, cell)
        for title, kind, cell in columns
        if kind != "number" or any(cell(row) for row in rows)
    ]


# The columns that give way in a narrow table, the first one first; then those of what varied.
GIVE_WAY = (
    *("reused", "saved", "epochs", "perplexity fell by, %", "change, points", "layers", "time"),
    *("accuracy %", "perplexity", "bits/byte"),
)


def _too_wide(rows: Sequence[Any], columns: Columns, width: int | None) -> list[str]:
    """The titles of the columns that must go so that the rest fits into `width`."""
    widths: dict[str, int] = {}
    for title, kind, cell in columns:
        cells = [Text(title), *(plain_cell(cell(row)) for row in rows)]
        own = max(each.cell_len for each in cells)
        widths[title] = min(own, NARROW) if kind == "long" else own
    varied = [title for title in widths if title not in ("job", "status", *GIVE_WAY)]
    gone = []
    for title in (*(title for title in GIVE_WAY if title in widths), *varied):
        if width is None or 1 + sum(own + 3 for own in widths.values()) <= width:
            break
        gone.append(title)
        del widths[title]
    return gone


def _progress(results: Results) -> dict[str, str]:
    """How far each running run is: its last epoch, and the best so far of that phase."""
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


def _reasons(runs: pd.DataFrame) -> list[Text]:
    """A line for each run that has something to say about how it ended."""
    rows = runs[["status", "run", "reason"]].dropna().itertuples(index=False)
    return [
        Text.assemble((status, STYLE[status]), f" {one_line(run)}: {one_line(reason)}")
        for status, run, reason in rows
    ]


def print_results(results: Results, out: Console) -> None:
    """Print the table of the runs, what was left out, and a line of totals."""
    if len(results.runs):
        out.print(summary_table(results, out.width))
    for folder, _, reason in results.left_out.itertuples(index=False):
        line = f"left out: {one_line(folder)}: {one_line(reason)}"
        out.print(Text(line), no_wrap=True, overflow="ellipsis")
    out.print(Text("; ".join(filter(None, (_totals(results), _held(results.runs))))))


def _lines(lines: Iterable[Text]) -> RenderableType:
    """One line each, cut to the width at hand."""
    grid = Table.grid()
    grid.add_column(no_wrap=True, overflow="ellipsis")
    for line in lines:
        grid.add_row(line)
    return grid


def _totals(results: Results) -> str:
    """How many runs there are of each status, in a line."""
    counts = Counter(results.runs["status"].tolist())
    parts = [f"{counts[status]} {status}" for status in STYLE if status in counts]
    repeats = results.runs["duplicate_of"].notna().tolist().count(True)
    parts += [f"{repeats} repeat another's settings and seed"] if repeats else []
    return counted(len(results.runs), "run") + (f": {', '.join(parts)}" if parts else "")


def _held(runs: pd.DataFrame) -> str:
    """How many runs a scheduler has in hand, and since when the first of them.

    A scheduler reports to nobody that it lost one: the reader judges whether that is too long.
    """
    held = runs[runs["status"].isin([RunState.preempted.value, RunState.pending.value])]
    first: Any = held["last_sign"].min()
    when = "" if pd.isna(first) else f" since {first:%Y-%m-%d %H:%M} UTC"
    return f"{len(held)} in the hands of a scheduler{when}" if len(held) else ""


def _cut(text: str) -> Text:
    return Text(one_line(text), no_wrap=True, overflow="ellipsis")


# --- following a sweep ----------------------------------------------------------------------------


def watch(folders: Sequence[str | Path], every_s: float, out: Console) -> Results:
    """Follow runs until all have ended: a display that moves on a terminal, else a line a change.

    A run that is lost has ended, too, and so has one that its sweep will not start any more. One
    that a scheduler is to start has not, however long that takes: a queue may be days long. The
    line says since when it waits. Looks every `every_s` seconds, or less often where looking itself
    takes long.
    """
    from rich.live import Live

    said: set[str] = set()
    live = Live(console=out, transient=True, auto_refresh=False) if out.is_terminal else None
    with live or contextlib.nullcontext():
        while True:
            began = time.monotonic()
            results = load(*folders)
            runs, reasons = results.runs, _reasons(results.runs)
            running = [f"{one_line(run)}: {far}" for run, far in _progress(results).items()]
            stands = [part for part in (_totals(results), _held(runs), _best_so_far(runs)) if part]
            left = _time_left(runs)
            if live:
                # The newest of what failed; all of it stands in the table at the end.
                lines = map(Text, (*stands, left, *running[:MOST_LINES]))
                live.update(_lines((*lines, *reasons[-MOST_LINES:])), refresh=True)
            else:
                now = "; ".join([*stands, listed(running, 3)] if running else stands)
                for line in (*(reason.plain for reason in reasons), now):
                    if line not in said:
                        said.add(line)
                        rest = f"; {left}" if line is now and left else ""
                        out.print(Text(f"{datetime.now():%H:%M:%S} {line}{rest}"))
            if {RunState.running, *TO_COME}.isdisjoint(runs["status"]):
                return results
            time.sleep(max(every_s, 10 * (time.monotonic() - began)))


def _best_so_far(runs: pd.DataFrame) -> str:
    """The completed run of the lowest perplexity, for each corpus: others do not compare."""
    varied = what_varied(runs)
    perplexities = runs["last_perplexity"].dropna().groupby(runs["corpus_fingerprint"], sort=False)
    best = []
    for place in perplexities.idxmin():
        row = runs.loc[place]
        names = [f"{title}={values[place]}" for title, values in varied.items()]
        best.append(
            f"best so far {row['last_perplexity']:,.2f} ({row['last_accuracy_percent']:.2f} %): "
            + one_line(" ".join((row["run"], *names)))
        )
    return "; ".join(best)


def _time_left(runs: pd.DataFrame) -> str:
    """An estimate from what completed runs took and how many run at once now, if there is one."""
    to_come: Any = runs["status"].isin(TO_COME).sum()
    started = runs.loc[runs["status"] == RunState.running.value, "started"]
    if started.empty:
        return "nothing is running" if to_come else ""
    # One read whole from the store took no time, and says nothing of those to come.
    trained = (runs["epochs_reused"] != runs["epochs"]).fillna(True)
    took = runs.loc[trained & (runs["status"] == RunState.completed.value), "wall_seconds"].dropna()
    if took.empty:
        return "time left not known until a run that trains has completed"
    ages = (datetime.now(UTC) - started).dt.total_seconds().dropna()
    left = ((took.mean() - ages).clip(lower=0).sum() + took.mean() * to_come) / len(started)
    return (
        f"about {duration(left)} left if the others take what the {len(took)} completed took "
        f"({duration(took.mean())} each), {len(started)} at a time"
    )
