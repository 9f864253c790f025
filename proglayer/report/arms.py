"""Which runs are one arm, what each came to, and which arm is a control of which.

An **arm** is what is repeated over seeds: a *variant* (an experiment, and what else was set)
trained as a *model* (a loss at the last layer, or at every layer) under a *condition* (the corpus,
and any setting that was swept across the experiments alike). Only completed runs give figures, each
experiment and seed once; those that did not complete are known to their arms, so that a comparison
can tell how many seeds it lacks and why. Accuracies are in percent of tokens and their differences
in points, losses in nats per token; a change is the last phase's figure - the first one's, so that
a plus is better of accuracy and a minus of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import pandas as pd

from proglayer.report import stats
from proglayer.results import Results
from proglayer.results.variants import asked_of, name_variants, settings_text, swept
from proglayer.run.record import RunState
from proglayer.training.stopping import StopReason

# A pandas frame or series. Its own types cannot follow a selection, which may be either.
Frame = Any

ORIGINAL = "original"
FROM_SCRATCH = "control_from_scratch"
KEEP_TRAINING = "control_keep_training"
UNFROZEN = "control_unfrozen"
# The order of variants in a report; others follow in the order of their runs.
ORDER = (
    *(ORIGINAL, "more_layers", "wider", "gradual_unfreezing", "longer_training", "split_lr"),
    *(FROM_SCRATCH, KEEP_TRAINING, "control_head_only", UNFROZEN),
)
STANDARD = "standard"
DEEP = "deep_supervision"
EXIT_WEIGHTS = "config.model.exit_weights"  # what makes the model


class Metric(StrEnum):
    """What arms are judged by (accuracy), and what is described beside it."""

    accuracy = "accuracy"
    loss = "loss"

    def last(self, text: str) -> str:
        """The column of `Arms.runs` with a run's figure on a text, test or validation."""
        return f"last_{text}_{'accuracy_percent' if self is Metric.accuracy else 'loss'}"

    def change(self, text: str) -> str:
        """The column with its change from the first phase to the last."""
        return f"{text}_{self}_change_{'points' if self is Metric.accuracy else 'nats'}"


# Differences in accuracy within so many points count as none.
MARGIN = 0.1


# --- arms -----------------------------------------------------------------------------------------

_ARM = ["condition", "variant", "model"]


@dataclass(frozen=True, eq=False)
class Arms:
    """Completed runs, each with its arm; and the others of these arms' seeds.

    `runs` has one row a run, in the order of conditions, variants, models and seeds: the columns of
    `Results.runs`, and `condition` (a number), `variant` (within the condition), `base` (the
    experiment as it is, nothing else set), `grows`, `cut` (`max_epochs` ended its last phase),
    `judged_on` (test or validation, the same for all), `same_as` (the earlier variant whose models
    its arm trained again, bit for bit; else missing).
    `conditions` names each condition. `lacking` has the same columns for the runs of these arms
    that did not complete, of seeds without a completed run: their figures are nan, and `lacks` is
    their status (it is missing in `runs`).
    """

    runs: Frame
    conditions: tuple[str, ...]
    lacking: Frame

    def of(self, condition: int) -> Frame:
        """Return the completed runs of one condition."""
        return self.runs[self.runs["condition"] == condition]

    def asked(self, condition: int) -> Frame:
        """Return the runs of one condition, and after them those that did not complete."""
        lacking = self.lacking[self.lacking["condition"] == condition]
        own = self.of(condition)
        return pd.concat([own, lacking], ignore_index=True) if len(lacking) else own


