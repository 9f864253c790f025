"""What many runs are together: arms, their changes, and which arm is a control of which.

An **arm** is what is repeated over seeds: a *variant* (an experiment, and what else was set)
trained as a *model* (a loss at the last layer, or at every layer) under a *condition* (the corpus,
and any setting that was swept across the experiments alike). Only completed runs give figures, each
experiment and seed once; those that did not complete are known to their arms, so that a comparison
can tell how many seeds it lacks and why. Accuracies are in percent of tokens and their differences
in points, perplexities compare in percent, losses in nats per token; in every change and difference
a plus is an improvement.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import pandas as pd
import yaml

from proglayer.console import one_line
from proglayer.report import stats
from proglayer.results import GROUPS, NOT_THE_EXPERIMENT, PLACE_OF_TEXT, Results, keys_and_values
from proglayer.store.record import RunState

# A pandas frame or series. Its own types cannot follow a selection, which may be either.
Frame = Any

ORIGINAL = "original"
FROM_SCRATCH = "control_from_scratch"
KEEP_TRAINING = "control_keep_training"
UNFROZEN = "control_unfrozen"
# The order of variants in a report; others follow in the order of their runs.
ORDER = (
    ORIGINAL,
    "more_layers",
    "wider",
    "gradual_unfreezing",
    "longer_training",
    "split_lr",
    FROM_SCRATCH,
    KEEP_TRAINING,
    "control_head_only",
    UNFROZEN,
)
STANDARD = "standard"
DEEP = "deep_supervision"
MODEL_NAMES = {STANDARD: "Standard", DEEP: "Deep supervision"}


def model_name(model: str) -> str:
    """A model for people."""
    return MODEL_NAMES.get(model, model)


def variant_name(variant: str) -> str:
    """A variant for people: `from scratch` for `control_from_scratch`."""
    experiment, space, rest = variant.partition(" ")
    if experiment in ORDER:
        experiment = experiment.removeprefix("control_").replace("_", " ")
    return experiment + space + rest


# A label longer than this is cut: it has to fit beside a figure.
LONGEST_LABEL = 60


@dataclass(frozen=True)
class Margins:
    """Differences within these count as none. Perplexity's follows from the loss's."""

    points: float = 0.1
    nats: float = 0.01

    @property
    def percent(self) -> float:
        """The fall in perplexity, in percent, that a fall of `nats` in the loss is."""
        return 100 * -math.expm1(-self.nats)


@dataclass(frozen=True)
class Metric:
    """A metric that arms are judged by: its column of change, unit, decimals, and heading."""

    name: str
    change: str
    unit: str
    decimals: int
    heading: str

    def margin(self, margins: Margins) -> float:
        """The margin of this metric, in its unit."""
        return {"points": margins.points, "%": margins.percent, "nats": margins.nats}[self.unit]


ACCURACY = Metric("accuracy", "accuracy_change_points", "points", 2, "Accuracy: change, points")
PERPLEXITY = Metric("perplexity", "perplexity_change_percent", "%", 1, "Perplexity fell by, %")
LOSS = Metric("loss", "loss_change_nats", "nats", 3, "Loss fell by, nats")
METRICS = (ACCURACY, PERPLEXITY, LOSS)


@functools.cache
def founding() -> dict[str, Any]:
    """The founding experiment's published run, and the settings of its repeats."""
    text = resources.files("proglayer.report").joinpath("founding.yaml").read_text("utf-8")
    return yaml.safe_load(text)


def published(model: str) -> tuple[Frame, Frame]:
    """The published run of this model, with what the tables read of a run and of its phases."""
    own = founding()["published"][model]
    phases = pd.DataFrame(own["phases"]).assign(run="published", evaluation_seconds=0.0)
    phases["phase"] = range(1, len(phases) + 1)
    last = phases.iloc[-1]
    ends = {
        "last_accuracy_percent": last["validation_accuracy_percent"],
        "last_perplexity": last["validation_perplexity"],
    }
    run = {"run": "published", "model": model, "seed": 42, "phases": len(phases)}
    return pd.DataFrame([run | own["change"] | ends]), phases


# --- arms -----------------------------------------------------------------------------------------

# What does not make another arm: where and how it runs, its seed, and what its corpus's
# fingerprint covers.
_ASIDE = {f"config.{name}" for name in (*NOT_THE_EXPERIMENT, *PLACE_OF_TEXT, "seed")}
_NO_VARIATION = {"seed", "model", "experiment", "data"}


