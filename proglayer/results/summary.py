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
from proglayer.results.columns import rows_of
from proglayer.results.formatting import duration, number_text, pair, text_of, tokenizer_of
from proglayer.results.frames import Results, load, what_varied
from proglayer.store.record import RunState

if TYPE_CHECKING:
    from rich.console import Console

# Rows, and lines of reasons, that a table has unless all are asked for: a thousand jobs take a
# second to lay out, and nobody reads them in a terminal.
MOST_ROWS = 400
MOST_REASONS = 100
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
TO_COME = (RunState.preempted, RunState.pending, RunState.waiting)


def summary_table(
    source: Results | str | Path, width: int | None = None, whole: bool = True
) -> Table:
    """The table of every job: what was varied, how it ended, the metrics, and why it failed.

    With `width`, in characters, the less important columns give way until it fits; a job's status
    is never cut. Without `whole` it has the first and the last of more than MOST_ROWS jobs.
    """
    results = source if isinstance(source, Results) else load(source)
    number, half = len(results.runs), MOST_ROWS // 2
    cut = not whole and number > MOST_ROWS
    shown = [*range(half), *range(number - half, number)] if cut else list(range(number))
    rows = _rows(results, shown)
    columns = _columns(rows)
    gone = _too_wide(rows, columns, width)
    captions = [f"not shown at this width: {', '.join(gone)}"] if gone else []
    if cut:
        captions.append(
            f"not shown: {number - len(shown):,} jobs in the middle; --all shows all jobs, --csv "
            "writes them with everything else that is known of them"
        )
    jobs = table(rows, [column for column in columns if column[0] not in gone])
    jobs.caption, jobs.caption_justify = "\n".join(captions) or None, "left"
    if cut:
        jobs.rows[half - 1].end_section = True
    outer = Table.grid()
    outer.add_row(jobs)
    if reasons := _reasons(results.runs):
        outer.add_row(_lines(reasons if whole else _first(reasons, "did not complete")))
    return outer


def print_summary(*folders: str | Path) -> bool:
    """Print the table of the jobs in `folders` and a line of totals; True if any failed."""
    results = load(*folders)
    print_results(results, console())
    return results.failures > 0


# --- the table ------------------------------------------------------------------------------------


def _rows(results: Results, shown: Sequence[int]) -> list[dict[str, Any]]:
    """The runs in these places, each with what varied and how far it is."""
    progress = _progress(results)
    varied = what_varied(results.runs)
    rows = results.runs.iloc[list(shown)].to_dict("records")
    for place, row in zip(shown, rows, strict=True):
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
    return [
        Text.assemble((status, STYLE[status]), f" {one_line(run)}: {one_line(reason)}")
        for status, run, reason in rows_of(runs, "status", "run", "reason")
        if reason
    ]


def print_results(results: Results, out: Console, whole: bool = False) -> None:
    """Print the table of the runs, what was left out, and a line of totals."""
    if len(results.runs):
        out.print(summary_table(results, out.width, whole))
    left_out = [
        Text(f"left out: {one_line(folder)}: {one_line(reason)}")
        for folder, reason in rows_of(results.left_out, "folder", "reason")
    ]
    if left_out:
        out.print(_lines(left_out if whole else _first(left_out, "were left out")))
    out.print(Text("; ".join(filter(None, (_totals(results), _held(results.runs))))))


def _first(lines: list[Text], what: str) -> list[Text]:
    more = len(lines) - MOST_REASONS
    return [*lines[:MOST_REASONS], Text(f"{more:,} more {what}")] if more > 0 else lines


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
    held = (RunState.preempted, RunState.pending)
    signs = [sign for status, sign in rows_of(runs, "status", "last_sign") if status in held]
    first = min(filter(None, signs), default=None)
    when = f" since {first:%Y-%m-%d %H:%M} UTC" if first else ""
    return f"{len(signs)} in the hands of a scheduler{when}" if signs else ""


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
            if live:
                live.update(_moving(results), refresh=True)
            else:
                left = _time_left(results.runs)
                now = _now(results)
                for line in (*(reason.plain for reason in _reasons(results.runs)), now):
                    if line not in said:
                        said.add(line)
                        rest = f"; {left}" if line is now and left else ""
                        out.print(Text(f"{datetime.now():%H:%M:%S} {line}{rest}"))
            if _ended(results.runs) == len(results.runs):
                return results
            time.sleep(max(every_s, 10 * (time.monotonic() - began)))


