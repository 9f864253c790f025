"""The tables of a report: for each a frame, which is its CSV file, and its columns on the page."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd

from proglayer.report import stats, words
from proglayer.report.arms import Frame, Metric
from proglayer.report.comparisons import Comparison
from proglayer.report.words import engineering, model_name, variant_name
from proglayer.results import plain_values
from proglayer.results.show import duration, listed, pair, ranges, text_of
from proglayer.table import Column, Row, Table, is_missing

ARM = ["variant", "model"]
# What a page can hold and a reader can read; the rest is counted, and whole in the files.
MOST_ROWS = 200


def set_table(frame: Frame, columns: Sequence[Column], title: str, file: str) -> Table:
    """Set a table of a report: as many rows as a reader can read, and where the others are.

    The condition is named where there are several.
    """
    if "condition" in frame and frame["condition"].nunique() > 1:
        columns = [Column("condition", "On"), *columns]
    more = len(frame) - MOST_ROWS
    note = f"{more:,} more rows are in tables/{file}.csv." if more > 0 else ""
    return Table(frame.head(MOST_ROWS), columns, title, note)


def over_seeds(values: Frame, by: Sequence[str], names: Sequence[str]) -> Frame:
    """Summarise columns of `values` over the seeds of each group.

    Returns:
        the columns `by`, `seeds`, and for each name `<name>_mean`, `_sd`, `_low` and `_high` (the
        95 % interval of the mean).
    """
    rows = []
    for key, group in values.groupby(list(by), sort=False):
        row = dict(zip(by, key, strict=True)) | {"seeds": len(group)}
        for name in names:
            over = stats.summary(group[name].to_numpy(float, na_value=math.nan))
            row |= {f"{name}_{part}": getattr(over, part) for part in ("mean", "sd", "low", "high")}
        rows.append(row)
    parts = [f"{name}_{part}" for name in names for part in ("mean", "sd", "low", "high")]
    return pd.DataFrame(rows, columns=[*by, "seeds", *parts])


# --- columns --------------------------------------------------------------------------------------

VARIANT = Column("variant", "Variant", variant_name)
MODEL = Column("model", "Model", model_name)
SEEDS = Column("seeds", "Seeds", "d")


def spread(name: str, label: str, form: str, unit: str = "", **how: Any) -> Column:
    """Show mean ± standard deviation of what `over_seeds` summarised."""

    def text(row: Row) -> str:
        mean, sd = row[f"{name}_mean"], row[f"{name}_sd"]
        around = "" if is_missing(sd) else f" ± {sd:{form.replace('+', '')}}"
        return "" if is_missing(mean) else f"{mean:{form}}{around}{unit}"

    return Column(f"{name}_mean", label, of_row=text, kind="figure", **how)


def interval(name: str, label: str, form: str, **how: Any) -> Column:
    """Show mean and 95 % interval of what `over_seeds` summarised."""

    def text(row: Row) -> str:
        return between(row[f"{name}_mean"], row[f"{name}_low"], row[f"{name}_high"], form)

    return Column(f"{name}_mean", label, of_row=text, kind="figure", **how)


def between(mean: float, low: float, high: float, form: str) -> str:
    """Return `+0.1 (-0.1 to +0.3)`, as far as it is known."""
    around = "" if is_missing(low) else f" ({low:{form}} to {high:{form}})"
    return "" if is_missing(mean) else f"{mean:{form}}{around}"


def amount(name: str, label: str, **how: Any) -> Column:
    """Show a large number."""
    return Column(name, label, engineering, kind="figure", **how)


def seconds(name: str, label: str, **how: Any) -> Column:
    """Show a time."""
    return Column(name, label, duration, kind="figure", **how)


def _unique(values: Any, most: int = 6) -> str:
    """List the values that there are."""

    def text(value: Any) -> str:
        real = isinstance(value, Real) and not isinstance(value, bool)
        return f"{value:,.10g}" if real else str(value)

    known = [v for v in plain_values(values.drop_duplicates()) if v is not None]
    return listed([text(v) for v in known], most)


# --- where the arms ended -------------------------------------------------------------------------

CHANGES = [metric.change for metric in Metric]


def arms(asked: Frame) -> Frame:
    """Return where each arm ended, in absolute figures, and its change from the first phase.

    Args:
        asked: of `arms.Arms.asked`.

    Returns:
        ARM, `seeds`, the summaries of `over_seeds` for `end_accuracy`, `end_loss`,
        `end_bits_per_byte` and the changes, `judged_on`, `layers`, `left_out` (the seeds that did
        not complete, each status with their number).
    """
    completed = asked[asked["lacks"].isna()]
    names = ["end_accuracy", "end_loss", "end_bits_per_byte", *CHANGES]
    frame = over_seeds(completed, ARM, names)
    for name, column in (("judged_on", "judged_on"), ("layers", "last_layers")):
        frame[name] = [_unique(arm[column], 3) for _, arm in completed.groupby(ARM, sort=False)]
    lacks = asked.dropna(subset="lacks").groupby(ARM)["lacks"].agg(_tally)
    frame["left_out"] = [
        lacks.get(arm, "") for arm in frame[ARM].itertuples(index=False, name=None)
    ]
    return frame


def _tally(values: Any) -> str:
    """Return `1 failed, 2 waiting`."""
    return ", ".join(f"{count} {value}" for value, count in sorted(Counter(values).items()))


def arms_table(frame: Frame) -> Table:
    """Set the first table of a report."""
    grown = frame["accuracy_change_points_mean"].notna().any()
    columns = [
        VARIANT,
        MODEL,
        spread("end_accuracy", "Accuracy", ".2f", " %"),
        spread("end_loss", "Loss, nats", ".4f"),
        *([interval(CHANGES[0], "Change in accuracy, points", "+.2f")] if grown else []),
        SEEDS,
        *([Column("left_out", "Left out")] if frame["left_out"].any() else []),
        Column("layers", "Layers", kind="figure"),
        *([interval(CHANGES[1], "Perplexity fell by, %", "+.1f", minor=2)] if grown else []),
        spread("end_bits_per_byte", "Bits per byte", ".4f", minor=1),
    ]
    return set_table(frame, columns, "Where each arm ended", "arms")


# --- phases ---------------------------------------------------------------------------------------

OF_PHASE = ["validation_accuracy_percent", "validation_perplexity", "seconds"]


def phases(runs: Frame, every: Frame) -> Frame:
    """Return each arm's phases.

    Args:
        runs: completed runs of one condition, of `arms.Arms`.
        every: the phases of all runs.

    Returns:
        ARM, `phase`, `seeds`, the summaries of OF_PHASE (seconds: of training and evaluation),
        `name`, `layers`, `best_epoch`.
    """
    both = runs[["run", *ARM]].merge(every.drop(columns=ARM, errors="ignore"), on="run")
    both["seconds"] = both["train_seconds"] + both["evaluation_seconds"]
    by = [*ARM, "phase"]
    frame = over_seeds(both, by, OF_PHASE)
    groups = both.groupby(by, sort=False)
    for name, shown in (("name", _unique), ("layers", _unique), ("best_epoch", ranges)):
        frame[name] = groups[name].agg(shown).to_numpy(object)
    return frame


def phases_table(frame: Frame) -> Table:
    """Set the phases of each arm."""
    columns = [
        VARIANT,
        MODEL,
        Column("name", "Phase"),
        Column("layers", "Layers", kind="figure"),
        SEEDS,
        spread("validation_accuracy_percent", "Best Acc", ".2f", " %"),
        spread("validation_perplexity", "Best PPL", ",.2f"),
        Column("seconds_mean", "Time", duration, kind="figure"),
        Column("best_epoch", "Best Epoch", kind="figure", minor=1),
    ]
    return set_table(frame, columns, "The phases of each arm", "phase_by_phase")


# --- comparisons ----------------------------------------------------------------------------------


def comparisons_table(title: str, family: Sequence[Comparison]) -> Table:
    """Set comparisons of one family: the verdicts on accuracy, and what they rest on."""
    rows: list[dict[str, Any]] = [
        {"of": one, "condition": one.condition, "model": one.model} for one in family
    ]

    def said(
        label: str,
        text: Callable[[Comparison], str],
        sort: Callable[[Comparison], Any] | None = None,
        minor: int = 0,
    ) -> Column:
        for row in rows:
            row[label] = (sort or text)(row["of"])
        kind = "figure" if sort else "name"
        return Column(label, label, of_row=lambda row: text(row["of"]), kind=kind, minor=minor)

    def described(metric: Metric, label: str, form: str, minor: int) -> Column:
        def text(one: Comparison) -> str:
            pairs = one.pairs.get(metric, stats.NO_PAIRS)
            return between(pairs.mean, *pairs.interval(0.95)[:2], form)

        return said(label, text, lambda one: one.pairs.get(metric, stats.NO_PAIRS).mean, minor)

    columns = [
        said("Comparison", words.label),
        MODEL,
        said("Measured", words.measured),
        said("Accuracy", lambda one: words.VERDICTS[one.verdict]),
        said("Difference, points", words.mean_text, lambda one: one.accuracy.mean),
        said("Interval", words.ends_text, lambda one: one.judged.interval.low),
        said("Seeds", _of_all, lambda one: one.accuracy.n),
        said("Left out", lambda one: words.left_out_text(one.accuracy)),
        said("p, corrected", _p, lambda one: one.judged.p_adjusted),
        said("Seeds to plan, in all", _plan, lambda one: one.seeds_to_plan[0], 3),
        described(Metric.perplexity, "Perplexity fell by, %", "+.1f", 2),
        described(Metric.loss, "Loss fell by, nats", "+.3f", 1),
    ]
    if not any(row["Left out"] for row in rows):
        columns = [column for column in columns if column.label != "Left out"]
    return set_table(pd.DataFrame(rows), columns, title, "comparisons")


def _of_all(one: Comparison) -> str:
    n, dropped = one.accuracy.n, one.accuracy.dropped
    return f"{n} of {n + dropped}" if dropped else str(n)


def _plan(one: Comparison) -> str:
    return "" if is_missing(one.seeds_to_plan[0]) else words.plan(*one.seeds_to_plan)


def _p(one: Comparison) -> str:
    value = one.judged.p_adjusted
    return "" if is_missing(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


# --- growth, exits --------------------------------------------------------------------------------

OF_GROWTH = ["loss_before", "loss_after", "shock_nats", "accuracy_points", "share_new"]


def growth_table(growths: Frame) -> Table:
    """Set the immediate effect of each arm's growths, over its seeds; see `measures.growths`."""
    by = ["condition", *ARM, "phase"]
    frame = over_seeds(growths, by, OF_GROWTH)
    groups = growths.groupby(by, sort=False)
    frame["layers"] = groups["layers"].agg(_unique).to_numpy(object)
    frame["recovery"] = groups["tokens_to_recovery"].agg(_tokens).to_numpy(object)
    columns = [
        VARIANT,
        MODEL,
        Column("layers", "Grown to, layers", kind="figure"),
        SEEDS,
        spread("loss_before", "Loss before", ".3f"),
        spread("loss_after", "Loss after", ".3f"),
        interval("shock_nats", "Loss rose by, nats", "+.3f"),
        interval("accuracy_points", "Accuracy, points", "+.2f", minor=2),
        Column("recovery", "Tokens to recover", kind="figure"),
        spread("share_new", "Gradient in new layers", ".0%", minor=1),
    ]
    return set_table(frame, columns, "The immediate effect of growth", "growth")


