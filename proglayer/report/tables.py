"""The report's tables: each is a list of (title, kind, cell), where a cell is made of a row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import pandas as pd

from proglayer.report import comparisons, ledger, stats, study
from proglayer.report.page import Cell, Table
from proglayer.report.pictures import engineering
from proglayer.report.study import DEEP, METRICS, STANDARD, Frame, model_name, variant_name
from proglayer.results import plain_values
from proglayer.results.formatting import duration, listed, number_text, pair, ranges, text_of

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


def _variant(row: Row) -> str:
    return variant_name(row["variant"])


ARM: Columns = (("Variant", "name", _variant), ("Model", "name", _model))
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
        points = _mean(runs["accuracy_points"], "+.2f", " points")
        percent = _mean(runs["perplexity_percent"], "+.2f", " %")
        rows.append(["Change", "", points, percent, _mean_seconds(runs["seconds"]), ""])
    several = f"Mean ± standard deviation over {len(runs)} seeds."
    note = several if len(runs) > 1 else "One seed."
    note += f" Left out: {left_out}." if left_out else ""
    return _founding_table(title, PHASE_HEADS, rows, note)


# Title, column of `Arms.runs`, form, unit of the values and of their difference.
MODEL_ROWS = (
    ("Final accuracy", "last_accuracy_percent", ".2f", " %", " points"),
    ("Final perplexity", "last_perplexity", ",.2f", "", ""),
    ("Change in accuracy", "accuracy_points", "+.2f", " points", " points"),
    ("Change in perplexity", "perplexity_percent", "+.2f", " %", " %"),
    ("Time", "seconds", ",.1f", " s", " s"),
)


def model_table(name: str, runs: Frame) -> Table:
    """The comparison of the models in the runs of one variant."""
    standard, deep = (runs[runs["model"] == model].set_index("seed") for model in (STANDARD, DEEP))
    one_phase = standard["phases"].max() == 1
    rows = []
    for title, column, form, unit, unit_of_difference in MODEL_ROWS:
        a, b = (arm[column].astype("float64") for arm in (standard, deep))
        if a.notna().any() and b.notna().any() and not (one_phase and "Change" in title):
            difference = _mean((b - a).dropna(), f"+{form.removeprefix('+')}", unit_of_difference)
            rows.append([title, _mean(a, form, unit), _mean(b, form, unit), difference])
    note = "Difference: deep supervision − Standard, within seeds."
    return _founding_table(f"{name}, comparison of models", MODEL_HEADS, rows, note)


# --- changes and differences ----------------------------------------------------------------------


def changes_table(changes: Frame) -> Table:
    """Each arm's change from the first phase to the last, in every metric."""
    rows = []
    for (variant, model), arm in changes.groupby(["variant", "model"], sort=False):
        most = arm.loc[arm["n"].idxmax(), ["n", "dropped"]]
        metrics = dict(arm.set_index("metric").iterrows())
        rows.append({"variant": variant, "model": model, **most} | metrics)

    def cell(metric: study.Metric) -> Callable[[Row], Cell]:
        return lambda row: _interval(row[metric.name], metric.decimals)

    columns = [
        *ARM,
        ("Seeds", "figure", lambda row: _of_all(row["n"], row["dropped"])),
        *((metric.heading, "figure", cell(metric)) for metric in METRICS),
    ]
    note = "Mean ± standard deviation over the seeds that completed, and its 95 % interval."
    return _table("Change from the first phase to the last", rows, columns, note, sortable=True)


