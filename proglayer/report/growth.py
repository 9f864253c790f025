"""The moment of growth: what it did at once, when it is best, and how early arms rank.

The record of each phase that begins with a growth holds what was measured there; see
`proglayer.store.record.GrowthRecord`. The rest is read from the learning curves, `ledger.curves`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from proglayer.report import stats, study
from proglayer.report.pictures import engineering
from proglayer.report.study import Frame
from proglayer.results import Results
from proglayer.results.formatting import listed

# What a study of the moment of growth varies: how long the phases are, in epochs.
MOMENT = "config.phase.initial.max_epochs"
LENGTHS = (MOMENT, "config.phase.grown.max_epochs")
FEWEST_MOMENTS = 3
FEWEST_RANKED = 3
# The order of the arms is looked at in so many epochs at most.
MOST_STEPS = 24


def growths(results: Results, runs: Frame) -> Frame:
    """Every growth of the runs named in `runs["run"]`, and what it did at the last exit.

    Returns:
        one row per growth of a run: `variant`, `model`, `seed`, `run`, `phase` (which it begins),
        `layers` (after it), `loss_before` (nats, the selected epoch of the phase before),
        `loss_after` (nats, epoch 0: before its first step), `shock_nats` (after - before, plus is
        worse), `accuracy_points` (the same of the accuracy, minus is worse), `tokens_to_recovery`
        (until an epoch ended below the loss before; inf for never), `share_new` (of the gradient's
        norm, from 0 to 1, the new layers' over the first steps; their mean).
    """
    phases = results.phases.drop(columns=["variant", "model", "seed"])
    phases = runs[["run", "variant", "model", "seed"]].merge(phases, on="run")
    accuracy = "validation_accuracy_percent"
    before = phases[["run", "phase", accuracy]].assign(phase=phases["phase"] + 1)
    at_once = results.epochs.loc[results.epochs["epoch"] == 0, ["run", "phase", accuracy]]
    own = phases[phases["loss_after"].notna()].drop(columns=accuracy)
    own = own.merge(before, on=["run", "phase"], how="left")
    own = own.merge(at_once, on=["run", "phase"], how="left", suffixes=("_before", "_after"))
    tokens = own["tokens_to_recovery"].astype("float64")
    shares = [
        np.mean(each) if isinstance(each, list) else math.nan for each in own["gradient_share_new"]
    ]
    own = own.assign(
        shock_nats=own["loss_after"] - own["loss_before"],
        accuracy_points=own[f"{accuracy}_after"] - own[f"{accuracy}_before"],
        tokens_to_recovery=tokens.fillna(math.inf).where(own["loss_before"].notna()),
        share_new=pd.Series(shares, own.index, dtype=float),
    )
    names = ["variant", "model", "seed", "run", "phase", "layers", "loss_before", "loss_after"]
    return own[[*names, "shock_nats", "accuracy_points", "tokens_to_recovery", "share_new"]]


def mixing(runs: Frame, curves: Frame, scratch: Mapping[str, str], margin: float) -> Frame:
    """Tokens after the last growth until a run is as good as one from scratch, within `margin`.

    At equal operations, of all phases: the lowest loss so far of the grown depth against that of
    the run from scratch with the same model and seed (its last one, where it ended before).

    Args:
        scratch: growing variant -> the variant that trains its size from scratch.
        margin: in nats.

    Returns:
        tokens by run; inf for never. Runs without such a partner are left out.
    """
    place = {(r.variant, r.model, r.seed): r.run for r in runs.itertuples()}
    by_run = dict(iter(curves.groupby("run", sort=False))) if scratch else {}
    found = {}
    for row in runs[runs["variant"].isin(scratch)].itertuples():
        other = by_run.get(place.get((scratch[row.variant], row.model, row.seed), ""))
        own = by_run.get(row.run)
        if own is None or other is None:
            continue
        own = own[own["phase"] == own["phase"].max()]
        start = float(own["tokens"].iloc[0]) if own["epoch"].iloc[0] == 0 else math.nan
        own, other = own[own["epoch"] > 0], other[other["epoch"] > 0]
        target = np.interp(
            own["flops"].to_numpy(float),
            other["flops"].to_numpy(float),
            np.fmin.accumulate(other["loss"].to_numpy(float)),
            left=math.nan,
        )
        there = np.fmin.accumulate(own["loss"].to_numpy(float)) <= target + margin
        tokens = own["tokens"].to_numpy(float)
        found[row.run] = tokens[there.argmax()] - start if there.any() else math.inf
    return pd.Series(found, dtype=float)


# --- when to grow ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Timing:
    """The loss at an equal budget against the moment of growth, of one model."""

    title: str
    losses: Frame  # a row a seed, a column a moment (epochs before the growth); nats
    budget: float  # operations of each run, up to which it counts
    longest: float  # operations of the longest run over the budget
    shares: Mapping[int, float]  # moment -> share of the budget that was spent before the growth

    @property
    def best(self) -> int:
        """The moment of the lowest mean loss."""
        return int(self.losses.mean().idxmin())

    def sentence(self) -> str:
        """The best moment, and how sure that is."""
        best, moments = self.best, list(self.losses)
        mean, seeds = self.losses[best].mean(), len(self.losses)
        text = (
            f"{self.title}: with the same {engineering(self.budget)} operations in all phases the "
            f"mean loss is lowest, {mean:.4f} nats, where growth comes after {_epochs([best])}, "
            f"{100 * self.shares[best]:.0f} % of the operations"
        )
        if best in (moments[0], moments[-1]):
            end = "earliest" if best == moments[0] else "latest"
            text += f" (the {end} that was tried: the best may lie beyond it)"
        if seeds < 2:
            return text + ". One seed: nothing can be concluded."
        first = int((self.losses.idxmin(axis=1) == best).sum())
        # The best was chosen by these losses: the intervals of all pairs hold together.
        confidence = 1 - stats.ALPHA / math.comb(len(moments), 2)
        worse = [m for m in moments if m != best and self._difference(m, confidence)[0] > 0]
        others = [m for m in moments if m != best and m not in worse]
        text += f"; it is the lowest in {first} of {seeds} seeds. "
        text += f"Shown to be worse: {f'after {_epochs(worse)}' if worse else 'no other moment'}; "
        return text + f"not told apart from it: {f'after {_epochs(others)}' if others else 'none'}."

    def _difference(self, moment: int, confidence: float) -> tuple[float, float]:
        """The interval of the loss at a moment less that at the best one, paired by seed."""
        pair = stats.paired(self.losses[moment], self.losses[self.best])
        return (pair.mean, pair.mean) if pair.constant else pair.interval(confidence)


def _epochs(moments: list[int]) -> str:
    return f"{listed([str(moment) for moment in moments], 12)} epoch{'s' * (moments != [1])}"


def timings(runs: Frame, curves: Frame) -> list[Timing]:
    """The studies of the moment of growth among these runs: sets of arms that grow and differ in
    the lengths of their phases alone, in at least FEWEST_MOMENTS moments.

    Losses are the lowest of the final depth within the operations that every run of the set spent,
    interpolated between the two epochs around that. Seeds that lack a moment are left out.
    """
    if MOMENT not in runs:
        return []
    grown = runs[runs["grows"] & runs[MOMENT].notna()]
    others = [column for column in study.swept(grown) if column not in LENGTHS]
    found = []
    for _, own in grown.groupby(["model", "experiment", *others], sort=False, dropna=False):
        moments = own[MOMENT].astype(int)
        if moments.nunique() < FEWEST_MOMENTS:
            continue
        by_run = curves[curves["run"].isin(own["run"]) & (curves["epoch"] > 0)].groupby("run")
        spent = by_run["flops"].max()
        budget = float(spent.min())
        if not math.isfinite(budget) or spent.isna().any():
            continue
        first = curves[curves["phase"] == 1].groupby("run")["flops"].max()
        loss = pd.Series({run: _loss_within(curve, budget) for run, curve in by_run})
        table = own.assign(loss=own["run"].map(loss), moment=moments)
        losses = table.pivot_table("loss", "seed", "moment").dropna()
        if losses.empty:
            continue
        shares = (own["run"].map(first) / budget).groupby(moments).mean().to_dict()
        name = study.model_name(own["model"].iloc[0])
        apart = [c for c in others if c != "config.model.exit_weights"]
        title = ", ".join([name, *study.values_text(own.iloc[0], apart)])
        found.append(Timing(title, losses, budget, float(spent.max()) / budget, shares))
    return found


def _loss_within(curve: Frame, budget: float) -> float:
    """The lowest loss of the final depth of a run up to `budget` operations."""
    last = curve[curve["layers"] == curve["layers"].iloc[-1]]
    lowest = np.fmin.accumulate(last["loss"].to_numpy(float))
    return float(np.interp(budget, last["flops"].to_numpy(float), lowest, left=math.nan))


# --- early ranking --------------------------------------------------------------------------------


def ranking(curves: Frame) -> Frame:
    """Kendall's tau-b of the order of the arms after so many epochs with their order at the end.

    Arms are ordered by the loss of the model in hand, the lowest of its phase so far; one that
    ended keeps its last. Seeds that an arm lacks are left out.

    Args:
        curves: of one model, with `variant` and `seed`.

    Returns:
        `step` (epochs of training, all phases), `seed`, `tau` (nan where all arms are equal);
        empty below FEWEST_RANKED arms.
    """
    import scipy.stats

    # Its own types lack what it returns.
    kendalltau: Any = scipy.stats.kendalltau
    own = curves[curves["epoch"] > 0].sort_values("step", kind="stable")
    own = own.assign(lowest=own.groupby(["run", "phase"])["loss"].cummin())
    wide = own.pivot_table("lowest", ["variant", "seed"], "step", observed=True)
    wide = wide.ffill(axis="columns").unstack("variant").dropna()
    arms = own["variant"].nunique()
    if arms < FEWEST_RANKED or wide.empty:
        return pd.DataFrame(columns=["step", "seed", "tau"])
    steps = wide.columns.get_level_values("step").unique().sort_values()
    shown = sorted({steps[round(i)] for i in np.linspace(0, len(steps) - 1, MOST_STEPS)})
    rows = [
        [int(step), seed, float(kendalltau(losses[step], losses[steps[-1]]).statistic)]
        for seed, losses in wide.iterrows()
        for step in shown
    ]
    return pd.DataFrame(rows, columns=["step", "seed", "tau"])


def settled(ranks: Frame) -> int:
    """The epoch from which on the order of the arms is the final one in every seed."""
    early = ranks.loc[~(ranks["tau"] >= 1 - 1e-9), "step"]
    later = ranks.loc[ranks["step"] > (early.max() if len(early) else 0), "step"]
    return int(later.min() if len(later) else ranks["step"].max())
