"""The report of a study: verdicts, tables and pictures of any runs, as one page and as Markdown.

`python -m proglayer.report FOLDER... -o report/` writes `index.html` (self-contained), `report.md`,
`figures/` (SVG and PNG) and `tables/` (CSV). Nothing in it depends on when it was written: equal
runs give equal files. What is above the fold is in `proglayer.report.first_screen`, what is below
in `proglayer.report.sections`.
"""

from __future__ import annotations

import functools
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from proglayer import files
from proglayer.console import counted
from proglayer.errors import ConfigError
from proglayer.report import comparisons, page, sequential
from proglayer.report.first_screen import first_screen
from proglayer.report.judged import Judged, judge
from proglayer.report.page import Block
from proglayer.report.pictures import Gallery
from proglayer.report.sections import sections
from proglayer.report.study import Frame, Margins
from proglayer.report.tables import runs_table, tokenizers_table, versions_table
from proglayer.report.trials import study_files, trials_section
from proglayer.results import Results, load, plain_values, write_csv
from proglayer.results.formatting import listed, ranges, text_of
from proglayer.store.reading import read_yaml
from proglayer.store.record import RunState

PAGE = "index.html"
MARKDOWN = "report.md"
TITLE = "Study report"
FIGURES_IN = "figures"
TABLES_IN = "tables"
# The overrides of Hydra's that say which jobs a sweep has.
OF_SWEEPER = ("hydra/sweeper", "hydra.sweeper")
# Settings of Hydra that name a function, which is then called.
NAMES_CODE = ("_target_", "custom_search_space")
# Whoever names the folder of a report.
NAMED_BY = "-o or hydra.run.dir"

# What a page can hold and a reader can read; the rest is counted, and whole in the tables.
MOST_RUNS = 500
MOST_ENDED = 100
MOST_TRACEBACKS = 10
MOST_COMMANDS = 20
LONGEST_TRACEBACK = 4_000


def write_report(
    folders: Sequence[str | Path],
    out: str | Path,
    margins: Margins | None = None,
    *,
    png: bool = True,
) -> Path:
    """Read the runs in `folders` and write their report into the folder `out`.

    Args:
        folders: sweeps, runs, or piles of both; see `proglayer.results.load`.
        margins: differences within them count as none; None for the usual ones, or those of a
            study that was looked at again and again.
        png: draw each figure as PNG, too. It takes long, and the page has no use of it.

    Returns:
        the page's path.

    Raises:
        OSError: for a folder that is not there, or that cannot be written.
        ConfigError: if the folders hold no run at all, or for another margin than a study's own.
        RecordError: for looks at a study that cannot be read.
    """
    results = load(*folders)
    if results.runs.empty and not results.failures:
        raise ConfigError(f"no run in {', '.join(map(str, folders))}")
    looks = sequential.looks_of(results)
    if looks and margins and margins.points != looks.margin:
        raise ConfigError(
            f"--margin={margins.points:g}: this study was looked at with a margin of "
            f"{looks.margin:g} points: leave that out, or give --margin={looks.margin:g}"
        )
    out, margins = Path(out), margins or (Margins(points=looks.margin) if looks else Margins())
    judged = judge(results, margins, looks)
    looks_before = [] if looks else _looks_before(judged.arms.runs, out)
    ours = _open_folder(out)
    blocks = _document(judged, Gallery(out / FIGURES_IN, ours, png), looks_before)
    lead = _lead(judged)
    _write_tables(judged, looks_before, out / TABLES_IN, ours)
    markdown = page.to_markdown(TITLE, lead, blocks).encode()
    files.write_over(out / MARKDOWN, markdown, ours, NAMED_BY)
    files.write_over(out / PAGE, page.to_html(TITLE, lead, blocks).encode(), ours, NAMED_BY)
    return out / PAGE


def _open_folder(out: Path) -> files.Ours:
    """Make a folder ready for a report, and give what knows the files of one there.

    It is a report's where the page is; a page that says so stands there until the report is done,
    which is written last. Raises NotOursError where other files have the names of a report's.
    """
    page = out / PAGE
    out.mkdir(parents=True, exist_ok=True)
    if not files.is_ours(page, _is_page):
        for name in (PAGE, MARKDOWN, FIGURES_IN, TABLES_IN):
            files.check_ours(out / name, lambda _: False, NAMED_BY)
    unfinished = f"<!DOCTYPE html>\n<title>{TITLE}</title>\n<p>It is being written.</p>\n"
    files.write_over(page, unfinished.encode(), _is_page, NAMED_BY)
    return lambda _: files.is_ours(page, _is_page)