@dataclass(frozen=True, eq=False)
class Arms:
    """Completed runs, each with its arm; and the others of these arms' seeds.

    `runs` has one row a run, in the order of conditions, variants, models and seeds: `run`,
    `condition` (a number), `variant`, `experiment` (of runs that name none, the original's if that
    is what all of them are), `base` (the experiment as it is, nothing else set), `model`, `seed`,
    `grows`, the changes of METRICS (nan for a run of one phase), and the columns of
    `Results.runs`. `conditions` names each condition. `lacking` has the same columns for the runs
    of these arms that did not complete, of seeds without a completed run: their figures are nan,
    and `lacks` is their status (it is missing in `runs`).
    """

    runs: Frame
    conditions: tuple[str, ...]
    lacking: Frame

    def of(self, condition: int) -> Frame:
        """The completed runs of one condition."""
        return self.runs[self.runs["condition"] == condition]

    def asked(self, condition: int) -> Frame:
        """The runs of one condition, and after them those that did not complete."""
        lacking = self.lacking[self.lacking["condition"] == condition]
        own = self.of(condition)
        return pd.concat([own, lacking], ignore_index=True) if len(lacking) else own


def arms(results: Results) -> Arms:
    """Sort completed runs into arms."""
    every: Frame = results.distinct().runs
    every = every[every["seed"].notna()]
    runs = every[every["status"] == RunState.completed].reset_index(drop=True)
    runs["lacks"] = None
    runs["experiment"] = runs["experiment"].astype(object).where(runs["experiment"].notna(), "")
    runs["model"] = runs["model"].astype(object).where(runs["model"].notna(), "unknown model")
    for name in ("experiment", "model"):
        runs[name] = runs[name].map(_label)
    runs["seed"] = runs["seed"].astype("int64")
    unnamed = runs["experiment"] == ""
    if unnamed.any() and not differs_from_original(runs[unnamed]):
        runs.loc[unnamed, "experiment"] = ORIGINAL
    varied = swept(runs)
    conditions = [column for column in varied if _is_condition(runs, column)]
    runs["condition"], names = _conditions(runs, conditions)
    runs["variant"], runs["base"] = _variants(runs, [c for c in varied if c not in conditions])
    phases: Frame = results.phases
    grown = set(phases.loc[phases["new_layers"].map(bool), "run"])
    runs["grows"] = runs["run"].isin(grown) & (runs["phases"].fillna(0) > 1)
    _add_ends(runs, phases)
    rank: dict[Any, int] = {name: number for number, name in enumerate(ORDER)}
    # Duplicates were taken out by their settings; nothing may pair two runs of one arm and seed.
    runs = runs.drop_duplicates(["condition", "variant", "model", "seed"], keep="last")
    order = pd.DataFrame(
        {
            "condition": runs["condition"],
            "experiment": runs["experiment"].map(lambda name: rank.get(name, len(rank))),
            "base": ~runs["base"],
            "variant": pd.factorize(runs["variant"])[0],
            "model": runs["model"].map(lambda name: (STANDARD, DEEP, name).index(name)),
            "name": runs["model"],
            "seed": runs["seed"],
        }
    )
    order = order.sort_values(list(order.columns), kind="stable").index
    runs = runs.loc[order].reset_index(drop=True)
    return Arms(runs, names, _lacking(runs, every[every["status"] != RunState.completed]))


# What a run's place in the study follows from, its seed apart.
_ARM = ["condition", "variant", "model"]


def _lacking(runs: Frame, others: Frame) -> Frame:
    """Those of `others`, which did not complete, that belong to the arms of `runs`: what was asked
    of them is the same, the seed apart, and so is their text, if they came to read one.
    """
    arms: Frame = runs.assign(asked=runs["overrides"].map(_without_seed))
    settings = [c for c in runs.columns if c.startswith("config.")]
    # What a run of an arm is known by before it ends; it has no metrics.
    known = [*_ARM, "experiment", "base", "grows", "phases", "first_layers", "last_layers"]
    known += ["corpus_fingerprint", "asked", *settings]
    own: Frame = others[["run", "seed", "status", "corpus_fingerprint"]]
    own = own.assign(asked=others["overrides"].map(_without_seed))
    arms = arms[known].drop_duplicates([*_ARM, "asked"])
    own = own.merge(arms, on="asked", suffixes=("_own", ""))
    text = own["corpus_fingerprint_own"]
    own = own[(text.isna() | (text == own["corpus_fingerprint"])).fillna(False)]
    own = own.drop_duplicates("run").drop_duplicates([*_ARM, "seed"], keep="last")
    own = own.assign(seed=own["seed"].astype("int64"), lacks=own["status"])
    there = pd.MultiIndex.from_frame(runs[[*_ARM, "seed"]])
    own = own[~pd.MultiIndex.from_frame(own[[*_ARM, "seed"]]).isin(there)]
    return own.reindex(columns=runs.columns).reset_index(drop=True)


