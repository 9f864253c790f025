"""Results for people: the table of a sweep."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.text import Text

from proglayer.console import counted, one_line
from proglayer.results.read import Results
from proglayer.results.variants import what_varied
from proglayer.run.record import RunState
from proglayer.table import Column, Table, is_missing

if TYPE_CHECKING:
    from rich.console import Console

STYLE = {
    RunState.completed: "green",
    **dict.fromkeys((RunState.failed, RunState.lost), "bold red"),
    **dict.fromkeys((RunState.interrupted, RunState.preempted), "yellow"),
    RunState.running: "cyan",
}
# Of sweeps that Hydra named, the token is enough to tell them apart.
STAMP = re.compile(r"(?<![^/])[\d-]{10}_[\d-]{8}_(?=[0-9a-f]{6}/)")


# --- the table of a sweep -------------------------------------------------------------------------


def _style(status: str) -> str:
    return STYLE.get(RunState(status), "dim")


def print_results(results: Results, out: Console) -> None:
    """Print the table of the runs, why some failed, what was left out, and a line of totals."""
    if len(results.runs):
        out.print(summary_table(results).rich(out.width))
    lines = [
        Text.assemble((status, _style(status)), f" {one_line(run)}: {one_line(reason)}")
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

    several = len(results.runs[["tokenizer", "vocab_size"]].dropna(how="all").drop_duplicates()) > 1
    # Losses and perplexities of different tokenizers do not compare.
    bits = [figure("validation_bits_per_byte", "bits/byte", 2, ".3f")] if several else []
    columns = (
        Column("run", "job", lambda run: STAMP.sub("", run), kind="prose"),
        *(Column(f"varied {title}", title, kind="prose", minor=1) for title in varied),
        Column("status", "status", style=lambda row: _style(row["status"])),
        figure("layers", "layers", 6, "d"),
        Column(
            "last_validation_perplexity",
            "perplexity",
            of_row=lambda row: row["progress"] or pair(row, "validation_perplexity", ",.2f"),
            kind="figure",
            minor=3,
        ),
        figure("validation_accuracy_percent", "accuracy %", 4, ".2f"),
        *bits,
        Column("validation_accuracy_change_points", "change, points", "+.2f", minor=7),
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
    return Table(rows, shown, note="figures are of the validation text")


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
    parts = [f"{counts[status]} {status}" for status in RunState if status in counts]
    repeats = results.runs["duplicate_of"].notna().tolist().count(True)
    parts += [f"{repeats} repeat another's settings and seed"] if repeats else []
    return counted(len(results.runs), "run") + (f": {', '.join(parts)}" if parts else "")


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