def _is_page(path: Path) -> bool:
    with open(path, "rb") as file:
        return f"<title>{TITLE}</title>".encode() in file.read(8192)


def _looks_before(runs: Frame, out: Path) -> list[int]:
    """How many seeds earlier reports of a part of these runs had when more seeds were run.

    They are sought in `out` and in the folders of sweeps. Each knows of those before it.
    """
    here = runs.assign(place=runs["folder"].map(_place))
    found: set[int] = set()
    sweeps = {Path(folder).parent / "report" for folder in runs["folder"]}
    for tables in (report / TABLES_IN for report in {out, *sweeps}):
        try:
            seen: Frame = pd.read_csv(tables / "runs.csv", usecols=["folder", "status"], dtype=str)
            before = pd.read_csv(tables / "looks.csv")["seeds"]
        except (OSError, ValueError, KeyError):
            continue
        completed = seen["folder"][seen["status"] == RunState.completed].map(_place)
        here["before"] = here["place"].isin(completed)
        later = here["started"] > here.loc[here["before"], "ended"].max()
        here["added"] = later & ~here["place"].isin(seen["folder"].map(_place))
        arms = here.groupby(["condition", "variant", "model"])[["before", "added"]].sum()
        more = arms.loc[(arms["before"] > 1) & (arms["added"] > 0), "before"]
        found |= {*before, *more} if here["before"].any() else set()
    return sorted(map(int, found))


def _place(folder: str) -> str:
    """What a run's folder is called in its sweep's, from wherever the report is made."""
    return "/".join(Path(folder).parts[-2:])


def _write_tables(
    judged: Judged, looks_before: Sequence[int], folder: Path, ours: files.Ours
) -> None:
    """The frames of the results, and what was found in all conditions, as CSV."""
    judged.results.to_csv(folder, ours)
    found = pd.concat([judged.claims, judged.others], ignore_index=True)
    described, by_seed = comparisons.described(found)
    tables = {
        "comparisons": described,
        "differences": by_seed,
        "tokenizers": judged.tokenizers,
    }
    for name in judged.conditions[0].tables if judged.conditions else ():
        parts = {c.name: c.tables[name] for c in judged.conditions if len(c.tables[name])}
        if parts:
            tables[name] = pd.concat(parts, names=["condition"]).reset_index("condition")
    tables = {name: table for name, table in tables.items() if len(table)}
    for name, table in (tables | {"looks": pd.DataFrame({"seeds": looks_before})}).items():
        write_csv(table, folder / f"{name}.csv", ours)


# --- the document ---------------------------------------------------------------------------------


def _document(judged: Judged, gallery: Gallery, looks_before: Sequence[int]) -> list[Block]:
    results = judged.results
    blocks = first_screen(judged, gallery, looks_before)
    if between := _between_tokenizers(judged):
        blocks.append(page.Collapsible("Between tokenizers", between, section=True, open=True))
    blocks += sections(judged, gallery)
    in_sweeps = results.runs.loc[results.runs["sweep"].notna(), "folder"]
    if trials := trials_section(study_files(in_sweeps), gallery):
        blocks.append(page.Collapsible("Search", trials, section=True, open=True))
    arms = judged.arms.runs
    variants = dict(zip(arms["run"], arms["variant"], strict=True))
    every = runs_table(results.runs.head(MOST_RUNS), len(results.runs), variants)
    blocks.append(page.Collapsible("All runs", [every], section=True))
    if ended := _not_completed(results):
        blocks.append(page.Collapsible("What did not complete", ended, section=True, open=True))
    blocks.append(
        page.Collapsible("How to reproduce it", _reproduce(results, gallery), section=True)
    )
    return blocks


def _lead(judged: Judged) -> str:
    runs, arms = judged.results.runs, judged.arms.runs
    counts = Counter(runs["status"].tolist())
    how = ", ".join(f"{number:,} {status}" for status, number in sorted(counts.items()))
    parts = [f"{counted(len(runs), 'run')}{f' ({how})' if how else ''}"]
    if len(arms):
        of = f"{counted(arms['variant'].nunique(), 'variant')} and "
        parts.append(of + counted(arms["model"].nunique(), "model"))
        parts.append(f"seeds {ranges(arms['seed'])}")
        parts.append("on " + listed([c.name for c in judged.conditions], 3))
    return "; ".join(parts) + "."


