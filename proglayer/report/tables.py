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
from proglayer.report.comparisons import Comparison, tally
from proglayer.report.words import engineering, model_name, variant_name
from proglayer.results.columns import plain_values
from proglayer.results.read import TEXTS
from proglayer.results.show import duration, listed, ranges
from proglayer.run.record import RunState
from proglayer.table import Column, Row, Table, is_missing

ARM = ["variant", "model"]
ENDS = ("mean", "low", "high")
LOSS = [f"loss_{part}" for part in ENDS]
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
        mean, low, high = (row[f"{name}_{part}"] for part in ENDS)
        return words.with_interval(mean, low, high, form)

    return Column(f"{name}_mean", label, of_row=text, kind="figure", **how)


def _unique(values: Any, most: int = 6) -> str:
    """List the values that there are."""

    def text(value: Any) -> str:
        real = isinstance(value, Real) and not isinstance(value, bool)
        return f"{value:,.10g}" if real else str(value)

    known = [v for v in plain_values(values.drop_duplicates()) if v is not None]
    return listed([text(v) for v in known], most)


# --- where the arms ended -------------------------------------------------------------------------


def arms(asked: Frame) -> Frame:
    """Return where each arm ended, in absolute figures, and its change from the first phase.

    Args:
        asked: of `arms.Arms.asked`.

    Returns:
        ARM, `seeds`, `judged_on`, `layers`, `left_out` (the seeds that did not complete, each
        status with their number), and the summaries of `over_seeds` for the figures at the end and
        the changes, on both texts.
    """
    completed = asked[asked["lacks"].isna()]
    names = []
    for text in TEXTS:
        names += [f"last_{text}_{name}" for name in ("accuracy_percent", "loss", "bits_per_byte")]
        names += [metric.change(text) for metric in Metric]
    frame = over_seeds(completed, ARM, names)
    for place, column in enumerate(("judged_on", "last_layers"), start=3):
        shown = [_unique(arm[column], 3) for _, arm in completed.groupby(ARM, sort=False)]
        frame.insert(place, column.removeprefix("last_"), shown)
    lacks = (
        asked.dropna(subset="lacks")
        .groupby(ARM)["lacks"]
        .agg(lambda states: tally(Counter(sorted(states))))
    )
    left_out = [lacks.get(arm, "") for arm in frame[ARM].itertuples(index=False, name=None)]
    frame.insert(5, "left_out", left_out)
    return frame


def arms_table(frame: Frame) -> Table:
    """Set the first table of a report."""
    text = frame["judged_on"].iloc[0]
    accuracy, loss = (metric.change(text) for metric in Metric)
    grown = frame[f"{accuracy}_mean"].notna().any()
    shown = {part: 100 * np.expm1(frame[f"{loss}_{part}"]) for part in ENDS}
    frame = frame.assign(**{f"perplexity_{part}": values for part, values in shown.items()})
    columns = [
        VARIANT,
        MODEL,
        spread(Metric.accuracy.last(text), f"{text.capitalize()} accuracy", ".2f", " %"),
        spread(Metric.loss.last(text), f"{text.capitalize()} loss, nats", ".3f"),
        *([interval(accuracy, "Change in accuracy, points", "+.2f")] if grown else []),
        SEEDS,
        *([Column("left_out", "Left out")] if frame["left_out"].any() else []),
        Column("layers", "Layers", kind="figure"),
        *([interval("perplexity", "Perplexity change, %", "+.1f", minor=2)] if grown else []),
        spread(f"last_{text}_bits_per_byte", "Bits per byte", ".4f", minor=1),
    ]
    return set_table(frame, columns, f"Where each arm ended, on the {text} text", "arms")


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
        spread("validation_accuracy_percent", "Validation accuracy", ".2f", " %"),
        spread("validation_perplexity", "Validation perplexity", ",.2f"),
        Column("seconds_mean", "Time", duration, kind="figure"),
        Column("best_epoch", "Best epoch", kind="figure", minor=1),
    ]
    return set_table(frame, columns, "The phases of each arm", "phase_by_phase")


# --- comparisons ----------------------------------------------------------------------------------


