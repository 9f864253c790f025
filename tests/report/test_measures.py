"""What arms spent and what growing did, from made-up runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from proglayer.report import measures
from proglayer.report.arms import STANDARD, Frame, arms
from proglayer.results import Results, load

from .. import synthetic


def read(results: Results) -> tuple[Frame, Frame]:
    """The runs of all arms, and their curves."""
    runs = arms(results).runs
    return runs, measures.curves(results, runs)


SHOCKS = {"zero": (0.0, 0.0, 0.0), "stack": (0.4, 0.5, 0.6)}


@pytest.fixture(scope="module")
def sweep(no_fsync: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two operators, three seeds: the loss comes back in the second epoch, or never."""
    folder = tmp_path_factory.mktemp("growths")
    for init, shocks in SHOCKS.items():
        for seed, shock in enumerate(shocks, start=1):
            never = init == "stack" and seed == 3
            losses = [[6.9, 6.8], [6.85, 6.81 if never else 6.7 + 0.01 * seed]]
            own = (f"growth={init}", "added_layers=3", "freeze=none")
            how: Any = {"losses": losses, "shock": shock}
            synthetic.run(folder / f"{init}{seed}", "original", STANDARD, seed, *own, **how)
    return folder


def test_what_a_growth_did_is_read_from_the_record(sweep: Path) -> None:
    results = load(sweep)
    found = measures.growths(results, arms(results).runs)
    assert len(found) == 6
    assert set(found["phase"]) == {2}
    assert set(found["layers"]) == {6}
    stacked = found[found["variant"].str.contains("stack")].sort_values("seed")
    assert stacked["validation_loss_rise_nats"].tolist() == pytest.approx(SHOCKS["stack"])
    # Accuracy falls by 5 points a nat there.
    points = stacked["validation_accuracy_change_points"].tolist()
    assert points == pytest.approx([-2.0, -2.5, -3.0])
    tokens = 2 * synthetic.WINDOWS[0] * 32
    assert stacked["tokens_to_recovery"].tolist() == [tokens, tokens, math.inf]
    assert stacked["gradient_share_new"].tolist() == pytest.approx([0.3] * 3)


# --- when to grow ---------------------------------------------------------------------------------

# Epochs before the growth and after it, at nearly equal operations; a valley at 4.
MOMENTS = {1: 11, 2: 10, 4: 9, 6: 7, 8: 6, 10: 4}
VALLEY = {1: 0.3, 2: 0.1, 4: 0.0, 6: 0.02, 8: 0.12, 10: 0.3}