def _tokens(values: Any) -> str:
    """Return mean and 95 % interval of tokens; or in how many seeds they are infinite."""
    tokens = values.dropna().to_numpy(float)
    if never := int(np.isinf(tokens).sum()):
        return f"never in {never} of {len(tokens)}"
    over = stats.summary(tokens)
    if not over.n:
        return ""
    around = f" ({engineering(over.low)} to {engineering(over.high)})" if over.n > 1 else ""
    return engineering(over.mean) + around


# --- compute --------------------------------------------------------------------------------------


def spent_table(spent: Frame) -> Table:
    """Set what every arm spent, and the loss that it ended with."""
    columns = [
        VARIANT,
        MODEL,
        SEEDS,
        Column("epochs", "Epochs", ".3g"),
        amount("tokens", "Tokens"),
        amount("flops", "FLOP with head"),
        amount("flops_without_head", "FLOP without", minor=3),
        seconds("train_seconds", "Training"),
        seconds("evaluation_seconds", "Evaluation", minor=1),
        seconds("seconds_saved", "Saved by reuse", minor=2),
        Column("loss", "Validation loss", ".4f"),
    ]
    return set_table(spent, columns, "What every arm spent", "ledger")


def speed_up_table(gains: Frame) -> Table:
    """Set the speed-up of growing: a row an arm, a column a measure of compute."""
    wide = gains.pivot_table(
        ["mean", "low", "high"],
        ["condition", *ARM, "seeds", "reached"],
        "measure",
        sort=False,
        dropna=False,
    )
    wide.columns = [f"{measure}_{part}" for part, measure in wide.columns]
    frame = wide.mul(100).reset_index()
    columns = [
        VARIANT,
        MODEL,
        Column("reached", "Reached by", of_row=lambda row: f"{row['reached']} of {row['seeds']}"),
        interval("tokens", "In tokens, %", "+.0f"),
        interval("flops", "In FLOP with head, %", "+.0f"),
        interval("flops_without_head", "In FLOP without, %", "+.0f", minor=1),
        interval("seconds", "In time, %", "+.0f"),
    ]
    return set_table(frame, columns, "Speed-up of growing", "speed_up")


