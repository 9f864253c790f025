"""The moment of growth in the report, from made-up runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import scipy.stats
from proglayer.report.write import write_report

from proglayer.report import growth, ledger, stats, study
from proglayer.report.study import STANDARD
from proglayer.results import load

from .. import synthetic
from .test_report import page_of

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
            synthetic.run(
                folder / f"{init}{seed}",
                "original",
                STANDARD,
                seed,
                *own,
                losses=losses,
                shock=shock,
            )
    return folder


def test_what_a_growth_did_is_read_from_the_record(sweep: Path) -> None:
    results = load(sweep)
    found = growth.growths(results, study.arms(results).runs)
    assert len(found) == 6
    assert set(found["phase"]) == {2}
    assert set(found["layers"]) == {6}
    stacked = found[found["variant"].str.contains("stack")].sort_values("seed")
    assert stacked["shock_nats"].tolist() == pytest.approx(SHOCKS["stack"])
    # Accuracy falls by 5 points a nat there.
    assert stacked["accuracy_points"].tolist() == pytest.approx([-2.0, -2.5, -3.0])
    tokens = 2 * synthetic.WINDOWS[0] * 32
    assert stacked["tokens_to_recovery"].tolist() == [tokens, tokens, math.inf]
    assert stacked["share_new"].tolist() == pytest.approx([0.3] * 3)


def test_the_report_has_each_arm_with_its_interval_and_a_picture(
    sweep: Path, tmp_path: Path
) -> None:
    out = write_report([sweep], tmp_path / "report").parent
    page = page_of(out)
    rows = page.table("Variant", "Model", "Phase", "Seeds", "Loss before")
    zero, stack = sorted(rows, key=lambda row: "stack" in row["Variant"])
    of = stats.summary(SHOCKS["stack"])
    rose = f"{of.mean:+.3f} ± {of.sd:.3f} ({of.low:+.3f} to {of.high:+.3f})"
    assert stack["Loss rose by, nats"] == rose
    assert stack["Phase"] == "2: 6 layers"
    assert stack["Loss before"] == "6.800 ± 0.000"
    assert stack["Back after, tokens"] == "never in 1 of 3"
    assert stack["Gradient in new layers, %"] == "30 ± 0 (30 to 30)"
    assert zero["Loss rose by, nats"].startswith("+0.000 ± 0.000")
    assert zero["Back after, tokens"].startswith("192 k")
    assert (out / "figures" / "growth.svg").is_file()
    assert (out / "figures" / "growth.png").is_file()
    assert "nats (left: better)" in (out / "figures" / "growth.svg").read_text()
    assert "At the moment of growth" in (out / "report.md").read_text()
    assert len((out / "tables" / "growth.csv").read_text().splitlines()) == 7


def test_runs_of_a_version_that_measured_no_growth_have_no_such_section(tmp_path: Path) -> None:
    synthetic.run(tmp_path / "one", "original", STANDARD, 1)
    assert "growth" not in json.loads((tmp_path / "one" / "result.json").read_text())["phases"][1]
    out = write_report([tmp_path / "one"], tmp_path / "report").parent
    assert "At the moment of growth" not in (out / "report.md").read_text()


# --- when to grow ---------------------------------------------------------------------------------

# Epochs before the growth and after it, at nearly equal operations; a valley at 4.
MOMENTS = {1: 11, 2: 10, 4: 9, 6: 7, 8: 6, 10: 4}
VALLEY = {1: 0.3, 2: 0.1, 4: 0.0, 6: 0.02, 8: 0.12, 10: 0.3}


def timing_run(folder: Path, moment: int, seed: int, noise: float, *own: str) -> Path:
    """A run whose loss, after its growth, ends at 6.5 and what VALLEY adds."""
    initial = [7.2 - 0.02 * epoch for epoch in range(moment)]
    end = 6.5 + VALLEY[moment] + noise
    count = MOMENTS[moment]
    grown = [end + 0.3 * 0.5**epoch for epoch in range(count)]
    lengths = (f"phase.initial.max_epochs={moment}", f"phase.grown.max_epochs={count}")
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


def test_the_best_moment_to_grow_is_named_with_how_sure_that_is(
    timed: Path, tmp_path: Path
) -> None:
    results = load(timed)
    runs = study.arms(results).runs
    (found,) = growth.timings(runs, ledger.curves(results, runs))
    assert found.losses.shape == (4, 6)
    assert found.best == 4
    # At data=pydocs the moments of the recipe spend the same operations, to 6 %.
    assert 1 < found.longest < 1.06
    assert found.shares[1] == pytest.approx(0.067, abs=0.003)
    sentence = found.sentence()
    assert "after 4 epochs, 27 % of the operations; it is the lowest in 4 of 4 seeds" in sentence
    differences = found.losses.drop(columns=4).sub(found.losses[4], axis=0)
    half = scipy.stats.t.ppf(1 - 0.05 / 15 / 2, 3) * differences.std() / 2
    worse = ", ".join(map(str, differences.columns[differences.mean() > half]))
    others = ", ".join(map(str, differences.columns[differences.mean() <= half]))
    assert (worse, others) == ("1, 8, 10", "2, 6")
    assert f"Shown to be worse: after {worse} epochs;" in sentence
    assert f"not told apart from it: after {others} epochs." in sentence
    out = write_report([timed], tmp_path / "report").parent
    text = (out / "report.md").read_text()
    assert "### When to grow" in text
    assert (out / "figures" / "valley-1.svg").is_file()
    assert (out / "figures" / "ranking-standard.svg").is_file()


def test_a_loss_counts_within_the_operations_that_all_runs_spent(timed: Path) -> None:
    results = load(timed)
    runs = study.arms(results).runs
    curves = ledger.curves(results, runs)
    (found,) = growth.timings(runs, curves)
    for run in runs.itertuples():
        curve = curves[(curves["run"] == run.run) & (curves["phase"] == 2) & (curves["epoch"] > 0)]
        inside = curve[curve["flops"] <= found.budget]
        own = found.losses.loc[run.seed, int(run.run.split("_")[0])]
        assert curve["loss"].min() <= own <= inside["loss"].min()


def test_two_moments_or_another_setting_that_varies_are_no_study_of_the_moment(
    tmp_path: Path,
) -> None:
    for seed in (1, 2):
        for moment in (1, 2):
            timing_run(tmp_path / "two", moment, seed, 0.0)
        for moment, dim in ((1, 32), (2, 64), (4, 128)):
            timing_run(tmp_path / "other", moment, seed, 0.0, f"model.dim={dim}")
    for folder in (tmp_path / "two", tmp_path / "other"):
        results = load(folder)
        runs = study.arms(results).runs
        assert growth.timings(runs, ledger.curves(results, runs)) == []


def test_one_seed_says_nothing_of_the_best_moment(tmp_path: Path) -> None:
    for moment in (1, 2, 4):
        timing_run(tmp_path, moment, 1, 0.0)
    results = load(tmp_path)
    runs = study.arms(results).runs
    (found,) = growth.timings(runs, ledger.curves(results, runs))
    assert found.sentence().endswith("One seed: nothing can be concluded.")
    assert "(the latest that was tried: the best may lie beyond it)" in found.sentence()


# --- against training from scratch, and the order of arms -----------------------------------------


def test_mixing_is_counted_at_equal_operations_from_the_growth_on(tmp_path: Path) -> None:
    own = ("added_layers=3", "freeze=none")
    never, soon = [6.9, 6.8, 6.7], [6.3, 6.2, 6.1]
    for seed, grown in ((1, soon), (2, never), (3, [6.9, 6.6, 6.1])):
        synthetic.run(
            tmp_path / f"grown{seed}", "original", STANDARD, seed, *own,
            losses=[[6.9, 6.8], grown], shock=0.2,
        )  # fmt: skip
        synthetic.run(
            tmp_path / f"scratch{seed}", "control_from_scratch", STANDARD, seed, "added_layers=3",
            losses=[[6.9, 6.7, 6.5, 6.4, 6.3, 6.25, 6.2]],
        )  # fmt: skip
    results = load(tmp_path)
    runs = study.arms(results).runs
    curves = ledger.curves(results, runs)
    found = growth.mixing(runs, curves, study.controls(runs, study.FROM_SCRATCH), 0.01)
    epoch = synthetic.WINDOWS[0] * 32
    assert found.to_dict() == {"grown1": epoch, "grown2": math.inf, "grown3": 3 * epoch}
    page = page_of(write_report([tmp_path], tmp_path / "report").parent)
    (row,) = page.table("Variant", "Model", "Phase", "Seeds", "Loss before")
    assert row["As from scratch after"] == "never in 1 of 3"


def test_the_order_of_arms_is_compared_with_the_final_one(tmp_path: Path) -> None:
    ends = {"random": 6.7, "copy": 6.6, "stack": 6.5}
    for init, end in ends.items():
        for seed in (1, 2):
            # After the growth the order is first the other way round.
            at_first = 6.5 + 6.6 - end + 0.3
            synthetic.run(
                tmp_path / f"{init}{seed}", "original", STANDARD, seed, f"growth={init}",
                losses=[[6.9, 6.85], [at_first, end]],
            )  # fmt: skip
    results = load(tmp_path)
    runs = study.arms(results).runs
    curves = ledger.curves(results, runs).merge(runs[["run", "variant", "seed"]], on="run")
    ranks = growth.ranking(curves)
    tau = ranks.groupby("step")["tau"].agg(["min", "max"])
    assert tau.loc[1:2].isna().all(axis=None)  # nothing tells the arms apart before they grow
    assert tau.loc[3].tolist() == pytest.approx([-1, -1])
    assert tau.loc[4].tolist() == pytest.approx([1, 1])
    assert growth.settled(ranks) == 4
