"""The report's tables: each is a list of (title, kind, cell), where a cell is made of a row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import pandas as pd

from proglayer.report import ledger, stats, study
from proglayer.report.page import Cell, Table
from proglayer.report.pictures import engineering, model_name
from proglayer.report.study import DEEP, METRICS, STANDARD, Frame
from proglayer.results.formatting import duration, listed, number_text, pair, ranges, text_of
from proglayer.results.frames import plain_values

ALPHA = 0.05
Row = dict[str, Any]
Columns = Sequence[tuple[str, str, Callable[[Row], Cell | str]]]


def _table(title: str, rows: Any, columns: Columns, note: str = "", **how: Any) -> Table:
    """A table of these rows (a frame, or dictionaries): a line each, a cell for each column."""
    rows = rows.to_dict("records") if isinstance(rows, pd.DataFrame) else rows
    cells = [[cell(row) for _, _, cell in columns] for row in rows]
    return Table(title, [(title, kind) for title, kind, _ in columns], cells, note, **how)


def _text(name: str) -> Callable[[Row], str]:
    return lambda row: row[name]


def _number(name: str, form: str) -> Callable[[Row], Cell]:
    return lambda row: Cell(number_text(row[name], form), _sort(row[name]))


def _duration(name: str) -> Callable[[Row], Cell]:
    return lambda row: Cell(duration(row[name]), _sort(row[name]))


def _large(name: str) -> Callable[[Row], Cell]:
    return lambda row: Cell("" if pd.isna(row[name]) else engineering(row[name]), _sort(row[name]))


def _model(row: Row) -> str:
    return model_name(text_of(row["model"]))


ARM: Columns = (("Variant", "name", _text("variant")), ("Model", "name", _model))
COMPUTE: Columns = (
    ("Tokens", "figure", _large("tokens")),
    ("FLOP with head", "figure", _large("flops")),
    ("FLOP without", "figure", _large("flops_without_head")),
)

# --- the founding experiment's --------------------------------------------------------------------

PHASE_HEADS = ("Phase", "Layers", "Best Acc", "Best PPL", "Time", "Best Epoch")
MODEL_HEADS = ("Figure", "Standard", "Deep supervision", "Difference")


def _founding_table(
    title: str, heads: Sequence[str], rows: list[list[str]], note: str = ""
) -> Table:
    """A table in the form that the founding experiment gave it; its last row may sum up."""
    columns = [(head, "figure" if number else "name") for number, head in enumerate(heads)]
    strong = [len(rows) - 1] if rows and rows[-1][0] == "Change" else []
    return Table(title, columns, rows, note, strong=strong)


def phase_table(title: str, runs: Frame, phases: Frame, left_out: str = "") -> Table:
    """`Phase | Layers | Best Acc | Best PPL | Time | Best Epoch` of an arm, and the change row.

    Args:
        left_out: what became of the seeds of this arm that did not complete.
    """
    own: Frame = phases[phases["run"].isin(runs["run"])]
    rows = [
        [
            listed(unique(part["name"]), 2),
            listed(unique(part["layers"]), 3),
            _mean(part["validation_accuracy_percent"], ".2f", " %"),
            _mean(part["validation_perplexity"], ",.2f"),
            _mean_seconds(part["train_seconds"] + part["evaluation_seconds"]),
            ranges(part["best_epoch"]),
        ]
        for _, part in own.groupby("phase", sort=True)
    ]
    if len(rows) > 1:
        points = _mean(runs[study.ACCURACY.change], "+.2f", " points")
        percent = _mean(runs[study.PERPLEXITY.change], "+.2f", " %")
        rows.append(["Change", "", points, percent, _mean_seconds(runs["seconds"]), ""])
    count = len(runs)
    note = "" if count == 1 else f"Mean ± standard deviation over {count} seeds."
    if left_out:
        note = f"{note or 'One seed.'} Left out: {left_out}."
    return _founding_table(title, PHASE_HEADS, rows, note)


def published_table(model: str) -> Table:
    """The published run of this model, in the same form."""
    published = study.founding()["published"][model]
    rows = [
        [
            phase["name"],
            str(phase["layers"]),
            f"{phase['accuracy_percent']:.2f} %",
            f"{phase['perplexity']:,.2f}",
            f"{phase['seconds']:.2f} s",
            str(phase["best_epoch"]),
        ]
        for phase in published["phases"]
    ]
    change = published["change"]
    points, percent = f"{change['points']:+.2f} points", f"{change['percent']:+.2f} %"
    rows.append(["Change", "", points, percent, f"{change['seconds']:.2f} s", ""])
    return _founding_table(f"Published, {model_name(model)}", PHASE_HEADS, rows, "One seed.")


# Title, column of `Arms.runs`, form, unit of the values and of their difference.
MODEL_ROWS = (
    ("Final accuracy", "last_accuracy_percent", ".2f", " %", " points"),
    ("Final perplexity", "last_perplexity", ",.2f", "", ""),
    ("Change in accuracy", study.ACCURACY.change, "+.2f", " points", " points"),
    ("Change in perplexity", study.PERPLEXITY.change, "+.2f", " %", " %"),
    ("Time", "seconds", ",.1f", " s", " s"),
)


def _models_table(title: str, standard: Frame, deep: Frame, note: str) -> Table:
    rows = []
    for name, column, form, unit, unit_of_difference in MODEL_ROWS:
        a, b = (arm[column].astype("float64") for arm in (standard, deep))
        if a.notna().any() and b.notna().any():
            signed = form if form.startswith("+") else f"+{form}"
            difference = _mean((b - a).dropna(), signed, unit_of_difference)
            rows.append([name, _mean(a, form, unit), _mean(b, form, unit), difference])
    return _founding_table(title, MODEL_HEADS, rows, note)


def model_table(variant: str, runs: Frame) -> Table:
    """The comparison of the models in one variant."""
    standard, deep = (runs[runs["model"] == model].set_index("seed") for model in (STANDARD, DEEP))
    note = "Difference: deep supervision − Standard, within seeds."
    return _models_table(f"{variant}, comparison of models", standard, deep, note)


def published_models_table() -> Table:
    """The published comparison of the models."""
    arms = []
    for model in (STANDARD, DEEP):
        published = study.founding()["published"][model]
        last, change = published["phases"][-1], published["change"]
        values = (last["accuracy_percent"], last["perplexity"], *change.values())
        columns = [column for _, column, *_ in MODEL_ROWS]
        arms.append(pd.DataFrame([dict(zip(columns, values, strict=True))]))
    return _models_table("Published, comparison of models", arms[0], arms[1], "One seed.")


# --- changes and differences ----------------------------------------------------------------------


def changes_table(changes: Frame, shown: Sequence[str]) -> Table:
    """Each arm's change from the first phase to the last, in every metric."""
    rows = []
    for (variant, model), arm in changes.groupby(["variant", "model"], sort=False):
        if variant in shown:
            most = arm.loc[arm["n"].idxmax(), ["n", "dropped"]]
            rows.append(
                {"variant": variant, "model": model, **most}
                | dict(arm.set_index("metric").iterrows())
            )

    def cell(metric: study.Metric) -> Callable[[Row], Cell]:
        return lambda row: Cell(
            _interval(row[metric.name], metric.decimals), _sort(row[metric.name]["mean"])
        )

    columns = [
        *ARM,
        ("Seeds", "figure", lambda row: _of_all(row["n"], row["dropped"])),
        *((f"{m.name.capitalize()}, {m.unit}", "figure", cell(m)) for m in METRICS),
    ]
    note = (
        "Mean ± standard deviation over the seeds that completed, and the 95 % interval of the "
        "mean."
    )
    return _table("Change from the first phase to the last", rows, columns, note, sortable=True)