def arms(results: Results) -> Arms:
    """Sort completed runs into arms."""
    every: Frame = results.distinct().runs
    every = every[every["seed"].notna()]
    runs = every[every["status"] == RunState.completed].reset_index(drop=True)
    runs["lacks"] = None
    for name, otherwise in (("experiment", ""), ("model", "unknown model")):
        runs[name] = runs[name].astype(object).where(runs[name].notna(), otherwise)
    runs["seed"] = runs["seed"].astype("int64")
    varied = swept(runs)
    conditions = [column for column in varied if _is_condition(runs, column)]
    runs["condition"], names = _conditions(runs, conditions)
    settings = [column for column in varied if column not in conditions]
    variants, runs["base"] = name_variants(runs, settings, ["condition"])
    runs["variant"] = variants.astype("str")
    _add_ends(runs, results.phases)
    # Duplicates were taken out by their settings; nothing may pair two runs of one arm and seed.
    runs = runs.drop_duplicates([*_ARM, "seed"], keep="last")
    order = pd.DataFrame(
        {
            "condition": runs["condition"],
            "experiment": _rank(runs["experiment"], ORDER),
            "base": ~runs["base"],
            "variant": pd.factorize(runs["variant"])[0],
            "model": _rank(runs["model"], (STANDARD, DEEP)),
            "name": runs["model"],
            "seed": runs["seed"],
        },
        index=runs.index,
    )
    runs = runs.loc[order.sort_values(list(order), kind="stable").index].reset_index(drop=True)
    runs["same_as"] = _same_as(runs)
    return Arms(runs, names, _lacking(runs, every[every["status"] != RunState.completed]))


def _same_as(runs: Frame) -> list[str | None]:
    """Return of each run the earlier variant that trained the models of all its arm's seeds, too:
    settings such as a longest phase need not have had an effect.
    """
    arms = {which: set(own["trained"]) for which, own in runs.groupby(_ARM, sort=False)}
    same: dict[Any, str | None] = {}
    for (condition, variant, model), own in arms.items():
        earlier = (
            other
            for (its, other, of), whole in arms.items()
            if (its, of) == (condition, model) and other != variant and own <= whole
            if (its, other, of) in same and same[its, other, of] is None
        )
        same[condition, variant, model] = next(earlier, None)
    return [same[which] for which in runs[_ARM].itertuples(index=False, name=None)]


def _rank(names: Frame, order: Sequence[str]) -> Frame:
    return names.map({name: place for place, name in enumerate(order)}).fillna(len(order))


def _lacking(runs: Frame, others: Frame) -> Frame:
    """Return those of `others`, which did not complete, that belong to the arms of `runs`: what was
    asked of them is the same, the seed apart, and so is their text, if they came to read one.
    """
    # What a run of an arm is known by before it ends; it has no metrics.
    known = [*_ARM, "experiment", "base", "grows", "phases", "first_layers", "last_layers"]
    known += ["corpus_fingerprint", "asked", *(c for c in runs if c.startswith("config."))]
    arms: Frame = runs.assign(asked=runs["overrides"].map(asked_of))
    arms = arms[known].drop_duplicates([*_ARM, "asked"])
    own: Frame = others[["run", "seed", "status", "corpus_fingerprint"]]
    own = own.assign(asked=others["overrides"].map(asked_of), lacks=others["status"])
    own = own.merge(arms, on="asked", suffixes=("_own", ""))
    text = own["corpus_fingerprint_own"]
    own = own[(text.isna() | (text == own["corpus_fingerprint"])).fillna(False)]
    own = own.drop_duplicates("run").drop_duplicates([*_ARM, "seed"], keep="last")
    there = pd.MultiIndex.from_frame(runs[[*_ARM, "seed"]])
    own = own.astype({"seed": "int64"})
    own = own[~pd.MultiIndex.from_frame(own[[*_ARM, "seed"]]).isin(there)]
    return own.reindex(columns=runs.columns).reset_index(drop=True)


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
    """Number each run's condition, in the order of their first runs, and name them."""
    numbers = runs.groupby(["corpus_fingerprint", *columns], dropna=False, sort=False).ngroup()
    data = [c for c in runs.columns if c.startswith("config.data.") and c not in OF_NO_TEXT]
    data = [column for column in data if runs[column].nunique(dropna=False) > 1]
    names: list[str] = []
    for _, row in runs.loc[~numbers.duplicated()].iterrows():
        corpus = row["corpus"] if pd.notna(row["corpus"]) else "unknown corpus"
        name = " ".join([str(corpus), *settings_text(row, [*columns, *data])])
        names.append(f"{name} ({len(names) + 1})" if name in names else name)
    return numbers, tuple(names)