def _without_seed(overrides: Any) -> str:
    """What was asked of a run, whatever its seed, and where and how it was to run."""
    given = [] if pd.isna(overrides) else shlex.split(overrides)
    aside = {"seed", *NOT_THE_EXPERIMENT}
    return shlex.join(sorted(f"{k}={v}" for k, v in keys_and_values(given) if k not in aside))


def differs_from_original(runs: Frame) -> list[str]:
    """The settings, those of the text apart, in which any of these runs is not the original."""
    differing = []
    for name, value in founding()["settings"].items():
        # Frames that an earlier version wrote lack a setting that came after it.
        known = runs.get(f"config.{name}", pd.Series(dtype=object))
        if any(_value(own) != _value(value) for own in known.unique()):
            differing.append(name)
    weights = zip(runs["model"], runs["config.model.exit_weights"], strict=True)
    if set(weights) - {(STANDARD, "last"), (DEEP, "uniform")}:
        differing.append("model.exit_weights")
    return differing


def like_the_original(runs: Frame) -> str | None:
    """The variant that the published figures stand beside, if there is one: the original, or else
    one with its settings.
    """
    alike = (
        str(variant)
        for variant, own in runs.groupby("variant", sort=False)
        if not differs_from_original(own)
    )
    return plain_variant(runs, ORIGINAL) or next(alike, None)


def _label(text: Any) -> str:
    """Text of a configuration as a name: one printable line, not too long."""
    line = one_line(str(text))
    return line if len(line) <= LONGEST_LABEL else line[: LONGEST_LABEL - 1] + "…"


def swept(runs: Frame) -> list[str]:
    """The columns of settings that differ between these runs, those of place and text apart."""
    return [
        column
        for column in runs.columns
        if column.startswith("config.")
        and column not in _ASIDE
        and not column.startswith("config.data.")
        and runs[column].nunique(dropna=False) > 1
    ]


def _is_condition(runs: Frame, column: str) -> bool:
    """Whether a setting varies inside most of the experiments: then it divides them all alike.

    What varies inside one experiment only makes variants of that one.
    """
    kinds = runs.groupby(["corpus_fingerprint", "experiment", "model"], dropna=False)
    varies = kinds[column].nunique(dropna=False) > 1
    inside = set(varies[varies].index.get_level_values("experiment"))
    experiments = runs["experiment"].nunique()
    return experiments > 1 and 2 * len(inside) > experiments


def _conditions(runs: Frame, columns: Sequence[str]) -> tuple[Frame, tuple[str, ...]]:
    """A number for each run's condition, in the order of their first runs, and their names."""
    keys = ["corpus_fingerprint", *columns]
    numbers = runs.groupby(keys, dropna=False, sort=False).ngroup()
    data = [c for c in runs.columns if c.startswith("config.data.") and c not in _ASIDE]
    data = [column for column in data if runs[column].nunique(dropna=False) > 1]
    shown = [column for column in data if column != "config.data.source"]
    names: list[str] = []
    for _, row in runs.loc[~numbers.duplicated()].iterrows():
        corpus = row["corpus"] if pd.notna(row["corpus"]) else "unknown corpus"
        names.append(_label(" ".join([str(corpus), *values_text(row, [*columns, *shown])])))
    for number, name in enumerate(names):
        if names.count(name) > 1:
            names[number] = f"{name} ({number + 1})"
    return numbers, tuple(names)