def timing_run(
    folder: Path, moment: int, seed: int, noise: float, *own: str, trained: int = 0
) -> Path:
    """A run whose loss, after its growth, ends at 6.5 and what VALLEY adds; it may have stopped
    as one of an earlier moment did.
    """
    trained = trained or moment
    initial = [7.2 - 0.02 * epoch for epoch in range(trained)]
    end = 6.5 + VALLEY[trained] + noise
    grown = [end + 0.3 * 0.5**epoch for epoch in range(MOMENTS[trained])]
    lengths = (f"phase.initial.max_epochs={moment}", f"phase.grown.max_epochs={MOMENTS[moment]}")
    return synthetic.run(
        folder / f"{moment}_{seed}", "recipe/growth_timing", STANDARD, seed, *lengths, *own,
        losses=[initial, grown], shock=0.2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("timed")
    for moment in MOMENTS:
        for seed, shift in ((1, -0.02), (2, 0.0), (3, 0.02), (4, 0.01)):
            # What is not the seed's own: enough to hide 0.02, and not 0.1.
            own = 0.03 * math.sin(7 * moment + seed)
            timing_run(folder, moment, seed, shift + own)
    return folder


def test_the_best_moment_to_grow_is_named_with_those_shown_to_be_worse(timed: Path) -> None:
    runs, curves = read(load(timed))
    (found,) = measures.timings(runs, curves)
    assert found.losses.shape == (4, 6)
    assert found.best == 4
    # At data=pydocs the moments of the recipe spend the same operations, to 6 %.
    assert 1 < found.longest < 1.06
    assert found.shares[1] == pytest.approx(0.067, abs=0.003)
    assert found.best_in == 4
    differences = found.losses.drop(columns=4).sub(found.losses[4], axis=0)
    half = scipy.stats.t.ppf(1 - 0.05 / 15 / 2, 3) * differences.std() / 2
    assert found.worse == differences.columns[differences.mean() > half].tolist() == [1, 8, 10]


def test_a_loss_counts_within_the_operations_that_all_runs_spent(timed: Path) -> None:
    runs, curves = read(load(timed))
    (found,) = measures.timings(runs, curves)
    for run in runs.itertuples():
        curve = curves[(curves["run"] == run.run) & (curves["phase"] == 2) & (curves["epoch"] > 0)]
        inside = curve[curve["flops"] <= found.budget]
        own = found.losses.loc[run.seed, int(run.run.split("_")[0])]
        assert curve["validation_loss"].min() <= own <= inside["validation_loss"].min()


# --- what was spent, and when a loss was reached -------------------------------------------------


def test_the_ledger_counts_every_phase_and_every_epoch(tmp_path: Path) -> None:
    folder = synthetic.sweep(tmp_path / "s", ("original", "control_from_scratch"), seeds=(1, 2))
    results = load(folder)
    runs = results.runs
    own, curves = read(results)
    table = measures.spent(results, own).set_index(["variant", "model"])
    for (experiment, model), arm in runs.groupby(["experiment", "model"]):
        row = table.loc[(experiment, model)]
        phases = results.phases[results.phases["run"].isin(arm["run"])]
        seeds = len(arm)
        assert row["tokens"] == phases["train_tokens"].sum() / seeds
        both = phases["train_flops_head"] + phases["train_flops_body"]
        assert row["flops"] == pytest.approx(both.sum() / seeds)
        assert row["flops_without_head"] == pytest.approx(phases["train_flops_body"].sum() / seeds)
        assert row["train_seconds"] == pytest.approx(phases["train_seconds"].sum() / seeds)
    # and the courses end where the ledger does
    last = curves.groupby("run")[["tokens", "flops", "flops_without_head", "seconds"]].max()
    ends = own.set_index("run")
    for column in last.columns:
        expected = ends[column].astype(float).reindex(last.index)
        np.testing.assert_allclose(last[column], expected, rtol=1e-9)


def one_arm(
    variant: str, *points: tuple[float, float], layers: Any = 4
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A run of one arm, and its curve of (compute, loss)."""
    last = {"last_layers": 4, "last_validation_loss": min(loss for _, loss in points)}
    run = pd.DataFrame([{"run": variant, "variant": variant, "model": STANDARD, "seed": 1} | last])
    curve = pd.DataFrame(points, columns=["compute", "validation_loss"]).assign(
        layers=layers, epoch=1
    )
    spent = dict.fromkeys(measures.COLUMNS, curve["compute"])
    return run, curve.assign(run=variant, **spent)


def gain(scratch: tuple[Any, ...], grown: tuple[Any, ...]) -> float | None:
    arms = [one_arm("scratch", *scratch), one_arm("grown", *grown)]
    runs, curves = (pd.concat(parts, ignore_index=True) for parts in zip(*arms, strict=True))
    found = measures.speed_up(runs, curves, {"grown": "scratch"}).iloc[0]
    return found["flops_mean"] if found["reached"] else None


def test_the_speed_up_is_that_of_the_stacking_literature() -> None:
    # Du et al. 2024: the loss of 300 B tokens from scratch is reached with 194 B: 54.6 % faster.
    from_scratch = ((100, 3.0), (200, 2.5), (300, 2.25))
    grown = ((100, 2.75), (194, 2.25), (300, 2.0))
    found = gain(from_scratch, grown)
    assert found == pytest.approx(0.546, abs=0.0005)
    assert gain(grown[:2], from_scratch) == pytest.approx(194 / 300 - 1)
    assert gain(from_scratch, from_scratch) == 0


def test_a_target_that_one_arm_never_reaches_has_no_speed_up() -> None:
    assert gain(((1, 3.0), (2, 2.0)), ((1, 3.0), (2, 2.5))) is None
    assert gain(((1, np.nan),), ((1, 3.0), (2, 2.5))) is None


def test_a_speed_up_is_the_geometric_mean_and_none_where_a_seed_does_not_get_there() -> None:
    arms = [
        one_arm(f"{name}{seed}", (1, 3.0), *[(at, 2.0)] * bool(at))
        for name, ends in (("scratch", (2, 2, 2)), ("grown", (1, 4, None)))
        for seed, at in enumerate(ends)
    ]
    runs, curves = (pd.concat(parts, ignore_index=True) for parts in zip(*arms, strict=True))
    runs["seed"] = runs["variant"].str[-1].astype(int)
    runs["variant"] = runs["variant"].str[:-1]
    runs["last_validation_loss"] = runs["last_validation_loss"].where(
        runs["variant"] == "grown", 2.0
    )
    curves.loc[curves["run"] == "grown0", "validation_loss"] = [2.0, 1.9]

    def found(seeds: int) -> Any:
        own = runs[runs["seed"] < seeds]
        return measures.speed_up(own, curves, {"grown": "scratch"}).iloc[0]

    two = found(2)
    assert (two["seeds"], two["reached"]) == (2, 2)
    assert two["flops_mean"] == pytest.approx(math.sqrt((2 / 1) * (2 / 4)) - 1)
    assert two["flops_low"] < two["flops_mean"] < two["flops_high"]
    three = found(3)
    assert (three["seeds"], three["reached"]) == (3, 2)
    assert math.isnan(three["flops_mean"])


def test_only_epochs_of_training_at_the_final_depth_reach_a_target() -> None:
    scratch = one_arm("scratch", (4, 6.4))
    run, curve = one_arm("grown", (1, 7.0), (2, 6.0), (3, 6.0), (5, 6.4), layers=[3, 3, 4, 4])
    # the model right after the growth has reached nothing either
    grown = run, curve.assign(epoch=[1, 2, 0, 1])
    runs, curves = (pd.concat(both) for both in zip(scratch, grown, strict=True))
    found = measures.speed_up(runs, curves, {"grown": "scratch"}).iloc[0]
    assert found["flops_mean"] == pytest.approx(4 / 5 - 1)