# Settings of the text that a condition is not named by: it has the corpus's name.
OF_NO_TEXT = {f"config.data.{name}" for name in ("source", "path", "files", "cache_dir")}


def _add_ends(runs: Frame, phases: Frame) -> None:
    """Add how each run ended, and the text that all are judged on."""
    phases = phases.sort_values("phase", kind="stable")
    last = phases.drop_duplicates("run", keep="last").set_index("run").reindex(runs["run"])
    grown = set(phases.loc[phases["new_layers"].fillna("").ne(""), "run"])
    runs["grows"] = runs["run"].isin(grown) & (runs["phases"].fillna(0) > 1)
    models = last["stage"].astype(str) + last["best_epoch"].astype(str)
    runs["trained"] = models.to_numpy()
    runs["cut"] = (last["stopped"] == StopReason.max_epochs).fillna(False).to_numpy(dtype=bool)
    runs["last_epochs"] = last["epochs"].to_numpy(dtype=float, na_value=math.nan)
    # Runs without a test text, or of several texts, cannot be compared on one.
    texts = runs.reindex(columns=["corpus_fingerprint", "test_fingerprint"])
    texts = texts.groupby("corpus_fingerprint", dropna=False)["test_fingerprint"]
    tested = runs["last_test_loss"].notna().all() and (texts.nunique(dropna=False) == 1).all()
    runs["judged_on"] = "test" if len(runs) and tested else "validation"


# --- what arms come to, and their controls --------------------------------------------------------


def plain_variant(runs: Frame, experiment: str) -> str | None:
    """Return the variant that is this experiment and nothing else; else its first; else None."""
    named = runs["experiment"] == experiment
    plain = named & runs["base"]
    variants = runs["variant"][plain if plain.any() else named]
    return str(variants.iloc[0]) if len(variants) else None


# Settings by which a growing arm and its control differ.
OF_GROWING = tuple(
    f"config.{each}" for each in ("phase.", "growth", "freeze.", "initial_layers", "added_layers")
)


def controls(runs: Frame, experiment: str) -> dict[str, str]:
    """Map each growing variant to the variant of this control that is of its size. Where no run has
    the control's name, those with its phases are it, each of those that share its other settings.

    Training from scratch is a control of the depth and width that growing ends with, training on
    of those that it begins with. Variants of which no such control was run are left out.
    """
    end = "first_layers" if experiment == KEEP_TRAINING else "last_layers"
    size = [end, "config.model.dim"]
    runs = runs.dropna(subset=size)
    held = runs[runs["experiment"] == experiment]
    if held.empty:
        held = runs[runs["config.phase.schedule"] == experiment.removeprefix("control_")]
        size += [c for c in swept(held) if not c.startswith((*OF_GROWING, size[1]))]
    held = held.assign(tokens=held["tokens"].astype("float64").fillna(0))
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


def binomial_errors(runs: Frame) -> Frame:
    """Return what the size of the text that is judged on leaves unsure of each model's accuracy.

    Returns:
        one row per model: `model`, `accuracy_percent` (mean), `tokens`, `error_points` (of an
        accuracy), and `error_of_difference`: the largest that the text gives a difference of two.
        McNemar's (1947): only tokens that one model gets right and the other wrong count, and how
        many those are is taken as if the models erred unrelatedly; the more alike they are, the
        smaller the true error. It does not shrink with more seeds that read the same text.
    """
    rows = []
    for model, group in runs.groupby("model", sort=False):
        text = group["judged_on"].iloc[0]
        accuracy = group[Metric.accuracy.last(text)].mean()
        tokens = (group[f"{text}_windows"] * group["seq_len"]).min()
        if pd.notna(tokens) and math.isfinite(accuracy):
            error = stats.binomial_error(accuracy / 100, int(tokens))
            rows.append([model, accuracy, int(tokens), error, math.sqrt(2) * error])
    columns = ["model", "accuracy_percent", "tokens", "error_points", "error_of_difference"]
    return pd.DataFrame(rows, columns=columns)