def comparisons_table(title: str, family: Sequence[Comparison]) -> Table:
    """Set comparisons of one family: the verdicts on accuracy, and what they rest on."""
    rows = [
        {
            "of": one,
            "condition": one.condition,
            "model": one.model,
            "mean": one.accuracy.mean,
            "low": one.judged.interval.low,
            "n": one.accuracy.n,
            "p": one.judged.p_adjusted,
            "plan": one.seeds_to_plan[0],
            **dict(zip(LOSS, [one.loss.mean, *one.loss.interval(0.95)[:2]], strict=True)),
        }
        for one in family
    ]

    def said(name: str, label: str, text: Callable[[Comparison], str], **how: Any) -> Column:
        return Column(name, label, of_row=lambda row: text(row["of"]), **how)

    columns = [
        said("of", "Comparison", words.label),
        MODEL,
        said("of", "Measured", words.measured),
        said("of", "Verdict", lambda one: one.verdict),
        said("mean", "Difference, points", words.mean_text, kind="figure"),
        said("low", "Interval", words.ends_text, kind="figure"),
        Column("n", "Seeds", "d"),
        said("of", "Left out", lambda one: tally(one.accuracy.left_out)),
        said("p", "p, corrected", _p, kind="figure"),
        said("plan", "Seeds to plan, in all", _plan, kind="figure", minor=3),
        interval("loss", "Loss, nats (plain 95 %)", "+.3f", minor=1),
    ]
    if not any(one.accuracy.left_out for one in family):
        columns = [column for column in columns if column.label != "Left out"]
    return set_table(pd.DataFrame(rows), columns, title, "comparisons")


def _plan(one: Comparison) -> str:
    return "" if is_missing(one.seeds_to_plan[0]) else words.plan(*one.seeds_to_plan)


def _p(one: Comparison) -> str:
    value = one.judged.p_adjusted
    return "" if is_missing(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


# --- growth, exits --------------------------------------------------------------------------------

OF_GROWTH = [
    *("validation_loss_before", "validation_loss_after", "validation_loss_rise_nats"),
    *("validation_accuracy_change_points", "gradient_share_new"),
]


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
        spread("validation_loss_before", "Loss before", ".3f"),
        spread("validation_loss_after", "Loss after", ".3f"),
        interval("validation_loss_rise_nats", "Rise of the loss, nats", "+.3f"),
        interval(
            "validation_accuracy_change_points", "Change in accuracy, points", "+.2f", minor=2
        ),
        Column("recovery", "Tokens to recover", kind="figure"),
        spread("gradient_share_new", "Gradient in new layers", ".0%", minor=1),
    ]
    return set_table(
        frame, columns, "The immediate effect of growth, on the validation text", "growth"
    )


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
        Column("tokens", "Tokens", engineering, kind="figure"),
        Column("flops", "FLOP with head", engineering, kind="figure"),
        Column("flops_without_head", "FLOP without", engineering, kind="figure", minor=3),
        Column("train_seconds", "Training", duration, kind="figure"),
        Column("evaluation_seconds", "Evaluation", duration, kind="figure", minor=1),
        Column("seconds_saved", "Saved by reuse", duration, kind="figure", minor=2),
        Column("last_validation_loss", "Validation loss", ".4f"),
    ]
    return set_table(spent, columns, "What every arm spent", "ledger")


def speed_up_table(gains: Frame) -> Table:
    """Set the speed-up of growing: a row an arm, a column a measure of compute."""
    parts = [name for name in gains if name.endswith(("_mean", "_low", "_high"))]
    frame = gains.assign(**{name: 100 * gains[name] for name in parts})
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


def ended_table(runs: Frame, left_out: Frame) -> Table:
    """Set the runs that ended otherwise than completed, with their reasons, and what could not be
    read. Failures come first: an interruption cures itself.
    """
    under_way = [RunState.completed, RunState.running, RunState.waiting]
    ended: Frame = runs[~runs["status"].isin(under_way)].sort_values("status", kind="stable")
    damaged = left_out.rename(columns={"folder": "run", "kind": "status"})
    columns = [
        Column("run", "Run"),
        Column("status", "Status"),
        Column("overrides", "Overrides", kind="prose"),
        Column("reason", "Reason", kind="prose"),
    ]
    both = pd.concat([ended[["run", "status", "overrides", "reason"]], damaged])
    return set_table(both, columns, "Runs that ended otherwise", "runs")