# --- runs -----------------------------------------------------------------------------------------


def runs_table(runs: Frame, variants: dict[str, str]) -> Table:
    """Set a row for each run; `variants` names the arms of those that completed."""
    changed = runs["phases"].astype("float64") > 1
    frame = runs.assign(
        variant=[variants.get(r, text_of(e)) for r, e in runs[["run", "experiment"]].to_numpy()],
        accuracy_points=runs["accuracy_points"].where(changed),
        model=runs["model"].map(text_of),
    )
    frame["status"] += np.where(runs["duplicate_of"].notna(), " (repeated)", "")
    columns = [
        Column("run", "Run"),
        VARIANT,
        MODEL,
        Column("seed", "Seed", "d"),
        Column("status", "Status"),
        Column("last_layers", "Layers", of_row=lambda r: pair(r, "layers", "d"), kind="figure"),
        Column("last_accuracy_percent", "Accuracy %", ".2f"),
        Column("accuracy_points", "Change, points", "+.2f"),
        Column("last_perplexity", "Perplexity", ",.2f"),
        Column("last_bits_per_byte", "Bits per byte", ".4f", minor=2),
        Column("epochs", "Epochs", "d", minor=1),
        seconds("seconds", "Time"),
    ]
    return set_table(frame, columns, "Every run", "runs")


def ended_table(ended: Frame) -> Table:
    """Set the runs that ended otherwise than completed, with their reasons."""
    columns = [
        Column("run", "Run"),
        Column("status", "Status"),
        Column("overrides", "Overrides", kind="prose"),
        Column("reason", "Reason", kind="prose"),
    ]
    return set_table(ended, columns, "Runs that ended otherwise", "runs")


def left_out_table(left_out: Frame) -> Table:
    """Set what could not be read."""
    columns = [Column("folder", "Folder"), Column("reason", "Reason", kind="prose")]
    return set_table(left_out, columns, "Left out, for it cannot be read", "left_out")


VERSIONS = (
    *("proglayer", "python", "torch", "platform", "device_name", "threads", "git_commit"),
    *("git_changed", "corpus", "corpus_fingerprint", "tokenizer", "vocab_size", "seed"),
)


def versions_table(runs: Frame) -> Table:
    """Set the versions, machines, texts and seeds of these runs."""
    rows = [{"what": name.replace("_", " "), "values": _unique(runs[name])} for name in VERSIONS]
    columns = [Column("what", "What"), Column("values", "Values in these runs", kind="prose")]
    return Table(rows, columns, "With what it ran")
