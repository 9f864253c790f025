"""The compute ledger: what every arm spent in all its phases, and what it got for that.

Three currencies: training tokens, floating-point operations of training (with the output head and
without it, for the head of a large vocabulary outweighs every layer), and seconds of training and
evaluation as they were originally taken, reused or not. A phase counts with all its epochs, also
those after its best one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from proglayer.report import stats
from proglayer.report.study import Frame
from proglayer.results.frames import Results


@dataclass(frozen=True)
class Measure:
    """A currency: its column in `curves`, its name, its unit."""

    column: str
    name: str
    unit: str


TOKENS = Measure("tokens", "training tokens", "tokens")
FLOPS = Measure("flops", "operations with the head", "FLOP")
BODY = Measure("flops_without_head", "operations without the head", "FLOP")
SECONDS = Measure("seconds", "time", "s")
MEASURES = (TOKENS, FLOPS, BODY, SECONDS)


def curves(results: Results, runs: Frame) -> Frame:
    """Loss against compute, epoch by epoch, of the runs named in `runs["run"]`.

    Returns:
        `run`, `phase`, `layers`, `epoch` (counted within its phase), `step` (counted through all
        phases), `loss` (validation, nats), `accuracy_percent`, `best`, and, summed over all epochs
        so far, the columns of MEASURES. Operations are nan from a phase on that did not end.
    """
    epochs = results.epochs[results.epochs["run"].isin(runs["run"])].copy()
    per_phase: Frame = results.phases[
        ["run", "phase", "epochs", "train_flops_head", "train_flops_body"]
    ]
    told = epochs.merge(
        per_phase.rename(columns={"epochs": "epochs_of_phase"}), on=["run", "phase"], how="left"
    )
    count = told["epochs_of_phase"].astype("float64")
    body = told["train_flops_body"].astype("float64") / count
    told["flops"] = told["train_flops_head"].astype("float64") / count + body
    told["flops_without_head"] = body
    told["tokens"] = told["train_tokens"].astype("float64")
    told["seconds"] = told["train_seconds"] + told["evaluation_seconds"]
    by_run = told.groupby("run", sort=False)
    for measure in MEASURES:
        # A sum with a gap in it is no sum.
        gap = told[measure.column].isna().groupby(told["run"], sort=False).cummax()
        told[measure.column] = by_run[measure.column].cumsum().where(~gap)
    told["step"] = by_run.cumcount() + 1
    told["loss"] = told["validation_loss"].astype("float64")
    told["accuracy_percent"] = told["validation_accuracy_percent"].astype("float64")
    told["best"] = told["best"].fillna(False).astype(bool)
    names = ["run", "phase", "layers", "epoch", "step", "loss", "accuracy_percent", "best"]
    return told[[*names, *(measure.column for measure in MEASURES)]]


def spent(results: Results, runs: Frame) -> Frame:
    """What each arm spent in all its phases, and the loss that it ended with: means over seeds.

    Returns:
        one row per arm: `variant`, `model`, `seeds`, `phases`, `epochs`, `tokens`, `flops`,
        `flops_without_head`, `train_seconds`, `evaluation_seconds`, `seconds`,
        `seconds_saved` (by reuse), `loss`, `perplexity` (of the last phase).
    """
    own = results.phases[results.phases["run"].isin(runs["run"])]
    seconds = own.groupby("run")[["train_seconds", "evaluation_seconds"]].sum(min_count=1)
    told = runs.join(seconds, on="run")
    figures = {
        "phases": "phases",
        "epochs": "epochs",
        "tokens": "tokens",
        "flops": "flops",
        "flops_without_head": "flops_without_head",
        "train_seconds": "train_seconds",
        "evaluation_seconds": "evaluation_seconds",
        "seconds": "seconds",
        "seconds_saved": "seconds_saved",
        "loss": "last_loss",
        "perplexity": "last_perplexity",
    }
    numbers = told[list(figures.values())].astype("float64")
    numbers.columns = list(figures)
    numbers[["variant", "model"]] = told[["variant", "model"]]
    arms = numbers.groupby(["variant", "model"], sort=False)
    means = arms.mean()
    means.insert(0, "seeds", arms.size())
    return means.reset_index()


def default_targets(runs: Frame, curves: Frame, reference: str) -> dict[str, float]:
    """For each model a loss that every seed of the reference variant reached."""
    lowest = curves.groupby("run")["loss"].min()
    held = runs[runs["variant"] == reference]
    of_runs = held["run"].map(lowest).astype("float64")
    return of_runs.groupby(held["model"], sort=False).max().dropna().to_dict()


def to_target(runs: Frame, curves: Frame, targets: dict[str, float]) -> Frame:
    """The compute at which each arm first came down to the target loss of its model.

    All phases count; the mean is over the seeds that reached it.

    Returns:
        one row per arm: `variant`, `model`, `target`, `seeds`, `reached` (how many), and the means
        in the columns of MEASURES (nan where none reached it).
    """
    target = runs["model"].map(targets).astype("float64")
    reached = _reached(curves, pd.Series(target.to_numpy(), index=runs["run"].to_numpy()))
    told = runs[["run", "variant", "model"]].assign(target=target).dropna(subset="target")
    told = told.join(reached, on="run")
    arms = told.groupby(["variant", "model"], sort=False)
    means = arms[["target", *(m.column for m in MEASURES)]].mean()
    means.insert(1, "seeds", arms.size())
    means.insert(2, "reached", arms[TOKENS.column].count())
    return means.reset_index()


def speed_up(runs: Frame, curves: Frame, scratch: Mapping[str, str]) -> Frame:
    """The speed-up of growing against training the same size from scratch, within seeds.

    As defined by Du et al. (2024), "Stacking Your Transformers": compute from scratch / compute of
    growing, all phases, to one loss, - 1, following the comparison of cost at equal quality of Gong
    et al. (2019), "Efficient Training of BERT by Progressively Stacking". 0.5 means that from
    scratch takes half as much again; below 0, growing was slower. The target is the lowest loss
    that the run from scratch of the same model and seed reached.

    Args:
        scratch: growing variant -> the variant that trains its size from scratch.

    Returns:
        one row per growing arm and measure: `variant`, `model`, `measure`, `seeds` (with a run
        from scratch), and the fields of `stats.Summary` over those that reached the target.
    """
    base = runs.loc[runs["variant"].isin(scratch.values()), ["run", "variant", "model", "seed"]]
    lowest = base["run"].map(curves.groupby("run")["loss"].min()).astype("float64")
    cost = _reached(curves, pd.Series(lowest.to_numpy(), index=base["run"].to_numpy()))
    base = base.assign(target=lowest).join(cost, on="run").drop(columns="run")
    base = base.rename(columns={"variant": "scratch"})
    grown = runs.loc[runs["variant"].isin(scratch), ["run", "variant", "model", "seed"]]
    grown = grown.assign(scratch=grown["variant"].map(scratch))
    grown = grown.merge(base, on=["scratch", "model", "seed"])
    own = _reached(curves, pd.Series(grown["target"].to_numpy(), index=grown["run"].to_numpy()))
    rows = []
    for (variant, model), arm in grown.groupby(["variant", "model"], sort=False):
        for measure in MEASURES:
            at_base = arm[measure.column].to_numpy(dtype=float)
            at_own = own[measure.column].reindex(arm["run"]).to_numpy(dtype=float)
            with np.errstate(divide="ignore", invalid="ignore"):
                gains = at_base / at_own - 1
            told = stats.summary(gains)
            fields = [told.n, told.dropped, told.mean, told.sd, told.low, told.high]
            rows.append([variant, model, measure.column, len(arm), *fields])
    names = ["variant", "model", "measure", "seeds", "n", "dropped", "mean", "sd", "low", "high"]
    return pd.DataFrame(rows, columns=names)


def _reached(curves: Frame, targets: Frame) -> Frame:
    """The compute at which each run's loss first comes down to its target.

    It is interpolated between the two epochs around the first crossing; the first epoch's own where
    that is already there, for what came before it is not known. Losses that are not finite are
    passed over.

    Args:
        targets: loss in nats, indexed by run.

    Returns:
        the columns of MEASURES, indexed by run; only runs that reached their target.
    """
    columns = [measure.column for measure in MEASURES]
    told = curves[["run", "loss", *columns]].assign(
        target=curves["run"].map(targets).to_numpy(dtype=float)
    )
    told = told[np.isfinite(told[["loss", "target"]].to_numpy(dtype=float)).all(axis=1)]
    before = told.groupby("run", sort=False)[["loss", *columns]].shift()
    there = (told["loss"] <= told["target"]).to_numpy(dtype=bool)
    at = told[there].drop_duplicates("run")
    before = before.loc[at.index]
    share = (before["loss"] - at["target"]) / (before["loss"] - at["loss"])
    # The first measurement's own if it is already there.
    share = share.where(before["loss"].notna(), 1.0)
    start = before[columns].where(before[columns].notna(), 0.0)
    found = start.add((at[columns] - start).mul(share, axis=0))
    found.index = pd.Index(at["run"].to_numpy(), dtype=object)
    return found
