"""What arms spent and what they got for it, the immediate effect of growth, and when it is best.

Three currencies: training tokens, floating-point operations of training (with the output head and
without it, for the head of a large vocabulary outweighs every layer), and seconds of training and
evaluation as they were originally taken, reused or not. A phase counts with all its epochs, also
those after its best one. Epoch 0, the model right after a growth, was evaluated only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from proglayer.report import stats
from proglayer.report.arms import EXIT_WEIGHTS, Frame
from proglayer.results import Results
from proglayer.results.read import TEXTS, sum_so_far
from proglayer.results.variants import settings_text, swept

# What is counted, each a column of `curves`.
COLUMNS = ["tokens", "flops", "flops_without_head", "seconds"]


def curves(results: Results, runs: Frame) -> Frame:
    """Return loss against compute, epoch by epoch, of the runs named in `runs["run"]`.

    Returns:
        `run`, `phase`, `layers`, `epoch` (counted within its phase), `cumulative_epochs` (counted
        through all phases), loss in nats and accuracy in percent on both texts, `best`, and, summed
        over all epochs so far, those of COLUMNS. Operations are nan from a phase on that did not
        end.
    """
    phases: Frame = results.phases
    cost = phases[["run", "phase"]].assign(
        body=phases["train_flops_body"].astype("float64") / phases["epochs"]
    )
    epochs: Frame = results.epochs[results.epochs["run"].isin(runs["run"])]
    table = epochs.merge(cost, on=["run", "phase"], how="left")
    table["flops_without_head"] = sum_so_far(table["body"] * (table["epoch"] > 0), table["run"])
    seconds = table["train_seconds"] + table["evaluation_seconds"]
    table["seconds"] = sum_so_far(seconds, table["run"])
    table["tokens"] = table["tokens"].astype("float64")
    table["best"] = table["best"].fillna(False).astype(bool)
    names = ["run", "phase", "layers", "epoch", "cumulative_epochs", "best"]
    figures = [f"{text}_{name}" for text in TEXTS for name in ("loss", "accuracy_percent")]
    return table[[*names, *figures, *COLUMNS]]


def spent(results: Results, runs: Frame) -> Frame:
    """Return what each arm spent in all its phases, and what it ended with: means over seeds.

    Returns:
        one row per arm: `variant`, `model`, `seeds`, `phases`, `epochs`, `tokens`, `flops`,
        `flops_without_head`, `train_seconds`, `evaluation_seconds`, `seconds`,
        `seconds_saved` (by reuse), `last_validation_loss`.
    """
    own = results.phases[results.phases["run"].isin(runs["run"])]
    both = ["train_seconds", "evaluation_seconds"]
    seconds = own.groupby("run")[both].sum(min_count=1)
    names = ["phases", "epochs", "tokens", "flops", "flops_without_head", *both, "seconds"]
    names += ["seconds_saved", "last_validation_loss"]
    table = runs.join(seconds, on="run")
    table[names] = table[names].astype("float64")
    arms = table.groupby(["variant", "model"], sort=False)[names]
    means = arms.mean()
    means.insert(0, "seeds", arms.size())
    return means.reset_index()


def speed_up(runs: Frame, curves: Frame, scratch: Mapping[str, str]) -> Frame:
    """Return the speed-up of growing against training the same size from scratch, within seeds.

    As defined by Du et al. (2024), "Stacking Your Transformers": compute from scratch / compute of
    growing, all phases, to one loss, - 1, following the comparison of cost at equal quality of Gong
    et al. (2019), "Efficient Training of BERT by Progressively Stacking". 0.5 means that from
    scratch takes half as much again; below 0, growing was slower. The target is the loss that the
    run from scratch of the same model and seed ended with. The grown model gets there at its final
    depth: what it reached before growing is no merit of growing.

    Args:
        scratch: growing variant -> the variant that trains its size from scratch.

    Returns:
        one row per growing arm: `variant`, `model`, `seeds` (with a run from scratch), `reached`
        (how many got there), and, where all did, of each of COLUMNS `<measure>_mean`, `_low` and
        `_high`: the geometric mean of the ratios, less 1, and its 95 % interval, of the logarithms.
    """
    every = runs[["run", "variant", "model", "seed", "last_layers"]]
    target = runs["last_validation_loss"].astype("float64")
    base = every.assign(target=target, scratch=runs["variant"])
    base = base[base["scratch"].isin(scratch.values())]
    base = base.join(_reached(curves, base), on="run")
    grown = every[every["variant"].isin(scratch)]
    grown = grown.assign(scratch=grown["variant"].map(scratch).astype("str"))
    alike = ["scratch", "model", "seed"]
    grown = grown.merge(base[[*alike, "target", *COLUMNS]], on=alike)
    own = _reached(curves, grown).reindex(grown["run"].to_numpy())
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.log(grown[COLUMNS].astype("float64") / own.to_numpy(dtype=float))
    rows = []
    for (variant, model), arm in grown.groupby(["variant", "model"], sort=False):
        found = {column: stats.summary(ratios.loc[arm.index, column]) for column in COLUMNS}
        row = {"variant": variant, "model": model, "seeds": len(arm), "reached": found["tokens"].n}
        for column, over in found.items():
            ends = {"mean": over.mean, "low": over.low, "high": over.high}
            row |= {
                f"{column}_{k}": math.nan if over.dropped else math.expm1(v)
                for k, v in ends.items()
            }
        rows.append(row)
    return pd.DataFrame(rows)


def _reached(curves: Frame, runs: Frame) -> Frame:
    """Return the compute at which each run's loss, at its final depth, first comes down to its
    target.

    It is interpolated between the two epochs around that; where the first epoch of that depth is
    already there it is that epoch's own, for what came before it is not known. Losses that are not
    finite are passed over.

    Args:
        runs: with `run`, `last_layers`, and `target`, the loss in nats.

    Returns:
        those of COLUMNS, indexed by run; only runs that reached their target.
    """
    epochs = curves[["run", "layers", "epoch", "validation_loss", *COLUMNS]]
    epochs = epochs.rename(columns={"validation_loss": "loss"})
    epochs = epochs.merge(runs[["run", "last_layers", "target"]], on="run")
    epochs = epochs[(epochs["layers"] == epochs["last_layers"]) & (epochs["epoch"] > 0)]
    epochs = epochs[np.isfinite(epochs[["loss", "target"]].to_numpy(dtype=float)).all(axis=1)]
    before = epochs.groupby("run", sort=False)[["loss", *COLUMNS]].shift()
    at = epochs[epochs["loss"] <= epochs["target"]].drop_duplicates("run")
    before = before.loc[at.index]
    share = (before["loss"] - at["target"]) / (before["loss"] - at["loss"])
    share = share.where(before["loss"].notna(), 1.0)
    start = before[COLUMNS].fillna(0.0)
    found = start.add((at[COLUMNS] - start).mul(share, axis=0))
    return found.set_axis(at["run"].to_numpy(dtype=object))


# --- the moment of growth -------------------------------------------------------------------------

# What a study of the moment of growth varies: how long the phases are, in epochs.
MOMENT = "config.phase.initial.max_epochs"
LENGTHS = (MOMENT, "config.phase.grown.max_epochs")
FEWEST_MOMENTS = 3


def growths(results: Results, runs: Frame) -> Frame:
    """Return every growth of the runs named in `runs["run"]`, and what it did at the last exit.

    Returns:
        one row per growth of a run: `variant`, `model`, `seed`, `run`, `phase` (which it begins),
        `layers` (after it), `validation_loss_before` (nats, the selected epoch of the phase
        before), `validation_loss_after` (nats, epoch 0: before its first step),
        `validation_loss_rise_nats` (after - before), `validation_accuracy_change_points` (the same
        of the accuracy), `tokens_to_recovery` (until an epoch ended below the loss before; inf for
        never), `gradient_share_new` (of the gradient's norm, from 0 to 1, the new layers' over the
        first steps; their mean).
    """
    phases = results.phases.drop(columns=["variant", "model", "seed"])
    phases = runs[["run", "variant", "model", "seed"]].merge(phases, on="run")
    accuracy, rise = "validation_accuracy_percent", "validation_loss_rise_nats"
    before = phases[["run", "phase", accuracy]].assign(phase=phases["phase"] + 1)
    at_once = results.epochs.loc[results.epochs["epoch"] == 0, ["run", "phase", accuracy]]
    own = phases[phases["validation_loss_after"].notna()].drop(columns=accuracy)
    own = own.merge(before, on=["run", "phase"], how="left")
    own = own.merge(at_once, on=["run", "phase"], how="left", suffixes=("_before", "_after"))
    own[rise] = own["validation_loss_after"] - own["validation_loss_before"]
    change = own[f"{accuracy}_after"] - own[f"{accuracy}_before"]
    tokens = own["tokens_to_recovery"].astype("float64").fillna(math.inf)
    own["tokens_to_recovery"] = tokens.where(own["validation_loss_before"].notna())
    own["validation_accuracy_change_points"] = change
    names = ["variant", "model", "seed", "run", "phase", "layers", "validation_loss_before"]
    names += ["validation_loss_after", rise, "validation_accuracy_change_points"]
    return own[[*names, "tokens_to_recovery", "gradient_share_new"]]


@dataclass(frozen=True, eq=False)
class Timing:
    """The loss at an equal budget against the moment of growth, of one model."""

    model: str
    settings: Sequence[str]  # what tells it from the others, `growth.init=stack`
    losses: Frame  # a row a seed, a column a moment (epochs before the growth); nats
    budget: float  # operations of each run, up to which it counts
    longest: float  # operations of the longest run over the budget
    shares: Mapping[int, float]  # moment -> share of the budget that was spent before the growth
    alike: Mapping[int, list[int]]  # moment -> later ones that trained the same models: left out

    @property
    def best(self) -> int:
        """The moment of the lowest mean loss."""
        return int(self.losses.mean().idxmin())

    @property
    def best_in(self) -> int:
        """The number of seeds in which that moment is the best."""
        return int((self.losses.idxmin(axis=1) == self.best).sum())

    @property
    def worse(self) -> list[int]:
        """The moments that are shown to be worse than the best.

        The best was chosen by these losses: the intervals of all pairs hold together with 95 %.
        """
        confidence = 1 - stats.ALPHA / max(1, math.comb(self.losses.shape[1], 2))
        best, worse = self.losses[self.best], []
        for moment in self.losses:
            pairs = stats.paired(self.losses[moment], best)
            low = pairs.mean if pairs.constant else pairs.interval(confidence).low
            if low > 0:
                worse.append(int(moment))
        return worse


def timings(runs: Frame, curves: Frame) -> list[Timing]:
    """Return the studies of the moment of growth among these runs: sets of arms that grow and
    differ in the lengths of their phases alone, in at least FEWEST_MOMENTS moments.

    Losses are the lowest of the final depth within the operations that every run of the set spent,
    interpolated between the two epochs around that. Seeds that lack a moment are left out, and
    moments that gave the same models as an earlier one: no error is paid for them.
    """
    if MOMENT not in runs:
        return []
    grown = runs[runs["grows"] & runs[MOMENT].notna()]
    others = [column for column in swept(grown) if column not in LENGTHS]
    found = []
    for _, own in grown.groupby(["model", "experiment", *others], sort=False, dropna=False):
        moments = own[MOMENT].astype(int)
        by_run = curves[curves["run"].isin(own["run"]) & (curves["epoch"] > 0)].groupby("run")
        spent = by_run["flops"].max()
        budget = float(spent.min())
        if moments.nunique() < FEWEST_MOMENTS or not np.isfinite(spent).all():
            continue
        first = curves[curves["phase"] == 1].groupby("run")["flops"].max()
        loss = pd.Series({run: _loss_within(curve, budget) for run, curve in by_run})
        table = own.assign(loss=own["run"].map(loss), moment=moments)
        losses = table.pivot_table("loss", "seed", "moment").dropna()
        if losses.empty:
            continue
        shares = (own["run"].map(first) / budget).groupby(moments).mean().to_dict()
        settings = settings_text(own.iloc[0], [c for c in others if c != EXIT_WEIGHTS])
        longest = float(spent.max()) / budget
        alike: dict[int, list[int]] = {}
        for moment in losses:
            same = [first for first in alike if losses[first].equals(losses[moment])]
            alike.setdefault(same[0] if same else moment, []).append(moment)
        kept = {first: moments[1:] for first, moments in alike.items()}
        model = str(own["model"].iloc[0])
        found.append(Timing(model, settings, losses[[*kept]], budget, longest, shares, kept))
    return found


def _loss_within(curve: Frame, budget: float) -> float:
    """Return the lowest loss of the final depth of a run up to `budget` operations."""
    last = curve[curve["layers"] == curve["layers"].iloc[-1]]
    lowest = np.fmin.accumulate(last["validation_loss"].to_numpy(float))
    return float(np.interp(budget, last["flops"].to_numpy(float), lowest, left=math.nan))
