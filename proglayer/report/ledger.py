"""The compute ledger: what every arm spent in all its phases, and what it got for that.

Three currencies: training tokens, floating-point operations of training (with the output head and
without it, for the head of a large vocabulary outweighs every layer), and seconds of training and
evaluation as they were originally taken, reused or not. A phase counts with all its epochs, also
those after its best one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from proglayer.report import stats
from proglayer.report.study import Frame
from proglayer.results import Results
from proglayer.results.frames import sum_so_far


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
    epochs: Frame = results.epochs[results.epochs["run"].isin(runs["run"])]
    phases: Frame = results.phases
    body = phases["train_flops_body"].astype("float64") / phases["epochs"]
    table = epochs.merge(
        phases[["run", "phase"]].assign(body=body), on=["run", "phase"], how="left"
    )
    # Epoch 0, the model right after a growth, was evaluated only.
    table["flops_without_head"] = sum_so_far(table["body"] * (table["epoch"] > 0), table["run"])
    seconds = table["train_seconds"] + table["evaluation_seconds"]
    table["seconds"] = sum_so_far(seconds, table["run"])
    table["tokens"] = table["tokens"].astype("float64")
    table["loss"] = table["validation_loss"].astype("float64")
    table["accuracy_percent"] = table["validation_accuracy_percent"].astype("float64")
    table["best"] = table["best"].fillna(False).astype(bool)
    names = ["run", "phase", "layers", "epoch", "step", "loss", "accuracy_percent", "best"]
    return table[[*names, *(measure.column for measure in MEASURES)]]


def spent(results: Results, runs: Frame) -> Frame:
    """What each arm spent in all its phases, and the loss that it ended with: means over seeds.

    Returns:
        one row per arm: `variant`, `model`, `seeds`, `phases`, `epochs`, `tokens`, `flops`,
        `flops_without_head`, `train_seconds`, `evaluation_seconds`, `seconds`,
        `seconds_saved` (by reuse), `loss`, `perplexity`, `bits_per_byte` (of the last phase).
    """
    own = results.phases[results.phases["run"].isin(runs["run"])]
    seconds = own.groupby("run")[["train_seconds", "evaluation_seconds"]].sum(min_count=1)
    table = runs.join(seconds, on="run")
    names = ["phases", "epochs", "tokens", "flops", "flops_without_head", "train_seconds"]
    names += ["evaluation_seconds", "seconds", "seconds_saved"]
    names += ["last_loss", "last_perplexity", "last_bits_per_byte"]
    numbers = table[names].astype("float64").rename(columns=lambda name: name.removeprefix("last_"))
    numbers[["variant", "model"]] = table[["variant", "model"]]
    arms = numbers.groupby(["variant", "model"], sort=False)
    means = arms.mean()
    means.insert(0, "seeds", arms.size())
    return means.reset_index()


def default_targets(runs: Frame, reference: str) -> dict[str, float]:
    """For each model a loss that every seed of the reference variant had at its end."""
    own = runs[runs["variant"] == reference]
    return own["last_loss"].astype("float64").groupby(own["model"], sort=False).max().to_dict()


def to_target(runs: Frame, curves: Frame, targets: dict[str, float]) -> Frame:
    """The compute at which each arm, at its final depth, first came down to its model's target.

    Returns:
        one row per arm: `variant`, `model`, `target`, `seeds`, `reached` (how many), and geometric
        means in the columns of MEASURES; nan where a seed did not get there, for a mean over the
        others would flatter.
    """
    target = runs["model"].map(targets).astype("float64")
    reached = _reached(curves, runs, pd.Series(target.to_numpy(), index=runs["run"].to_numpy()))
    found = runs[["run", "variant", "model"]].assign(target=target).dropna(subset="target")
    columns = [measure.column for measure in MEASURES]
    found = found.join(np.log(reached), on="run")
    arms = found.groupby(["variant", "model"], sort=False)
    means = np.exp(arms[columns].mean())
    means = means.where(arms[columns].count().eq(arms.size(), axis=0))
    means.insert(0, "target", arms["target"].mean())
    means.insert(1, "seeds", arms.size())
    means.insert(2, "reached", arms[TOKENS.column].count())
    return means.reset_index()


def speed_up(runs: Frame, curves: Frame, scratch: Mapping[str, str]) -> Frame:
    """The speed-up of growing against training the same size from scratch, within seeds.

    As defined by Du et al. (2024), "Stacking Your Transformers": compute from scratch / compute of
    growing, all phases, to one loss, - 1, following the comparison of cost at equal quality of Gong
    et al. (2019), "Efficient Training of BERT by Progressively Stacking". 0.5 means that from
    scratch takes half as much again; below 0, growing was slower. The target is the loss that the
    run from scratch of the same model and seed ended with. The grown model gets there at its final
    depth: what it reached before growing is no merit of growing.

    Args:
        scratch: growing variant -> the variant that trains its size from scratch.

    Returns:
        one row per growing arm and measure: `variant`, `model`, `measure`, `seeds` (with a run from
        scratch), `reached` (how many got there), and, where all did, `mean`, `low`, `high`: the
        geometric mean of the ratios, less 1, and its 95 % interval, of the logarithms.
    """
    base = runs.loc[runs["variant"].isin(scratch.values())]
    target = pd.Series(base["last_loss"].to_numpy(dtype=float), index=base["run"].to_numpy())
    cost = _reached(curves, base, target)
    base = base[["run", "variant", "model", "seed"]].assign(target=target.to_numpy())
    base = base.join(cost, on="run").drop(columns="run").rename(columns={"variant": "scratch"})
    grown = runs[runs["variant"].isin(scratch)]
    grown = grown[["run", "variant", "model", "seed", "last_layers"]]
    grown = grown.assign(scratch=grown["variant"].map(scratch))
    grown = grown.merge(base, on=["scratch", "model", "seed"])
    targets = pd.Series(grown["target"].to_numpy(), index=grown["run"].to_numpy())
    own = _reached(curves, grown, targets)
    rows = []
    for (variant, model), arm in grown.groupby(["variant", "model"], sort=False):
        for measure in MEASURES:
            at_own = own[measure.column].reindex(arm["run"]).to_numpy(dtype=float)
            with np.errstate(divide="ignore", invalid="ignore"):
                ratios = np.log(arm[measure.column].to_numpy(dtype=float) / at_own)
            found = stats.summary(ratios)
            known = found.n if found.dropped == 0 else 0
            ends = np.expm1([found.mean, found.low, found.high]) if known else [math.nan] * 3
            rows.append([variant, model, measure.column, len(arm), found.n, *ends])
    names = ["variant", "model", "measure", "seeds", "reached", "mean", "low", "high"]
    return pd.DataFrame(rows, columns=names)


def _reached(curves: Frame, runs: Frame, targets: Frame) -> Frame:
    """The compute at which each run's loss, at its final depth, first comes down to its target.

    It is interpolated between the two epochs around that; where the first epoch of that depth is
    already there it is that epoch's own, for what came before it is not known. Losses that are not
    finite are passed over.

    Args:
        runs: with `run` and `last_layers`.
        targets: loss in nats, indexed by run.

    Returns:
        the columns of MEASURES, indexed by run; only runs that reached their target.
    """
    columns = [measure.column for measure in MEASURES]
    depth = pd.Series(runs["last_layers"].to_numpy(dtype=float), index=runs["run"].to_numpy())
    epochs = curves[curves["layers"] == curves["run"].map(depth)]
    epochs = epochs[["run", "loss", *columns]].assign(
        target=epochs["run"].map(targets).to_numpy(dtype=float)
    )
    epochs = epochs[np.isfinite(epochs[["loss", "target"]].to_numpy(dtype=float)).all(axis=1)]
    before = epochs.groupby("run", sort=False)[["loss", *columns]].shift()
    there = (epochs["loss"] <= epochs["target"]).to_numpy(dtype=bool)
    at = epochs[there].drop_duplicates("run")
    before = before.loc[at.index]
    share = (before["loss"] - at["target"]) / (before["loss"] - at["loss"])
    # The first measurement's own if it is already there.
    share = share.where(before["loss"].notna(), 1.0)
    start = before[columns].where(before[columns].notna(), 0.0)
    found = start.add((at[columns] - start).mul(share, axis=0))
    found.index = pd.Index(at["run"].to_numpy(), dtype=object)
    return found