def _variants(runs: Frame, columns: Sequence[str]) -> tuple[Frame, Frame]:
    """Each run's variant: its experiment, and the settings that set it apart within that.

    The arm of an experiment with the fewest overrides carries its plain name.
    """
    labels = pd.Series("", runs.index, dtype=object)
    base = pd.Series(False, runs.index)
    groups = {name: column for name, column in GROUPS.items() if name not in _NO_VARIATION}
    kinds = runs.groupby(["condition", "experiment", "model"], sort=False)
    varies = kinds[list(dict.fromkeys([*columns, *groups.values()]))].nunique(dropna=False) > 1
    for kind, group in kinds:
        experiment = str(kind[1])
        varying = [c for c in columns if varies.loc[kind, c]]
        if not varying:
            labels[group.index], base[group.index] = experiment or "as configured", True
            continue
        choices = [name for name, column in groups.items() if varies.loc[kind, column]]
        arm = group.groupby(varying, dropna=False, sort=False).ngroup()
        fewest = group["overrides"].fillna("").map(_own_overrides).groupby(arm).min()
        plain = fewest.index[fewest == fewest.min()]
        plain_arm = plain[0] if len(plain) == 1 else None
        first: dict[Any, Frame] = {
            number: group.loc[index] for index, number in arm.drop_duplicates().items()
        }
        named: dict[int, str] = {}
        for number, row in first.items():
            label = experiment or "base"
            if number != plain_arm:
                parts = _parts(row, first.get(plain_arm), choices, varying)
                label = _label(" ".join([*([experiment] if experiment else []), *parts]))
            named[number] = f"{label} ({number + 1})" if label in named.values() else label
        labels[group.index], base[group.index] = arm.map(named), arm == plain_arm
    return labels.astype("str"), base


def _own_overrides(text: str) -> int:
    """How many overrides say something else than which seed, model, experiment and text."""
    given = keys_and_values(shlex.split(text))
    return sum(key.split(".")[0] not in _NO_VARIATION for key, _ in given)


def _parts(
    row: Frame, base: Frame | None, choices: Sequence[str], settings: Sequence[str]
) -> list[str]:
    """What sets an arm apart, by its groups' choices first, then by settings."""

    def differs(column: str) -> bool:
        return base is None or _value(row[column]) != _value(base[column])

    groups = [group for group in choices if differs(GROUPS[group])]
    chosen = [f"{group}={_value(row[GROUPS[group]])}" for group in groups]
    rest = [c for c in settings if c.split(".")[1] not in groups and differs(c)]
    return chosen + values_text(row, rest)


def values_text(row: Frame, columns: Iterable[str]) -> list[str]:
    """Settings of a run as text, `growth.init=stack`; `columns` are those of `Results.runs`."""
    return [f"{c.removeprefix('config.')}={_value(row[c])}" for c in columns]


def _value(value: Any) -> str:
    if pd.isna(value):
        return "null"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _add_ends(runs: Frame, phases: Frame) -> None:
    """How each run ended, and its changes from the first phase; none for a run of one phase."""
    phases = phases.sort_values("phase", kind="stable")
    first, last = (
        phases.drop_duplicates("run", keep=which).set_index("run").reindex(runs["run"].to_numpy())
        for which in ("first", "last")
    )
    runs["stopped"] = last["stopped"].to_numpy(dtype=object)
    runs["last_epochs"] = last["epochs"].to_numpy(dtype=float, na_value=math.nan)
    runs["validation_accuracy"] = runs["last_accuracy_percent"].astype("float64")
    runs["validation_loss"] = runs["last_loss"].astype("float64")
    # Runs of a time without a test text, or of several texts, cannot be compared on one.
    # Frames that an earlier version wrote know of no test split of its own.
    texts = runs.reindex(columns=["corpus_fingerprint", "test_fingerprint"])
    texts = texts.groupby("corpus_fingerprint", dropna=False)["test_fingerprint"]
    tested = bool(len(runs)) and bool(last["test_loss"].notna().all())
    tested = tested and bool((texts.nunique(dropna=False) == 1).all())
    runs["judged_on"] = "test" if tested else "validation"

    def judged(ends: Frame, name: str, otherwise: str) -> np.ndarray:
        column = ends[f"test_{name}"].to_numpy() if tested else runs[otherwise]
        return np.asarray(column, dtype=float)

    runs["end_accuracy"] = judged(last, "accuracy_percent", "last_accuracy_percent")
    runs["end_loss"] = judged(last, "loss", "last_loss")
    runs["end_bits_per_byte"] = judged(last, "bits_per_byte", "last_bits_per_byte")
    steps = (runs["phases"].fillna(0) > 1).to_numpy(dtype=bool)
    before = np.where(steps, judged(first, "accuracy_percent", "first_accuracy_percent"), math.nan)
    runs[ACCURACY.change] = runs["end_accuracy"] - before
    runs[LOSS.change] = (judged(first, "loss", "first_loss") - runs["end_loss"]).where(steps)
    runs[PERPLEXITY.change] = -100 * np.expm1(-runs[LOSS.change])


# --- changes ----------------------------------------------------------------------