def comparisons_table(title: str, judged: Frame) -> Table:
    """Comparisons of `comparisons.judge`: the verdict on accuracy, and what it rests on."""
    rows = judged.to_dict("records")
    for row in rows:
        accuracy = row["comparisons"].get(study.ACCURACY.name, comparisons.NOT_MADE)
        row |= {"effect_size": accuracy.effect_size, "sign_flip_p": accuracy.sign_flip_p}
        row["detectable"] = comparisons.detectable(row)

    def described(metric: study.Metric) -> Callable[[Row], Cell]:
        def cell(row: Row) -> Cell:
            own = row["comparisons"].get(metric.name, comparisons.NOT_MADE)
            low, high = own.interval(0.95)
            return _interval({"mean": own.mean, "low": low, "high": high}, metric.decimals)

        return cell

    columns: Columns = [
        ("Comparison", "name", comparisons.label),
        ("Model", "name", _model),
        ("Measured", "name", _text("measured")),
        ("Accuracy", "name", _text("verdict")),
        ("Change, points", "figure", _difference),
        ("Interval of the verdict", "figure", lambda row: _range(row, "low", "high")),
        ("Confidence", "figure", _confidence),
        ("95 % interval", "figure", lambda row: _range(row, "low_95", "high_95")),
        ("Seeds", "figure", lambda row: _of_all(row["n"], row["dropped"])),
        *([("Left out", "name", _text("left_out"))] if judged["dropped"].any() else []),
        ("p, corrected", "figure", _p("p_adjusted")),
        ("Equivalence p, corrected", "figure screen", _p("equivalence_p_adjusted")),
        ("Sign-flip p", "figure screen", _p("sign_flip_p")),
        ("Effect size", "figure screen", _number("effect_size", "+.2f")),
        ("Detectable, points", "figure", _number("detectable", ".2g")),
        ("Seeds to plan, in all", "figure", _plan),
        *((m.heading, "figure screen", described(m)) for m in (study.PERPLEXITY, study.LOSS)),
    ]
    looks = " and all looks" if "look" in judged else ""
    note = (
        f"Judged by accuracy as one family of {judged['family'].max()}{looks} (Bonferroni). Same: "
        "the interval lies within the margin. Detectable: the smallest true difference that so "
        "many seeds would find with a power of 80 %. Seeds to plan: how many in all, not added to "
        "these, would settle with that power whether there is a difference of the margin or none; "
        "the range comes from a spread that is known only roughly. Perplexity and loss: mean and "
        "95 % interval, without a verdict."
    )
    return _table(title, rows, columns, note, sortable=True)


def _confidence(row: Row) -> str:
    return comparisons.percent(row["confidence"]) if row["n"] > 1 else ""


def _difference(row: Row) -> Cell:
    return Cell(number_text(row["mean"], f"+.{comparisons.decimals(row)}f"), _sort(row["mean"]))


def _range(row: Row, low: str, high: str) -> Cell:
    if not math.isfinite(row[low]):
        return Cell("", "")
    form = f"+.{comparisons.decimals(row)}f"
    return Cell(f"{row[low]:{form}} to {row[high]:{form}}", row[low])


def _p(name: str) -> Callable[[Row], Cell]:
    return lambda row: Cell(
        "< 0.001" if row[name] < 0.001 else number_text(row[name], ".3f"), _sort(row[name])
    )


def _of_all(seeds: int, left_out: int) -> Cell:
    return Cell(f"{seeds} of {seeds + left_out}" if left_out else str(seeds), seeds)


def _plan(row: Row) -> Cell:
    seeds, low, high = comparisons.seeds_to_plan(row)
    return Cell("" if math.isnan(seeds) else comparisons.plan(seeds, low, high), _sort(seeds))