def comparisons_table(
    title: str,
    judged: Frame,
    metric: study.Metric,
    labels: dict[str, str],
    shown: Iterable[str],
) -> Table:
    """Judged comparisons of the variants `shown`."""
    family = max(1, int(judged["p_adjusted"].notna().sum()))
    judged = judged[judged[next(iter(labels))].isin(list(shown))]
    form, signed = f".{metric.decimals}f", f"+.{metric.decimals}f"

    def label(name: str) -> Callable[[Row], str]:
        return _model if name == "model" else _text(name)

    def interval(row: Row) -> Cell:
        known = math.isfinite(row["low"])
        text = f"{row['low']:{signed}} to {row['high']:{signed}}" if known else ""
        return Cell(text, _sort(row["low"]))

    def p(name: str) -> Callable[[Row], Cell]:
        return lambda row: Cell(
            "< 0.001" if row[name] < 0.001 else number_text(row[name], ".3f"), _sort(row[name])
        )

    columns: list[Any] = [(title, "name", label(name)) for name, title in labels.items()]
    columns += [
        ("Difference", "figure", _number("mean", signed)),
        ("95 % interval", "figure", interval),
        # The margin is told below.
        ("Verdict", "name", lambda row: row["verdict"].split()[0]),
        ("Seeds", "figure", lambda row: _of_all(row["n"], row["dropped"])),
        *([("Left out", "name", _text("left_out"))] if (judged["dropped"] > 0).any() else []),
        ("p, Holm", "figure", p("p_adjusted")),
        ("Sign-flip p", "figure screen", p("sign_flip_p")),
        ("Equivalence p, Holm", "figure screen", p("equivalence_p_adjusted")),
        ("Effect size", "figure screen", _number("effect_size", "+.2f")),
        ("Could show", "figure", _number("could_show", form)),
        ("Seeds to decide", "figure", _seeds_needed),
    ]
    margin = judged["margin"].iloc[0] if len(judged) else math.nan
    note = (
        f"One family of {family}. Equivalent: within the margin of ±{margin:.3g} {metric.unit}. "
        "Could show: the smallest true difference that this many seeds find with a power of 80 %. "
        "Seeds to decide: were the observed mean and spread the true ones. Both are at the level "
        f"{ALPHA:g} / {family}, the strictest of Holm's steps."
    )
    return _table(title, judged, columns, note, sortable=True)


