"""The moment of growth: what it did to the loss, how soon that was made good, and by what.

The record of each phase that begins with a growth holds what was measured there; see
`proglayer.store.record.GrowthRecord`.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from proglayer.report.study import Frame
from proglayer.results import Results


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
