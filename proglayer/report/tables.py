"""The report's tables: from the study's frames to what a page shows, with figures in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import pandas as pd

from proglayer.report import ledger, stats, study
from proglayer.report.page import Cell, Column, Table
from proglayer.report.pictures import engineering, model_name
from proglayer.report.study import DEEP, FIGURES, STANDARD, Frame
from proglayer.results.formatting import duration, listed, number_text, pair, ranges, text_of
from proglayer.results.frames import plain_values

ALPHA = 0.05

# --- the founding experiment's --------------------------------------------------------------------

PHASE_COLUMNS = (
    Column("Phase", "name"),
    Column("Layers"),
    Column("Best Acc"),
    Column("Best PPL"),
    Column("Time"),
    Column("Best Epoch"),
)


def phase_table(title: str, runs: Frame, phases: Frame, left_out: str = "") -> Table:
    """`Phase | Layers | Best Acc | Best PPL | Time | Best Epoch` of an arm, and the change row.

    Args:
        left_out: what became of the seeds of this arm that did not complete.
    """
    own: Frame = phases[phases["run"].isin(runs["run"])]
    rows = []
    for _, part in own.groupby("phase", sort=True):
        seconds = part["train_seconds"] + part["evaluation_seconds"]
        rows.append(
            [
                listed(unique(part["name"]), 2),
                listed(unique(part["layers"]), 3),
                _mean(part["validation_accuracy_percent"], ".2f", " %"),
                _mean(part["validation_perplexity"], ",.2f"),
                _mean_seconds(seconds),
                ranges(part["best_epoch"]),
            ]
        )
    strong = []
    if len(rows) > 1:
        strong = [len(rows)]
        rows.append(
            [
                "Change",
                "",
                _mean(runs[study.ACCURACY.change], "+.2f", " points"),
                _mean(runs[study.PERPLEXITY.change], "+.2f", " %"),
                _mean_seconds(runs["seconds"]),
                "",
            ]
        )
    count = len(runs)
    note = "" if count == 1 else f"Mean ± standard deviation over {count} seeds."
    if left_out:
        note = f"{note or 'One seed.'} Left out: {left_out}."
    return Table(title, PHASE_COLUMNS, rows, note, strong=strong)


def published_table(model: str) -> Table:
    first, last = study.PUBLISHED[model]
    rows = [
        [
            phase.name,
            str(phase.layers),
            f"{phase.accuracy_percent:.2f} %",
            f"{phase.perplexity:,.2f}",
            f"{phase.seconds:.2f} s",
            str(phase.best_epoch),
        ]
        for phase in (first, last)
    ]
    points, percent, seconds = study.PUBLISHED_CHANGES[model]
    rows.append(
        ["Change", "", f"{points:+.2f} points", f"{percent:+.2f} %", f"{seconds:.2f} s", ""]
    )
    return Table(f"Published, {model_name(model)}", PHASE_COLUMNS, rows, "One seed.", strong=[2])


MODEL_COLUMNS = (
    Column("Figure", "name"),
    Column("Standard"),
    Column("Deep supervision"),
    Column("Difference"),
)


def model_table(variant: str, runs: Frame) -> Table:
    """The comparison of the models in one variant."""
    standard, deep = (runs[runs["model"] == model].set_index("seed") for model in (STANDARD, DEEP))
    rows = []
    for title, column, form, unit in (
        ("Final accuracy", "last_accuracy_percent", ".2f", "%"),
        ("Final perplexity", "last_perplexity", ",.2f", ""),
        ("Change in accuracy", study.ACCURACY.change, "+.2f", "points"),
        ("Change in perplexity", study.PERPLEXITY.change, "+.2f", "%"),
        ("Time", "seconds", ",.1f", "s"),
    ):
        a, b = (arm[column].astype("float64") for arm in (standard, deep))
        if a.notna().any() and b.notna().any():
            unit = f" {unit}" if unit else ""
            of_difference = " points" if unit == " %" and "acc" in column else unit
            signed = form if form.startswith("+") else f"+{form}"
            rows.append(
                [
                    title,
                    _mean(a, form, unit),
                    _mean(b, form, unit),
                    _mean((b - a).dropna(), signed, of_difference),
                ]
            )
    note = "Difference: deep supervision − Standard, within seeds."
    return Table(f"{variant}, comparison of models", MODEL_COLUMNS, rows, note)


def published_models_table() -> Table:
    rows = []
    (_, a), (_, b) = study.PUBLISHED[STANDARD], study.PUBLISHED[DEEP]
    first, second = study.PUBLISHED_CHANGES[STANDARD], study.PUBLISHED_CHANGES[DEEP]
    for title, x, y, form, unit, of_difference in (
        ("Final accuracy", a.accuracy_percent, b.accuracy_percent, ".2f", " %", " points"),
        ("Final perplexity", a.perplexity, b.perplexity, ",.2f", "", ""),
        ("Change in accuracy", first[0], second[0], "+.2f", " points", " points"),
        ("Change in perplexity", first[1], second[1], "+.2f", " %", " %"),
        ("Time", first[2], second[2], ",.1f", " s", " s"),
    ):
        signed = form if form.startswith("+") else f"+{form}"
        cells = [f"{x:{form}}{unit}", f"{y:{form}}{unit}", f"{y - x:{signed}}{of_difference}"]
        rows.append([title, *cells])
    return Table("Published, comparison of models", MODEL_COLUMNS, rows, "One seed.")


# --- changes and differences ----------------------------------------------------------------------


def changes_table(changes: Frame, shown: Sequence[str]) -> Table:
    columns = [Column("Variant", "name"), Column("Model", "name"), Column("Seeds")]
    columns += [Column(f"{figure.name.capitalize()}, {figure.unit}") for figure in FIGURES]
    rows = []
    for (variant, model), arm in changes.groupby(["variant", "model"], sort=False):
        if variant in shown:
            by_figure = arm.set_index("figure")
            cells: list[Cell | str] = [str(variant), model_name(str(model))]
            most = arm.loc[arm["n"].idxmax()]
            cells.append(_of_all(int(most["n"]), int(most["dropped"])))
            for figure in FIGURES:
                told = by_figure.loc[figure.name]
                cells.append(Cell(_interval(told, figure.decimals), _sort(told["mean"])))
            rows.append(cells)
    note = (
        "Mean ± standard deviation over the seeds that completed, and the 95 % interval of the "
        "mean."
    )
    return Table("Change from the first phase to the last", columns, rows, note, sortable=True)


def comparisons_table(
    title: str,
    told: Frame,
    figure: study.Figure,
    labels: dict[str, str],
    shown: Iterable[str],
) -> Table:
    """Judged comparisons of the variants `shown`."""
    family = max(1, int(told["p_adjusted"].notna().sum()))
    told = told[told[next(iter(labels))].isin(list(shown))]
    some_left_out = bool((told["dropped"] > 0).any())
    columns = [Column(name, "name") for name in labels.values()]
    columns += [
        Column("Difference"),
        Column("95 % interval"),
        Column("Verdict", "name"),
        Column("Seeds"),
        *([Column("Left out", "name")] if some_left_out else []),
        Column("p, Holm"),
        Column("Sign-flip p", hidden_on_paper=True),
        Column("Equivalence p, Holm", hidden_on_paper=True),
        Column("Effect size", hidden_on_paper=True),
        Column("Could show"),
        Column("Seeds to decide"),
    ]
    digits = figure.decimals
    rows = []
    for row in told.to_dict("records"):
        cells: list[Cell | str] = [
            model_name(row[name]) if name == "model" else row[name] for name in labels
        ]
        interval = (
            f"{row['low']:+.{digits}f} to {row['high']:+.{digits}f}"
            if math.isfinite(row["low"])
            else ""
        )
        cells += [
            Cell(number_text(row["mean"], f"+.{digits}f"), _sort(row["mean"])),
            Cell(interval, _sort(row["low"])),
            # The margin is told below.
            row["verdict"].split()[0],
            _of_all(row["n"], row["dropped"]),
            *([row["left_out"]] if some_left_out else []),
            _p(row["p_adjusted"]),
            _p(row["sign_flip_p"]),
            _p(row["equivalence_p_adjusted"]),
            number_text(row["effect_size"], "+.2f"),
            number_text(row["could_show"], f".{digits}f"),
            _seeds_needed(row),
        ]
        rows.append(cells)
    margin = told["margin"].iloc[0] if len(told) else math.nan
    note = (
        f"One family of {family}. Equivalent: within the margin of ±{margin:.3g} {figure.unit}. "
        "Could show: the smallest true difference that this many seeds find with a power of 80 %. "
        "Seeds to decide: were the observed mean and spread the true ones. Both are at the level "
        f"{ALPHA:g} / {family}, the strictest of Holm's steps."
    )
    return Table(title, columns, rows, note, sortable=True)


def _of_all(seeds: int, left_out: int) -> Cell:
    return Cell(f"{seeds} of {seeds + left_out}" if left_out else str(seeds), seeds)


def _seeds_needed(row: dict[str, Any]) -> Cell:
    needed = row["seeds_needed"]
    if row["verdict"] != stats.Outcome.undecided:
        return Cell("decided", row["n"])
    if math.isnan(needed):
        return Cell("not known", "")
    return Cell("none would" if math.isinf(needed) else f"{needed:,.0f}", _sort(needed))


# --- compute --------------------------------------------------------------------------------------


def spent_table(spent: Frame) -> Table:
    columns = [
        Column("Variant", "name"),
        Column("Model", "name"),
        Column("Seeds"),
        Column("Epochs"),
        Column("Tokens"),
        Column("FLOP with head"),
        Column("FLOP without"),
        Column("Training"),
        Column("Evaluation", hidden_on_paper=True),
        Column("Saved by reuse", hidden_on_paper=True),
        Column("Final loss"),
    ]
    rows = [
        [
            row["variant"],
            model_name(row["model"]),
            str(row["seeds"]),
            Cell(number_text(row["epochs"], ".3g"), _sort(row["epochs"])),
            _large(row["tokens"]),
            _large(row["flops"]),
            _large(row["flops_without_head"]),
            Cell(duration(row["train_seconds"]), _sort(row["train_seconds"])),
            Cell(duration(row["evaluation_seconds"]), _sort(row["evaluation_seconds"])),
            Cell(duration(row["seconds_saved"]), _sort(row["seconds_saved"])),
            number_text(row["loss"], ".4f"),
        ]
        for row in spent.to_dict("records")
    ]
    return Table("What every arm spent", columns, rows, sortable=True)


def target_table(reached: Frame, reference: str) -> Table:
    columns = [
        Column("Variant", "name"),
        Column("Model", "name"),
        Column("Target loss"),
        Column("Reached by"),
        Column("Tokens"),
        Column("FLOP with head"),
        Column("FLOP without"),
        Column("Time"),
    ]
    rows = [
        [
            row["variant"],
            model_name(row["model"]),
            f"{row['target']:.4f}",
            Cell(f"{row['reached']} of {row['seeds']}", row["reached"] / max(1, row["seeds"])),
            *(_large(row[name]) for name in ("tokens", "flops", "flops_without_head")),
            Cell(duration(row["seconds"]), _sort(row["seconds"])),
        ]
        for row in reached.to_dict("records")
    ]
    note = (
        f"The target is a loss that every seed of {reference} reached. Means over the seeds that "
        "reached it, interpolated between epochs."
    )
    return Table("Compute and time to reach a target loss", columns, rows, note, sortable=True)


def speed_up_table(gains: Frame) -> Table:
    columns = [
        Column("Variant", "name"),
        Column("Model", "name"),
        Column("Reached by"),
        *(
            Column(title)
            for title in ("In tokens", "In FLOP with head", "In FLOP without", "In time")
        ),
    ]
    rows = []
    for (variant, model), arm in gains.groupby(["variant", "model"], sort=False):
        by = arm.set_index("measure")
        n, seeds = int(arm["n"].max()), int(arm["seeds"].max())
        cells = [Cell(f"{n} of {seeds}", n / max(1, seeds))]
        for measure in (ledger.TOKENS, ledger.FLOPS, ledger.BODY, ledger.SECONDS):
            told = by.loc[measure.column]
            cells.append(Cell(_interval(told, 0, 100, " %"), _sort(told["mean"])))
        rows.append([variant, model_name(model), *cells])
    note = (
        "Compute from scratch / compute of growing, all phases, to the lowest loss that the run "
        "from scratch of the same seed reached, − 1 (Du et al. 2024): +50 % means that from "
        "scratch takes half as much again, minus that growing was slower. Mean ± standard "
        "deviation and 95 % interval over the seeds that reached that loss; where some did not, "
        "the mean flatters."
    )
    return Table("Speed-up of growing against from scratch", columns, rows, note, sortable=True)


def parameters_table(trained: Frame) -> Table:
    columns = [Column("Variant and phase", "name")]
    columns += [Column(t) for t in ("Layers", "Embedding", "Head", "Trained", "Total", "Share")]
    rows = []
    for row in trained.itertuples():
        own = row.layers + row.embedding + row.head
        numbers = (row.layers, row.embedding, row.head, own, row.total)
        rows.append([row.label, *(f"{int(n):,}" for n in numbers), f"{own / row.total:.1%}"])
    return Table("Trained parameters", columns, rows)


# --- runs -----------------------------------------------------------------------------------------


def runs_table(runs: Frame, of: int, variants: Mapping[str, str]) -> Table:
    """A row for each of `runs`, the first of so many; `variants` names the arms of some."""
    rows = []
    runs = runs.assign(phases=runs["phases"].astype("float64"))
    for row in runs.to_dict("records"):
        name = variants.get(row["run"]) or text_of(row["experiment"])
        rows.append(
            [
                row["run"],
                name,
                model_name(text_of(row["model"])),
                number_text(row["seed"], "d"),
                row["status"] + (" (repeated)" if pd.notna(row["duplicate_of"]) else ""),
                pair(row, "layers", "d"),
                number_text(row["last_accuracy_percent"], ".2f"),
                number_text(row["accuracy_points"] if row["phases"] > 1 else math.nan, "+.2f"),
                number_text(row["last_perplexity"], ",.2f"),
                number_text(row["perplexity_percent"] if row["phases"] > 1 else math.nan, "+.2f"),
                number_text(row["epochs"], "d"),
                Cell(duration(row["seconds"]), _sort(row["seconds"])),
            ]
        )
    columns = [
        Column("Run", "name"),
        Column("Variant", "name"),
        Column("Model", "name"),
        Column("Seed"),
        Column("Status", "name"),
        Column("Layers"),
        Column("Accuracy %"),
        Column("Change, points"),
        Column("Perplexity"),
        Column("Change, %"),
        Column("Epochs"),
        Column("Time"),
    ]
    note = "All settings and figures are in tables/runs.csv, every epoch in tables/epochs.csv."
    if of > len(rows):
        note = f"The first {len(rows):,} of {of:,} runs. {note}"
    return Table("Every run (click a head to sort)", columns, rows, note, sortable=True)


def versions_table(runs: Frame) -> Table:
    """The versions, machines, texts and seeds of these runs."""
    rows = []
    for title, column in (
        ("proglayer", "proglayer"),
        ("Python", "python"),
        ("torch", "torch"),
        ("Platform", "platform"),
        ("Device", "device_name"),
        ("Threads", "threads"),
        ("Commit", "git_commit"),
        ("Working tree changed", "git_changed"),
        ("Corpus", "corpus"),
        ("Corpus fingerprint", "corpus_fingerprint"),
        ("Vocabulary", "vocab_size"),
        ("Validation tokens", "validation_tokens"),
    ):
        values = unique(runs[column])
        if values:
            rows.append([title, listed(values, 6)])
    if seeds := ranges(runs["seed"]):
        rows.append(["Seeds", seeds])
    columns = [Column("What", "name"), Column("Values in these runs", "prose")]
    return Table("With what it ran", columns, rows)


# --- words ----------------------------------------------------------------------------------------


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


def _interval(told: Any, decimals: int, scale: float = 1, unit: str = "") -> str:
    """`+0.1 ± 0.2 (-0.1 to +0.3)`, as far as it is known."""
    if not math.isfinite(told["mean"]):
        return "none"
    mean, sd, low, high = (scale * told[name] for name in ("mean", "sd", "low", "high"))
    if not math.isfinite(sd):
        return f"{mean:+.{decimals}f}{unit}"
    interval = f"({low:+.{decimals}f} to {high:+.{decimals}f}{unit})"
    return f"{mean:+.{decimals}f} ± {sd:.{decimals}f} {interval}"


def _large(value: Any) -> Cell:
    return Cell("" if pd.isna(value) else engineering(value), _sort(value))


def _p(value: float) -> Cell:
    return Cell("< 0.001" if value < 0.001 else number_text(value, ".3f"), _sort(value))


def _sort(value: Any) -> float | str:
    return "" if pd.isna(value) else float(value)


def unique(values: Frame) -> list[str]:
    def told(value: Any) -> str:
        if isinstance(value, bool | np.bool_):
            return "yes" if value else "no"
        return f"{value:,}" if isinstance(value, Integral) else str(value)

    return [told(v) for v in plain_values(values.drop_duplicates()) if v is not None]