def _of_all(seeds: int, left_out: int) -> Cell:
    return Cell(f"{seeds} of {seeds + left_out}" if left_out else str(seeds), seeds)


def _seeds_needed(row: Row) -> Cell:
    needed = row["seeds_needed"]
    if row["verdict"] != stats.Outcome.undecided:
        return Cell("decided", row["n"])
    if math.isnan(needed):
        return Cell("not known", "")
    return Cell("none would" if math.isinf(needed) else f"{needed:,.0f}", _sort(needed))


# --- compute --------------------------------------------------------------------------------------


def spent_table(spent: Frame) -> Table:
    """What every arm spent, and the loss that it ended with."""
    columns = [
        *ARM,
        ("Seeds", "figure", lambda row: str(row["seeds"])),
        ("Epochs", "figure", _number("epochs", ".3g")),
        *COMPUTE,
        ("Training", "figure", _duration("train_seconds")),
        ("Evaluation", "figure screen", _duration("evaluation_seconds")),
        ("Saved by reuse", "figure screen", _duration("seconds_saved")),
        ("Final loss", "figure", _number("loss", ".4f")),
    ]
    return _table("What every arm spent", spent, columns, sortable=True)


def target_table(reached: Frame, reference: str) -> Table:
    """The compute at which every arm reached its target loss."""
    columns = [
        *ARM,
        ("Target loss", "figure", _number("target", ".4f")),
        ("Reached by", "figure", lambda row: _share(row["reached"], row["seeds"])),
        *COMPUTE,
        ("Time", "figure", _duration("seconds")),
    ]
    note = (
        f"The target is a loss that every seed of {reference} reached. Means over the seeds that "
        "reached it, interpolated between epochs."
    )
    title = "Compute and time to reach a target loss"
    return _table(title, reached, columns, note, sortable=True)


def speed_up_table(gains: Frame) -> Table:
    """The speed-up of growing, in each measure of compute."""
    rows = [
        {"variant": variant, "model": model, "n": arm["n"].max(), "seeds": arm["seeds"].max()}
        | dict(arm.set_index("measure").iterrows())
        for (variant, model), arm in gains.groupby(["variant", "model"], sort=False)
    ]

    def cell(measure: ledger.Measure) -> Callable[[Row], Cell]:
        return lambda row: Cell(
            _interval(row[measure.column], 0, 100, " %"), _sort(row[measure.column]["mean"])
        )

    columns = [
        *ARM,
        ("Reached by", "figure", lambda row: _share(row["n"], row["seeds"])),
        ("In tokens", "figure", cell(ledger.TOKENS)),
        ("In FLOP with head", "figure", cell(ledger.FLOPS)),
        ("In FLOP without", "figure", cell(ledger.BODY)),
        ("In time", "figure", cell(ledger.SECONDS)),
    ]
    note = (
        "Compute from scratch / compute of growing, all phases, to the lowest loss that the run "
        "from scratch of the same seed reached, − 1 (Du et al. 2024): +50 % means that from "
        "scratch takes half as much again, minus that growing was slower. Mean ± standard "
        "deviation and 95 % interval over the seeds that reached that loss; where some did not, "
        "the mean flatters."
    )
    return _table("Speed-up of growing against from scratch", rows, columns, note, sortable=True)


def _share(part: int, whole: int) -> Cell:
    return Cell(f"{part} of {whole}", part / max(1, whole))


