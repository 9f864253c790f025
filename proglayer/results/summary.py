"""The summary of a sweep for people: its table, following it while it runs, and the command.

`python -m proglayer.results FOLDER...` prints the table of every run at any time, follows them with
`--watch`, and writes the frames of `proglayer.results` as CSV or Parquet.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from proglayer.console import console, one_line
from proglayer.results.columns import (
    COMPLETED,
    GROUPS,
    LOST,
    NOT_STARTED,
    PENDING,
    RUNNING,
    WAITING,
)
from proglayer.results.formatting import duration, number_text, pair
from proglayer.results.frames import Results, load, plain_values
from proglayer.results.reader import keys_and_values
from proglayer.store.record import RunState

if TYPE_CHECKING:
    from rich.console import Console


def summary_table(
    source: Results | str | Path, width: int | None = None, whole: bool = True
) -> Table:
    """The table of every job: what was varied, how it ended, the figures, and why it failed.

    With `width`, in characters, the less important columns give way until it fits; a job's status
    is never cut. Without `whole` it has the first and the last of more than MOST_ROWS jobs.
    """
    results = source if isinstance(source, Results) else load(source)
    number = len(results.runs)
    cut = not whole and number > MOST_ROWS
    half = MOST_ROWS // 2
    shown = [*range(half), *range(number - half, number)] if cut else list(range(number))
    columns = _summary_columns(results, shown)
    gone = _too_wide(columns, width)
    captions = [f"not shown at this width: {', '.join(gone)}"] if gone else []
    if cut:
        captions.append(
            f"not shown: {number - len(shown):,} jobs in the middle; --all shows all jobs, --csv "
            "writes them with everything else that is known of them"
        )
    table = Table(caption="\n".join(captions) or None)
    table.caption_justify = "left"
    kept = [column for column in columns if column.title not in gone]
    for column in kept:
        table.add_column(
            Text(column.title),
            justify="right" if column.right else "left",
            no_wrap=not column.flexible,
        )
    for place, cells in enumerate(zip(*(column.cells for column in kept), strict=True)):
        table.add_row(*cells, end_section=cut and place == half - 1)
    outer = Table.grid()
    outer.add_row(table)
    if reasons := _reasons(results.runs):
        outer.add_row(_lines(reasons if whole else _first(reasons, "did not complete")))
    return outer


def print_summary(*folders: str | Path) -> bool:
    """Print the table of the jobs in `folders` and a line of totals; True if any failed."""
    results = load(*folders)
    _print_results(results, console())
    return results.failures > 0


# ---------------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True)
class _Shown:
    """A column of the summary. In a narrow table the one with the highest `goes` goes first."""

    title: str
    cells: list[Text]
    goes: int = 0
    right: bool = False
    flexible: bool = False

    @property
    def narrowest(self) -> int:
        width = max((cell.cell_len for cell in (Text(self.title), *self.cells)), default=0)
        return min(width, NARROW) if self.flexible else width


# Rows, and lines of reasons, that a table has unless all are asked for: a thousand jobs take a
# second to lay out, and nobody reads them in a terminal.
MOST_ROWS = 400
MOST_REASONS = 100
# As wide as the longest name of a model.
NARROW = 16
STYLE = {
    COMPLETED: "green",
    RunState.failed.value: "bold red",
    LOST: "bold red",
    RunState.interrupted.value: "yellow",
    RUNNING: "cyan",
    RunState.preempted.value: "yellow",
    RunState.pruned.value: "dim",
    PENDING: "dim",
    WAITING: "dim",
    NOT_STARTED: "dim",
}
STAMP = re.compile(r"(?<![^/])[\d-]{10}_[\d-]{8}_(?=[0-9a-f]{6}/)")
# Will start, or start again, without anybody's doing.
TO_COME = (RunState.preempted.value, PENDING, WAITING)


def _summary_columns(results: Results, shown: Sequence[int]) -> list[_Shown]:
    """The columns of the runs in these places."""
    runs = results.runs.iloc[list(shown)]
    progress = _progress(results)
    rows = runs.to_dict("records")
    # Of sweeps that Hydra named, the token is enough to tell them apart.
    names = [STAMP.sub("", name) for name in runs["run"]]
    columns = [_Shown("job", [_cut(name) for name in names], flexible=True)]
    for title, values in _what_varied(results.runs).items():
        columns.append(_Shown(title, [_cut(values[place]) for place in shown], 1, flexible=True))
    columns.append(_Shown("status", [Text(value, STYLE[value]) for value in runs["status"]]))

    def figures(title: str, goes: int, cell: Callable[[dict[str, Any]], str]) -> None:
        cells = [Text(cell(row)) for row in rows]
        if any(cells):
            columns.append(_Shown(title, cells, goes, right=True))

    figures("layers", 5, lambda row: pair(row, "layers", "d"))
    figures("perplexity", 2, lambda r: progress.get(r["run"]) or pair(r, "perplexity", ",.2f"))
    figures("accuracy %", 3, lambda row: pair(row, "accuracy_percent", ".2f"))
    figures("± points", 6, lambda row: number_text(row["accuracy_points"], "+.2f"))
    figures("± ppl %", 7, lambda row: number_text(row["perplexity_percent"], "+.2f"))
    figures("epochs", 8, lambda row: number_text(row["epochs"], "d"))
    figures("reused", 10, lambda row: number_text(row["epochs_reused"] or pd.NA, "d"))
    figures("time", 4, lambda row: duration(row["seconds"]))
    figures("saved", 9, lambda row: duration(row["seconds_saved"] or pd.NA))
    return columns


def _too_wide(columns: Sequence[_Shown], width: int | None) -> list[str]:
    """The titles of the columns that must go so that the rest fits into `width`."""
    gone: list[str] = []
    if width is None:
        return gone
    for column in sorted(columns, key=lambda column: -column.goes):
        need = 1 + sum(c.narrowest + 3 for c in columns if c.title not in gone)
        if need <= width or not column.goes:
            break
        gone.append(column.title)
    return gone


def _what_varied(runs: pd.DataFrame) -> dict[str, list[str]]:
    """Short title -> each run's value, for the overrides that differ between the runs."""
    given = [
        dict(keys_and_values(shlex.split(overrides or "")))
        for overrides in plain_values(runs["overrides"])
    ]
    varied: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for overrides in given for key in overrides):
        column = key if key in GROUPS else f"config.{key}"
        recorded = plain_values(runs[column]) if column in runs else [None] * len(runs)
        values = [
            overrides[key] if key in overrides else "" if value is None else str(value)
            for overrides, value in zip(given, recorded, strict=True)
        ]
        if len(set(values)) > 1:
            varied[key] = values
    leaves = Counter(key.rsplit(".", 1)[-1] for key in varied)
    short = {key: key.rsplit(".", 1)[-1] for key in varied}
    return {short[k] if leaves[short[k]] == 1 else k: values for k, values in varied.items()}