def _between_tokenizers(judged: Judged) -> list[Block]:
    """Bits per byte of the texts that were cut by several tokenizers."""
    found = judged.tokenizers
    if found.empty:
        return []
    text = (
        "Loss, perplexity and accuracy are per token: between tokenizers they do not compare, and "
        "no comparison of theirs is made here. Bits per byte of the text do."
    )
    if found["mean"].isna().all():
        return [page.Paragraph(text), page.Paragraph("None of these runs recorded them.")]
    rest = page.left_to("tokenizers.csv", len(found) - MOST_RUNS, "arms")
    return [page.Paragraph(text), tokenizers_table(found.head(MOST_RUNS)), *rest]


def _not_completed(results: Results) -> list[Block]:
    """Runs that ended otherwise, and what could not be read, with reasons."""
    under_way = [RunState.completed, RunState.running, RunState.waiting]
    ended: Frame = results.runs[~results.runs["status"].isin(under_way)]
    # Failures first: an interruption cures itself.
    ended = ended.sort_values("status", kind="stable")
    kinds = {"run": "name", "status": "name", "overrides": "prose", "reason": "prose"}
    blocks = _listing("Runs that ended otherwise", kinds, ended, "runs")
    for row in ended.dropna(subset="traceback").head(MOST_TRACEBACKS).to_dict("records"):
        text = row["traceback"]
        text = text if len(text) <= LONGEST_TRACEBACK else f"...{text[-LONGEST_TRACEBACK:]}"
        blocks.append(page.Collapsible(f"Traceback of {row['run']}", [page.Code(text)]))
    kinds = {"folder": "name", "kind": "name", "reason": "prose"}
    title = "Left out, for it cannot be read"
    return blocks + _listing(title, kinds, results.left_out, "left_out")


def _listing(title: str, kinds: dict[str, str], frame: Frame, name: str) -> list[Block]:
    """The first rows of a frame of the results as a table of these columns."""
    if frame.empty:
        return []
    columns = [(column.capitalize(), kind) for column, kind in kinds.items()]
    rows = frame[list(kinds)].head(MOST_ENDED).map(text_of).to_numpy().tolist()
    table = page.Table(title, columns, rows, sortable=True)
    return [table, *page.left_to(f"{name}.csv", len(frame) - MOST_ENDED, "rows")]


def _reproduce(results: Results, gallery: Gallery) -> list[Block]:
    commands = _commands(results.runs)
    return [
        *([page.Code("\n".join(commands[:MOST_COMMANDS]))] if commands else []),
        *page.left_to("runs.csv", len(commands) - MOST_COMMANDS, "commands"),
        versions_table(results.runs),
        page.Bullets(
            [
                "The same seeds on the same kind of machine, with the same number of threads and "
                "the same versions, give the same figures bit for bit; elsewhere they differ by "
                "rounding.",
                "tables/ beside this page holds the runs, phases, epochs and exits, and every "
                "comparison made here, as CSV; figures/ holds the pictures as SVG"
                f"{' and PNG' if gallery.png else ''}.",
            ]
        ),
    ]


def _commands(runs: Frame) -> list[str]:
    """The command of each sweep, and of each run that was none of a sweep's."""
    of_sweep = functools.cache(_sweep_command)
    commands: dict[str, None] = {}
    columns = [plain_values(runs[name]) for name in ("sweep", "folder", "overrides")]
    for sweep, folder, overrides in zip(*columns, strict=True):
        command = of_sweep(Path(folder).parent) if sweep is not None else None
        words = shlex.join(filter(_only_sets, shlex.split(overrides or "")))
        commands[command or f"python train.py {words}".strip()] = None
    return list(commands)


def _sweep_command(folder: Path) -> str | None:
    """What a sweep was started with, as Hydra recorded it; None where that cannot be read."""
    try:
        given = read_yaml(folder / "multirun.yaml")["hydra"]["overrides"]
        of_hydra = map(str, given.get("hydra") or [])
        words = [*of_hydra, *map(str, given["task"])]
        return f"python train.py -m {shlex.join(filter(_only_sets, words))}"
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _only_sets(override: str) -> bool:
    """Whether an override sets what a run or a search does, and names no code to run: a folder may
    come from elsewhere, and its command is there to be pasted.
    """
    key = override.lstrip("+~").partition("=")[0]
    if override.startswith("-") or any(name in override for name in NAMES_CODE):
        return False
    return not key.startswith("hydra") or key.startswith(OF_SWEEPER)