def changes(runs: Frame) -> Frame:
    """Each arm's change in each figure over its seeds.

    Args:
        runs: of `Arms`, of one condition; those that did not complete count as dropped.

    Returns:
        one row per arm and figure: `variant`, `model`, `metric`, `unit`, and the fields of
        `stats.Summary`. Arms of one phase have none.
    """
    rows = []
    grown = runs[runs["phases"].fillna(0) > 1]
    for (variant, model), arm in grown.groupby(["variant", "model"], sort=False):
        for metric in METRICS:
            summary = stats.summary(arm[metric.change].to_numpy(dtype=float))
            rows.append([variant, model, metric.name, metric.unit, *vars(summary).values()])
    fields = [field.name for field in dataclasses.fields(stats.Summary)]
    return pd.DataFrame(rows, columns=["variant", "model", "metric", "unit", *fields])


def plain_variant(runs: Frame, experiment: str) -> str | None:
    """The variant that is this experiment and nothing else; else its first one; None without."""
    named = runs["experiment"] == experiment
    plain = named & runs["base"]
    variants = runs["variant"][plain if plain.any() else named]
    return str(variants.iloc[0]) if len(variants) else None


def controls(runs: Frame, experiment: str) -> dict[str, str]:
    """Growing variant -> the variant of this control that is of its size.

    Training from scratch is a control of the depth and width that growing ends with, training on
    of those that it begins with. Variants of which no such control was run are left out.
    """
    end = "first_layers" if experiment == KEEP_TRAINING else "last_layers"
    size = [end, "config.model.dim"]
    runs = runs.dropna(subset=size)
    held = runs[runs["experiment"] == experiment]
    held = held.assign(
        cut=held["stopped"].astype(str).str.startswith("max_epochs"),
        tokens=held["tokens"].astype("float64").fillna(0),
    )
    how = {**dict.fromkeys(size, "first"), "cut": "mean", "tokens": "max", "base": "any"}
    held = held.groupby("variant", sort=False).agg(how).reset_index()
    # Rather one that `max_epochs` did not cut, else the longest; then the plain one.
    held["cut"] = held["cut"] >= 0.5
    held["tokens"] *= held["cut"]
    order = {"cut": True, "tokens": False, "base": False}
    held = held.sort_values(list(order), ascending=list(order.values()), kind="stable")
    growing = runs[runs["grows"].astype(bool)].drop_duplicates("variant")[["variant", *size]]
    pairs = growing.merge(held.drop_duplicates(size), on=size, suffixes=("", "_held"))
    return dict(zip(pairs["variant"], pairs["variant_held"], strict=True))


def differing(runs: Frame, reference: str) -> dict[str, str]:
    """Variant -> the settings in which it differs from `reference`, whatever the model."""
    varied = [column for column in swept(runs) if column != "config.model.exit_weights"]
    first = runs.drop_duplicates("variant").set_index("variant")[varied].map(_value)
    differs = first.ne(first.loc[reference]).rename(columns=lambda c: c.removeprefix("config."))
    return {str(variant): ", ".join(differs.columns[own]) for variant, own in differs.iterrows()}


def has_seeds(runs: Frame) -> bool:
    """Whether any arm was run with more than one seed."""
    return bool(len(runs)) and bool(runs.groupby(["variant", "model"]).size().max() > 1)


def single_seeds(runs: Frame) -> Frame:
    """The completed runs whose arm has no other."""
    return runs[~runs.duplicated(["variant", "model"], keep=False)]


def binomial_errors(runs: Frame) -> Frame:
    """What the size of the text that is judged on leaves unsure of each model's accuracy.

    Returns:
        one row per model: `model`, `accuracy_percent` (mean), `tokens`, `error_points` (of an
        accuracy), and `error_of_difference`: the largest that the text gives a difference of two.
        McNemar's (1947): only tokens that one model gets right and the other wrong count, and how
        many those are is taken as if the models erred unrelatedly; the more alike they are, the
        smaller the true error. It does not shrink with more seeds that read the same text.
    """
    rows = []
    for model, group in runs.groupby("model", sort=False):
        accuracy = float(np.nanmean(group["end_accuracy"]))
        text = group["judged_on"].iloc[0]
        tokens = (group[f"{text}_windows"] * group["seq_len"]).dropna()
        if len(tokens) and math.isfinite(accuracy):
            count, share = int(tokens.min()), accuracy / 100
            error = stats.binomial_error(share, count)
            rows.append([model, accuracy, count, error, math.sqrt(2) * error])
    columns = ["model", "accuracy_percent", "tokens", "error_points", "error_of_difference"]
    return pd.DataFrame(rows, columns=columns)