def growth_table(growths: Frame, mixing: Frame) -> Table:
    """Every arm's growths, of `growth.growths`, over its seeds.

    Args:
        mixing: of `growth.mixing`; it counts from a run's last growth.
    """
    last = growths["phase"] == growths.groupby("run")["phase"].transform("max")
    growths = growths.assign(mixing=growths["run"].map(mixing).where(last))
    rows = [
        {"variant": variant, "model": model, "phase": phase, "arm": arm}
        for (variant, model, phase), arm in growths.groupby(
            ["variant", "model", "phase"], sort=False
        )
    ]

    def growth_of(row: Row) -> str:
        return f"{row['phase']}: {listed(unique(row['arm']['layers']), 3)} layers"

    def over_seeds(cell: Callable[..., Cell | str], name: str, *how: Any) -> Callable[[Row], Any]:
        return lambda row: cell(row["arm"][name].astype("float64"), *how)

    def described(values: Frame, decimals: int) -> Cell:
        return _interval(vars(stats.summary(values)), decimals)

    def percent(values: Frame) -> Cell:
        return _interval(vars(stats.summary(100 * values)), 0, sign="")

    columns: Columns = [
        *ARM,
        ("Phase", "name", growth_of),
        ("Seeds", "figure", lambda row: str(len(row["arm"]))),
        ("Loss before", "figure", over_seeds(_mean, "loss_before", ".3f")),
        ("Loss after", "figure", over_seeds(_mean, "loss_after", ".3f")),
        ("Loss rose by, nats", "figure", over_seeds(described, "shock_nats", 3)),
        ("Accuracy: change, points", "figure", over_seeds(described, "accuracy_points", 2)),
        ("Back after, tokens", "figure", over_seeds(_tokens, "tokens_to_recovery")),
        *(
            [("As from scratch after", "figure", over_seeds(_tokens, "mixing"))]
            if len(mixing)
            else []
        ),
        ("Gradient in new layers, %", "figure", over_seeds(percent, "share_new")),
    ]
    note = (
        "At the last exit, before the first step after the growth, against the selected epoch of "
        "the phase before. Back after: training tokens until an epoch ended below the loss before. "
        "Gradient in new layers: their share of its norm over the first steps. Means ± standard "
        "deviation over seeds, with their 95 % intervals."
    )
    if len(mixing):
        note += (
            " As from scratch after: tokens until the loss is, within the margin, that of training "
            "from scratch with as many operations."
        )
    return _table("What growing did at once", rows, columns, note, sortable=True)


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
        ("Bits per byte", "figure", _number("bits_per_byte", ".4f")),
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
        f"The target is a loss that every seed of {study.variant_name(reference)} ended with or "
        "below. It counts at the final depth, interpolated between epochs. Geometric means over "
        "seeds; none where a seed did not get there."
    )
    title = "Compute and time to reach a target loss"
    return _table(title, reached, columns, note, sortable=True)


def speed_up_table(gains: Frame) -> Table:
    """The speed-up of growing, in each measure of compute."""
    rows = [
        {"variant": variant, "model": model, **arm[["reached", "seeds"]].max()}
        | dict(arm.set_index("measure").iterrows())
        for (variant, model), arm in gains.groupby(["variant", "model"], sort=False)
    ]

    def cell(measure: ledger.Measure) -> Callable[[Row], Cell]:
        def of(row: Row) -> Cell:
            if row["reached"] < row["seeds"]:
                return Cell(f"only {row['reached']:.0f} of {row['seeds']:.0f} got there", "")
            found = row[measure.column]
            percent = {name: 100 * found[name] for name in ("mean", "low", "high")}
            return _interval(percent, 0)

        return of

    columns = [
        *ARM,
        ("Reached by", "figure", lambda row: _share(row["reached"], row["seeds"])),
        ("In tokens, %", "figure", cell(ledger.TOKENS)),
        ("In FLOP with head, %", "figure", cell(ledger.FLOPS)),
        ("In FLOP without, %", "figure", cell(ledger.BODY)),
        ("In time, %", "figure", cell(ledger.SECONDS)),
    ]
    note = (
        "Compute from scratch / compute of growing, all phases, to the loss that the run from "
        "scratch of the same seed ended with, reached at the final depth, − 1 (Du et al. 2024): "
        "+50 means that from scratch takes half as much again, minus that growing was slower. "
        "Geometric mean and 95 % interval over seeds; no average where a seed did not get there."
    )
    return _table("Speed-up of growing against from scratch", rows, columns, note, sortable=True)


def _share(part: int, whole: int) -> Cell:
    return Cell(f"{part:.0f} of {whole:.0f}", part / max(1, whole))


# --- tokenizers -----------------------------------------------------------------------------------


