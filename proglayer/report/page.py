"""The report of a study: verdicts, pictures and tables of any runs, as one page.

`python -m proglayer.report FOLDER... -o report/` writes `index.html` (self-contained), `figures/`
(SVG) and `tables/` (CSV). Nothing in it depends on when it was written: equal runs give equal
files. Here objects are put together; the layout and the sentences are in `page.html.jinja`, what
several pages and commands say in `proglayer.report.words`.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shlex
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from proglayer import files
from proglayer.console import counted
from proglayer.errors import ConfigError, printable
from proglayer.report import arms, comparisons, measures, pictures, sequential, tables, words
from proglayer.report.arms import MARGIN, Frame
from proglayer.report.comparisons import Comparison
from proglayer.report.pictures import Picture
from proglayer.report.study import Condition, Study, judge_study
from proglayer.report.words import variant_name
from proglayer.results.columns import plain_values
from proglayer.results.read import Results, load, write_csv
from proglayer.results.show import listed, ranges
from proglayer.run.record import RecordError, read_sweep
from proglayer.table import Table

PAGE = "index.html"
FIGURES, TABLES = "figures", "tables"
# A page shows so many: the others are in the tables.
MOST_VARIANTS = 12
MOST_JUDGED = 12
MOST_COMMANDS = 20


def write_report(
    folders: Sequence[str | Path], out: str | Path, margin: float | None = None
) -> Path:
    """Read the runs in `folders` and write their report into the folder `out`.

    Args:
        folders: sweeps, runs, or piles of both; see `proglayer.results.load`.
        margin: differences within so many points count as none; None for MARGIN, or that of a
            sequential study.

    Returns:
        the page's path.

    Raises:
        OSError: for a folder that is not there, or that cannot be written.
        ConfigError: if the folders hold no run at all, or for another margin than a study's own.
        RecordError: for interim looks at a study that cannot be read.
    """
    results = load(*folders)
    if results.runs.empty and not results.failures:
        raise ConfigError(f"no run in {', '.join(map(str, folders))}")
    return report_of(results, out, margin)


def report_of(results: Results, out: str | Path, margin: float | None = None) -> Path:
    """Write the report of runs that were read; see `write_report`."""
    looks = sequential.looks_of(results)
    if looks and margin and margin != looks.margin:
        raise ConfigError(f"--margin={margin:g}: the study's is {looks.margin:g} points")
    out, margin = Path(out), looks.margin if looks else margin or MARGIN
    study = judge_study(results, margin, looks)
    frames = _frames(study)
    drawn = _pictures(study)
    page = _render(study, _tables(study, frames), drawn)
    for folder in (out, out / FIGURES, out / TABLES):
        folder.mkdir(parents=True, exist_ok=True)
    for name, frame in frames.items():
        write_csv(frame, out / TABLES / f"{name}.csv")
    for picture in (picture for several in drawn.values() for picture in several):
        files.write_atomically(out / FIGURES / f"{picture.name}.svg", picture.svg.encode())
    files.write_atomically(out / PAGE, page.encode())
    return out / PAGE


# --- tables ---------------------------------------------------------------------------------------


def _frames(study: Study) -> dict[str, Frame]:
    """Return every table as it is written: by the name of its file."""
    results = study.results
    frames: dict[str, Frame] = {
        name: getattr(results, name) for name in ("runs", "phases", "epochs", "exits", "left_out")
    }
    described, by_seed = comparisons.as_frames([*study.claims, *study.others])
    frames |= {"comparisons": described, "differences": by_seed}
    parts = {
        own.name: {
            **own.tables,
            "arms": tables.arms(own.asked),
            "phase_by_phase": tables.phases(own.runs, results.phases),
        }
        for own in study.conditions
    }
    for name in next(iter(parts.values()), ()):
        both = pd.concat({own: made[name] for own, made in parts.items()}, names=["condition"])
        frames[name] = both.reset_index("condition")
    return {name: frame for name, frame in frames.items() if len(frame)}


def _tables(study: Study, frames: dict[str, Frame]) -> dict[str, Table]:
    """Return the tables that the page shows: those that have a row."""
    made: dict[str, Any] = {
        "arms": tables.arms_table,
        "phase_by_phase": tables.phases_table,
        "growth": tables.growth_table,
        "ledger": tables.spent_table,
        "speed_up": tables.speed_up_table,
    }
    shown = {name: make(frames[name]) for name, make in made.items() if name in frames}
    for name, title, family in (
        ("claims", "The claims", [one for one in study.claims if one.pairs]),
        ("others", "The other comparisons", study.others),
    ):
        if family:
            shown[name] = tables.comparisons_table(title, family)
    ended = tables.ended_table(study.results.runs, study.results.left_out)
    return shown | ({"ended": ended} if ended.records else {})


# --- pictures -------------------------------------------------------------------------------------


def _pictures(study: Study) -> dict[str, list[Picture]]:
    """Draw the pictures of each section of the page."""
    drawn = {
        name: _verdicts(study, name, [one for one in family if one.tested][:MOST_JUDGED])
        for name, family in (("claims", study.claims), ("others", study.others))
    }
    for condition in study.conditions:
        for name, one in _of_condition(study, condition).items():
            drawn.setdefault(name, []).extend(one)
    return drawn


def _verdicts(study: Study, name: str, made: Sequence[Comparison]) -> list[Picture]:
    """Draw the differences that the verdicts of the first screen rest on."""
    rows = [
        {
            "label": ", ".join(filter(None, (words.label(one), words.budget_text(one))))
            + _on(study, one.condition),
            "model": one.model,
            "mean": one.accuracy.mean,
            "low": one.judged.interval.low,
            "high": one.judged.interval.high,
            "seeds": one.accuracy.differences.tolist(),
        }
        for one in made
    ]
    texts = " or ".join(dict.fromkeys(one.text for one in made))
    title, unit = "Differences in accuracy", f"points of {texts} accuracy (right: better)"
    return [pictures.forest(name, title, rows, study.margin, unit)] if rows else []


def _on(study: Study, condition: str) -> str:
    return f", on {condition}" if len(study.conditions) > 1 else ""


def _of_condition(study: Study, condition: Condition) -> dict[str, list[Picture]]:
    """Draw the moments of growth, curves and exits in one condition."""
    slug = f"-{condition.number + 1}" if condition.number else ""
    on = _on(study, condition.name)
    shown = list(dict.fromkeys(condition.runs["variant"]))[:MOST_VARIANTS]
    drawn: dict[str, list[Picture]] = {"exits": pictures.exits(condition.worth, slug)}
    timings = measures.timings(condition.runs, condition.curves)
    drawn["timing"] = [pictures.timing(f"timing{slug}-{n}", one) for n, one in enumerate(timings)]
    names: Frame = study.results.phases[["run", "phase", "name"]]
    names = names.rename(columns={"name": "phase_name"})
    curves = condition.curves.merge(names.astype({"phase_name": object}), on=["run", "phase"])
    losses = curves["validation_loss"].astype("float64")
    known = losses[np.isfinite(losses)]
    drawn["curves"] = [
        pictures.learning_curve(
            f"curve{slug}-{number}",
            variant_name(variant) + on,
            curves[curves["variant"] == variant],
            (float(known.min()), float(known.max())),
        )
        for number, variant in enumerate(shown if len(known) else ())
    ]
    return drawn


# --- the page -------------------------------------------------------------------------------------


def _render(study: Study, shown: dict[str, Table], drawn: dict[str, list[Picture]]) -> str:
    """Render one page that needs and asks for nothing else: style, script and figures inside."""
    style, script = (
        resources.files("proglayer.report").joinpath(name).read_text(encoding="utf-8")
        for name in ("page.css", "page.js")
    )
    commands = _commands(study.results.runs)
    return _template().render(
        study=study,
        tables=shown,
        pictures=drawn,
        groups=_groups(study),
        seeds=ranges(study.arms.runs["seed"]),
        joined=study.looks is None and sequential.has_looks(study.results),
        exits=[
            text
            for own in study.conditions
            for texts in (words.needed_texts, words.left_out_texts)
            for text in texts(own.worth)[:MOST_JUDGED]
        ],
        commands=commands[:MOST_COMMANDS],
        more_commands=len(commands) - MOST_COMMANDS,
        style=Markup(style),
        script=Markup(script),
    )


def _groups(study: Study) -> list[dict[str, Any]]:
    """Return what the first screen answers: questions, each with its comparisons.

    A study without the original is about its own comparisons. Claims that nothing was run for come
    last, with what it takes.
    """
    claims, others = ([one for one in f if one.tested] for f in (study.claims, study.others))
    original = arms.ORIGINAL in study.arms.runs["experiment"].to_numpy()
    groups = []
    if others and not (claims and original):
        shown = [one for one in study.others if one.tested or one.not_made][:MOST_JUDGED]
        groups.append({"name": "others", "made": others, "questions": _questions(shown)})
    of_claims = {"name": "claims", "made": claims, "questions": _questions(study.claims)}
    return [*groups, of_claims]


def _questions(made: Sequence[Comparison]) -> list[list[Comparison]]:
    """Put comparisons that answer one question together."""

    def question(one: Comparison) -> tuple[str, ...]:
        which = (str(one.claim),) if one.claim else (one.a, one.b, str(one.kind))
        return (*which, one.condition)

    groups: dict[tuple[str, ...], list[Comparison]] = {}
    for one in made:
        groups.setdefault(question(one), []).append(one)
    return list(groups.values())


@functools.cache
def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("proglayer.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable(str(value)),
    )
    environment.filters |= {"counted": counted, "listed": listed}
    environment.filters |= {"anchor": lambda text: re.sub(r"[^a-z0-9]+", "-", text.lower())}
    environment.globals |= {"words": words, "arms": arms, "measures": measures}
    environment.globals["is_single"] = lambda arm: len(arm) == 1
    return environment.get_template("page.html.jinja")


def _commands(runs: Frame) -> list[str]:
    """Return the command of each sweep, and of each run that was none of a sweep's."""
    of_sweep = functools.cache(_sweep_command)
    columns = [plain_values(runs[name]) for name in ("sweep", "folder", "overrides")]
    commands = [
        (sweep and of_sweep(Path(folder).parent)) or f"python train.py {overrides or ''}".strip()
        for sweep, folder, overrides in zip(*columns, strict=True)
    ]
    return list(dict.fromkeys(commands))


def _sweep_command(folder: Path) -> str | None:
    """Return what a sweep was started with; None where that cannot be read."""
    with contextlib.suppress(RecordError):
        return shlex.join(read_sweep(folder).command) or None
    return None