def _progress(results: Results) -> dict[str, str]:
    """How far each running run is: its last epoch, and the best so far of that phase."""
    runs = results.runs
    running = runs.loc[runs["status"] == RUNNING, "run"].tolist()
    progress = {}
    for run, epochs in results.epochs[results.epochs["run"].isin(running)].groupby("run"):
        phase = epochs["phase"].max()
        epochs = epochs[epochs["phase"] == phase]
        best = epochs["validation_perplexity"].min()
        progress[str(run)] = f"{best:,.2f} (phase {phase}, epoch {epochs['epoch'].max()})"
    return progress


def _reasons(runs: pd.DataFrame) -> list[Text]:
    """A line for each run that has something to say about how it ended."""
    told = runs[runs["reason"].notna()]
    columns = (told["status"], told["run"], told["reason"])
    return [
        Text.assemble((status, STYLE[status]), f" {one_line(run)}: {one_line(reason)}")
        for status, run, reason in zip(*columns, strict=True)
    ]


def _print_results(results: Results, out: Console, whole: bool = False) -> None:
    if len(results.runs):
        out.print(summary_table(results, out.width, whole))
    columns = (results.left_out["folder"], results.left_out["reason"])
    left_out = [
        Text(f"left out: {one_line(folder)}: {one_line(reason)}")
        for folder, reason in zip(*columns, strict=True)
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
    number = len(results.runs)
    return f"{number} run{'' if number == 1 else 's'}" + (f": {', '.join(parts)}" if parts else "")


def _held(runs: pd.DataFrame) -> str:
    """How many runs a scheduler has in hand, and since when the first of them.

    It tells nobody when it forgets one, so that a reader must judge whether that is too long.
    """
    held = runs[runs["status"].isin([RunState.preempted.value, PENDING])]
    if held.empty:
        return ""
    since = [sign for sign in plain_values(held["last_sign"]) if sign is not None]
    when = f" since {min(since):%Y-%m-%d %H:%M} UTC" if since else ""
    return f"{len(held)} in the hands of a scheduler{when}"


def _cut(text: str) -> Text:
    return Text(one_line(text), no_wrap=True, overflow="ellipsis")


# ---------------------------------------------------------------------------------------------
# Following a sweep


def watch(folders: Sequence[str | Path], every_s: float, out: Console) -> Results:
    """Follow runs until all have ended: a display that moves on a terminal, else a line a change.

    A run that is lost has ended, too, and so has one that its sweep will not start any more. One
    that a scheduler is to start has not, however long that takes: a queue may be days long, and
    since when it waits is told. Looks every `every_s` seconds, or less often where looking itself
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
    progress = [f"{run}: {far}" for run, far in _progress(results).items()]
    more = f", and {len(progress) - 3} more" if len(progress) > 3 else ""
    runs = results.runs
    parts = (_totals(results), _held(runs), _best_so_far(runs), ", ".join(progress[:3]) + more)
    return "; ".join(part for part in parts if part)


def _moving(results: Results) -> RenderableType:
    """Where a sweep stands, for a terminal."""
    from rich.progress_bar import ProgressBar

    runs = results.runs
    progress = _progress(results)
    columns = (runs["status"], runs["run"], plain_values(runs["last_sign"]), _names(runs))
    under_way = [
        Text.assemble(
            (one_line(run), STYLE[RUNNING]),
            f"  {progress.get(run, 'no epoch yet')}",
            f"  last sign of life {duration(_age(sign))} ago" if sign else "",
            f"  {told}",
        )
        for status, run, sign, told in zip(*columns, strict=True)
        if status == RUNNING
    ]
    whole = Table.grid()
    whole.add_row(ProgressBar(total=max(1, len(runs)), completed=_ended(runs), width=40))
    lines = (_totals(results), _held(runs), _best_so_far(runs), _time_left(runs))
    whole.add_row(_lines(Text(line) for line in lines if line))
    # The newest of what failed; all of it stands in the table at the end.
    whole.add_row(_lines(under_way[:16] + _reasons(runs)[-8:]))
    return whole


def _ended(runs: pd.DataFrame) -> int:
    return sum(status not in (RUNNING, *TO_COME) for status in runs["status"])


def _best_so_far(runs: pd.DataFrame) -> str:
    """The completed run of the lowest perplexity, for each corpus: others do not compare."""
    names = ("corpus_fingerprint", "last_perplexity", "last_accuracy_percent", "run")
    columns = [plain_values(runs[name]) for name in names]
    best: dict[str, tuple[Any, ...]] = {}
    for corpus, *figures in zip(*columns, _names(runs), strict=True):
        if figures[0] is not None and (corpus not in best or figures[0] < best[corpus][0]):
            best[corpus] = tuple(figures)
    return "; ".join(
        f"best so far {perplexity:,.2f} ({number_text(accuracy, '.2f')} %): "
        + " ".join((one_line(run), told)).rstrip()
        for perplexity, accuracy, run, told in best.values()
    )


def _names(runs: pd.DataFrame) -> list[str]:
    """What tells each run from the others, such as `seed=1 model=standard`."""
    varied = _what_varied(runs)
    told = [[f"{title}={value}" for value in values] for title, values in varied.items()]
    return [one_line(" ".join(each)) for each in zip(*told, strict=True)] or [""] * len(runs)


def _time_left(runs: pd.DataFrame) -> str:
    """An estimate from what completed runs took and how many run at once now, if there is one."""
    statuses = runs["status"].tolist()
    waiting = sum(status in TO_COME for status in statuses)
    running = statuses.count(RUNNING)
    names = ("wall_seconds", "started", "epochs", "epochs_reused", "seconds_saved")
    columns = [plain_values(runs[name]) for name in names]
    took, begun = [], []
    for status, seconds, started, epochs, reused, saved in zip(statuses, *columns, strict=True):
        if status == COMPLETED and seconds is not None:
            # One read whole from the store took no time, and says nothing of those to come.
            if not (reused and reused == epochs and seconds < (saved or 0)):
                took.append(seconds)
        elif status == RUNNING and started:
            begun.append(_age(started))
    if not running:
        return "nothing is running" if waiting else ""
    if not took:
        trained = "that trains " if COMPLETED in statuses else ""
        return f"time left not known until a run {trained}has completed"
    mean = sum(took) / len(took)
    left = (sum(max(0.0, mean - age) for age in begun) + mean * waiting) / running
    return (
        f"about {duration(left)} left if the others take what the {len(took)} completed took "
        f"({duration(mean)} each), {running} at a time"
    )


def _age(moment: Any) -> float:
    return max(0.0, (datetime.now(UTC) - moment).total_seconds())


# ---------------------------------------------------------------------------------------------
# The command line


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Gives its exit status: 1 if any run failed, 2 for a folder that is not there."""
    parser = argparse.ArgumentParser(
        prog="python -m proglayer.results",
        description="Print the table of every run in sweeps or single runs, finished or not.",
        epilog="Exit status: 0; 1 if a run failed, was lost or left a record that cannot be read; "
        "2 if a folder is not there or cannot be written.",
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a sweep, a run, or a pile")
    parser.add_argument(
        "--all", action="store_true", help=f"show every run, also of more than {MOST_ROWS}"
    )
    parser.add_argument("--csv", metavar="DIR", help="also write the tables as CSV into DIR")
    parser.add_argument("--parquet", metavar="DIR", help="also write them as Parquet into DIR")
    parser.add_argument("--watch", action="store_true", help="follow until all runs have ended")
    parser.add_argument(
        "--every", metavar="SECONDS", type=float, default=5.0, help="how often --watch looks (5)"
    )
    options = parser.parse_args(arguments)
    if not options.every > 0:
        parser.error("--every must be more than 0 seconds")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Better a question mark for an arrow than no table where the locale knows only ASCII.
            stream.reconfigure(errors="replace")
    out = console()
    try:
        if options.watch:
            results = watch(options.folders, options.every, out)
        else:
            results = load(*options.folders)
        _print_results(results, out, whole=options.all)
        if options.csv:
            results.to_csv(options.csv)
        if options.parquet:
            results.to_parquet(options.parquet)
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        where = f"{error.filename}: {error.strerror}" if error.strerror else str(error)
        print(f"error: {where}", file=sys.stderr)
        return 2
    return 1 if results.failures else 0