def parameters_table(trained: Frame) -> Table:
    """What trains in each phase; see `pictures.parameters` for the columns."""
    own = trained["layers"] + trained["embedding"] + trained["head"]
    columns = [
        ("Variant and phase", "name", _text("label")),
        *(
            (name.capitalize(), "figure", _number(name, ",.0f"))
            for name in ("layers", "embedding", "head", "trained", "total")
        ),
        ("Share", "figure", _number("share", ".1%")),
    ]
    rows = trained.assign(trained=own, share=own / trained["total"])
    return _table("Trained parameters", rows, columns)


# --- runs -----------------------------------------------------------------------------------------


def runs_table(runs: Frame, of: int, variants: Mapping[str, str]) -> Table:
    """A row for each of `runs`, the first of so many; `variants` names the arms of some."""
    changed = runs["phases"].astype("float64") > 1
    runs = runs.assign(
        variant=[
            variants.get(run) or text_of(name)
            for run, name in zip(runs["run"], runs["experiment"], strict=True)
        ],
        accuracy_points=runs["accuracy_points"].where(changed),
        perplexity_percent=runs["perplexity_percent"].where(changed),
    )
    repeated = " (repeated)"
    columns = [
        ("Run", "name", _text("run")),
        *ARM,
        ("Seed", "figure", lambda row: number_text(row["seed"], "d")),
        (
            "Status",
            "name",
            lambda row: row["status"] + repeated * int(pd.notna(row["duplicate_of"])),
        ),
        ("Layers", "figure", lambda row: pair(row, "layers", "d")),
        ("Accuracy %", "figure", _number("last_accuracy_percent", ".2f")),
        ("Change, points", "figure", _number("accuracy_points", "+.2f")),
        ("Perplexity", "figure", _number("last_perplexity", ",.2f")),
        ("Change, %", "figure", _number("perplexity_percent", "+.2f")),
        ("Epochs", "figure", lambda row: number_text(row["epochs"], "d")),
        ("Time", "figure", _duration("seconds")),
    ]
    note = "All settings and figures are in tables/runs.csv, every epoch in tables/epochs.csv."
    if of > len(runs):
        note = f"The first {len(runs):,} of {of:,} runs. {note}"
    return _table("Every run (click a head to sort)", runs, columns, note, sortable=True)


def versions_table(runs: Frame) -> Table:
    """The versions, machines, texts and seeds of these runs."""
    columns = {
        "proglayer": "proglayer",
        "Python": "python",
        "torch": "torch",
        "Platform": "platform",
        "Device": "device_name",
        "Threads": "threads",
        "Commit": "git_commit",
        "Working tree changed": "git_changed",
        "Corpus": "corpus",
        "Corpus fingerprint": "corpus_fingerprint",
        "Vocabulary": "vocab_size",
        "Validation tokens": "validation_tokens",
    }
    rows = [[title, listed(unique(runs[column]), 6)] for title, column in columns.items()]
    rows.append(["Seeds", ranges(runs["seed"])])
    heads = [("What", "name"), ("Values in these runs", "prose")]
    return Table("With what it ran", heads, [row for row in rows if row[1]])


# --- numbers --------------------------------------------------------------------------------------


def _mean(values: Any, form: str, unit: str = "") -> str:
    """Mean ± standard deviation, or the value where there is one."""
    known = _known(values)
    if not len(known):
        return ""
    spread = f" ± {known.std(ddof=1):{form.replace('+', '')}}" if len(known) > 1 else ""
    return f"{known.mean():{form}}{spread}{unit}"


def _mean_seconds(values: Any) -> str:
    known = _known(values)
    if len(known) and known.mean() >= 100:
        return duration(known.mean())
    return _mean(known, ".1f", " s")


def _known(values: Any) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    return array[np.isfinite(array)]


def _interval(summary: Any, decimals: int, scale: float = 1, unit: str = "") -> str:
    """`+0.1 ± 0.2 (-0.1 to +0.3)`, as far as it is known."""
    if not math.isfinite(summary["mean"]):
        return "none"
    mean, sd, low, high = (scale * summary[name] for name in ("mean", "sd", "low", "high"))
    if not math.isfinite(sd):
        return f"{mean:+.{decimals}f}{unit}"
    interval = f"({low:+.{decimals}f} to {high:+.{decimals}f}{unit})"
    return f"{mean:+.{decimals}f} ± {sd:.{decimals}f} {interval}"


def _sort(value: Any) -> float | str:
    return "" if pd.isna(value) else float(value)


def unique(values: Frame) -> list[str]:
    """The values that there are, as text."""

    def text(value: Any) -> str:
        if isinstance(value, bool | np.bool_):
            return "yes" if value else "no"
        return f"{value:,}" if isinstance(value, Integral) else str(value)

    return [text(v) for v in plain_values(values.drop_duplicates()) if v is not None]