def _now(results: Results) -> str:
    """Where a sweep stands, in a line."""
    progress = [f"{one_line(run)}: {far}" for run, far in _progress(results).items()]
    more = f", and {len(progress) - 3} more" if len(progress) > 3 else ""
    runs = results.runs
    parts = (_totals(results), _held(runs), _best_so_far(runs), ", ".join(progress[:3]) + more)
    return "; ".join(part for part in parts if part)


def _moving(results: Results) -> RenderableType:
    """Where a sweep stands, for a terminal."""
    from rich.progress_bar import ProgressBar

    runs = results.runs
    progress = _progress(results)
    rows = zip(rows_of(runs, "status", "run", "last_sign"), _names(runs), strict=True)
    under_way = [
        Text.assemble(
            (one_line(run), STYLE[RunState.running]),
            f"  {progress.get(run, 'no epoch yet')}",
            f"  last sign of life {duration(_age(sign))} ago" if sign else "",
            f"  {name}",
        )
        for (status, run, sign), name in rows
        if status == RunState.running
    ]
    whole = Table.grid()
    whole.add_row(ProgressBar(total=max(1, len(runs)), completed=_ended(runs), width=40))
    lines = (_totals(results), _held(runs), _best_so_far(runs), _time_left(runs))
    whole.add_row(_lines(Text(line) for line in lines if line))
    # The newest of what failed; all of it stands in the table at the end.
    whole.add_row(_lines(under_way[:16] + _reasons(runs)[-8:]))
    return whole


def _ended(runs: pd.DataFrame) -> int:
    return sum(status not in (RunState.running, *TO_COME) for status in runs["status"])


def _best_so_far(runs: pd.DataFrame) -> str:
    """The completed run of the lowest perplexity, for each corpus: others do not compare."""
    columns = ("corpus_fingerprint", "last_perplexity", "last_accuracy_percent", "run")
    best: dict[str, tuple[Any, ...]] = {}
    for (corpus, *metrics), name in zip(rows_of(runs, *columns), _names(runs), strict=True):
        if metrics[0] is not None and (corpus not in best or metrics[0] < best[corpus][0]):
            best[corpus] = (*metrics, name)
    return "; ".join(
        f"best so far {perplexity:,.2f} ({number_text(accuracy, '.2f')} %): "
        + " ".join((one_line(run), name)).rstrip()
        for perplexity, accuracy, run, name in best.values()
    )


def _names(runs: pd.DataFrame) -> list[str]:
    """What tells each run from the others, such as `seed=1 model=standard`."""
    varied = what_varied(runs)
    pairs = [[f"{title}={value}" for value in values] for title, values in varied.items()]
    return [one_line(" ".join(each)) for each in zip(*pairs, strict=True)] or [""] * len(runs)


def _time_left(runs: pd.DataFrame) -> str:
    """An estimate from what completed runs took and how many run at once now, if there is one."""
    statuses = runs["status"].tolist()
    waiting = sum(status in TO_COME for status in statuses)
    running = statuses.count(RunState.running)
    columns = ("status", "wall_seconds", "started", "epochs", "epochs_reused", "seconds_saved")
    took, begun = [], []
    for status, seconds, started, epochs, reused, saved in rows_of(runs, *columns):
        if status == RunState.completed and seconds is not None:
            # One read whole from the store took no time, and says nothing of those to come.
            if not (reused and reused == epochs and seconds < (saved or 0)):
                took.append(seconds)
        elif status == RunState.running and started:
            begun.append(_age(started))
    if not running:
        return "nothing is running" if waiting else ""
    if not took:
        trained = "that trains " if RunState.completed in statuses else ""
        return f"time left not known until a run {trained}has completed"
    mean = sum(took) / len(took)
    left = (sum(max(0.0, mean - age) for age in begun) + mean * waiting) / running
    return (
        f"about {duration(left)} left if the others take what the {len(took)} completed took "
        f"({duration(mean)} each), {running} at a time"
    )


def _age(moment: Any) -> float:
    return max(0.0, (datetime.now(UTC) - moment).total_seconds())