def tokenizers_table(rows: Frame) -> Table:
    """What arms come to with different tokenizers; see `tokenizers.across`."""

    def difference(row: Row) -> Cell:
        return _interval({"mean": row["difference"], "low": row["low"], "high": row["high"]}, 4)

    columns = [
        ("On", "name", _text("condition")),
        ("Tokenizer (vocabulary)", "name", _text("tokenizer")),
        *ARM,
        ("Seeds", "figure", lambda row: str(row["seeds"])),
        ("Bits per byte", "figure", _number("mean", ".4f")),
        ("± sd", "figure", _number("sd", ".4f")),
        ("Difference to the first", "figure", difference),
        ("Bytes of text", "figure", _number("bytes", ",.0f")),
        ("Unknown words", "figure", _number("unknown", ".1%")),
    ]
    note = (
        "Bits per byte: loss x tokens / (bytes x ln 2), of the text that runs are judged on. Minus "
        "is better. Difference: within seeds, to the tokenizer that stands first for the same text "
        "and arm, with its 95 % interval. Windows of other tokens end elsewhere in the text, so "
        "compare where all of it is read, or bytes are about equal. A word that is unknown says "
        "nothing of its text and, where many are, costs little; and lower-casing and white space "
        "are not predicted by words at all: both flatter them."
    )
    return _table("Bits per byte", rows, columns, note, sortable=True)


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
        ("Perplexity fell by, %", "figure", _number("perplexity_percent", "+.2f")),
        ("Bits per byte", "figure", _number("last_bits_per_byte", ".4f")),
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
        "Tokenizer": "tokenizer",
        "Vocabulary": "vocab_size",
        "Validation tokens": "validation_tokens",
        "Validation bytes": "validation_bytes",
    }
    rows = [[title, listed(unique(runs[column]), 6)] for title, column in columns.items()]
    rows.append(["Seeds", ranges(runs["seed"])])
    heads = [("What", "name"), ("Values in these runs", "prose")]
    return Table("With what it ran", heads, [row for row in rows if row[1]])


# --- numbers --------------------------------------------------------------------------------------


def _tokens(values: Frame) -> Cell:
    """Mean and 95 % interval of tokens; where any are infinite, in how many seeds they are."""
    tokens = values.dropna().to_numpy(dtype=float)
    if never := int(np.isinf(tokens).sum()):
        return Cell(f"never in {never} of {len(tokens)}", math.inf)
    found = stats.summary(tokens)
    if not found.n:
        return Cell("", "")
    between = f" ({engineering(found.low)} to {engineering(found.high)})" if found.n > 1 else ""
    return Cell(engineering(found.mean) + between, found.mean)


def _mean(values: Any, form: str, unit: str = "") -> str:
    """Mean ± standard deviation, or the value where there is one."""
    array = np.asarray(values, dtype=float)
    known = array[np.isfinite(array)]
    if not len(known):
        return ""
    spread = f" ± {known.std(ddof=1):{form.replace('+', '')}}" if len(known) > 1 else ""
    return f"{known.mean():{form}}{spread}{unit}"


def _mean_seconds(values: Any) -> str:
    mean = np.nanmean(np.asarray(values, dtype=float))
    return duration(mean) if mean >= 100 else _mean(values, ".1f", " s")


def _interval(summary: Any, decimals: int, sign: str = "+") -> Cell:
    """`+0.1 ± 0.2 (-0.1 to +0.3)`, as far as it is known."""
    mean, sd, low, high = (summary.get(name, math.nan) for name in ("mean", "sd", "low", "high"))
    form = f"{sign}.{decimals}f"
    text = number_text(mean, form)
    if math.isfinite(sd):
        text += f" ± {sd:.{decimals}f}"
    if math.isfinite(low):
        text += f" ({low:{form}} to {high:{form}})"
    return Cell(text, _sort(mean))


def _sort(value: Any) -> float | str:
    return "" if pd.isna(value) else float(value)


def unique(values: Frame) -> list[str]:
    """The values that there are, as text."""

    def text(value: Any) -> str:
        if isinstance(value, bool | np.bool_):
            return "yes" if value else "no"
        return f"{value:,}" if isinstance(value, Integral) else str(value)

    return [text(v) for v in plain_values(values.drop_duplicates()) if v is not None]
