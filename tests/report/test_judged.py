"""Nothing is judged that was not trained, and no verdict says more than its data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from proglayer.report import measures, sequential, stats, words
from proglayer.report.arms import FROM_SCRATCH, STANDARD
from proglayer.report.comparisons import Budget, Claim, Kind, Reason, as_frames
from proglayer.report.page import write_report
from proglayer.report.sequential import Looks
from proglayer.report.stats import LeftOut, Verdict
from proglayer.report.study import verdicts
from proglayer.results import load

from .. import synthetic
from .test_comparisons import known, made, study_of, wobble
from .test_measures import read, timing_run

pytestmark = pytest.mark.usefixtures("no_fsync")
LOOKS = Looks(first=5, step=3, most=20, first_seed=0, margin=0.1, taken=(5, 8))
GROWN = [[6.0, 5.9, 6.0], [5.6, 5.5, 5.6]]


def scratch(seed: int) -> list[list[float]]:
    return [[6.0, 5.3 + wobble(seed), 5.9]]


# --- which text -----------------------------------------------------------------------------------


def test_an_epoch_that_a_budget_ends_on_is_judged_on_the_test_text(tmp_path: Path) -> None:
    """Unfrozen is better by 0.2 points on the text that chose its epoch, worse by 0.5 on another.

    The budget ends before its best epoch.
    """
    for seed in range(6):
        own = [5.55 - 0.04, 5.5 + wobble(seed)]
        unfrozen = [5.6, 5.46, *[5.55] * 8, 5.0, 5.1]
        on_test = [5.9, 5.6 + wobble(seed, 0.002), *[5.9] * 8, 5.2, 5.3]
        for experiment, losses, test in (
            ("original", GROWN, [[6.0, 5.9, 6.0], [*own, 5.6]]),
            ("control_unfrozen", [GROWN[0], unfrozen], [[6.0, 5.9, 6.0], on_test]),
        ):
            folder = tmp_path / f"{experiment}{seed}"
            how: Any = {"losses": losses, "test_losses": test}
            synthetic.run(folder, experiment, STANDARD, seed, **how)
    study = study_of(tmp_path)
    [own] = made(study, Claim.stable)
    assert (own.text, own.verdict, own.accuracy.n) == ("test", Verdict.better, 6)
    assert own.budgets == (Budget.compute,)
    [end] = [other for other in study.others if other.kind is Kind.ends]
    assert end.verdict is Verdict.worse
    assert own.accuracy.mean == pytest.approx(0.5, abs=0.02)
    assert "points of test accuracy" in words.clause(own)
    found = verdicts(load(tmp_path)).set_index("claim").loc[Claim.stable]
    assert (found["text"], found["verdict"]) == ("test", "better")


def test_each_figure_of_the_frames_names_its_text_and_no_cell_holds_a_list(tmp_path: Path) -> None:
    results = load(synthetic.sweep(tmp_path, ["original"], [STANDARD], (1,), tested=0.1))
    for name, frame in results.frames().items():
        for column in frame:
            if column.endswith(("loss", "perplexity", "accuracy_percent", "_points", "_nats")):
                assert {"test", "validation", "train"} & set(column.split("_")), (name, column)
            assert not any(isinstance(value, list) for value in frame[column])
    run = results.runs.iloc[0]
    assert run["last_test_loss"] == pytest.approx(run["last_validation_loss"] + 0.1)
    change = run["last_test_accuracy_percent"] - run["first_test_accuracy_percent"]
    assert run["test_accuracy_change_points"] == pytest.approx(change)


# --- which seeds ----------------------------------------------------------------------------------


def test_a_seed_that_was_cut_is_left_out_and_the_comparison_stays(tmp_path: Path) -> None:
    def control(seed: int) -> list[list[float]]:
        return [[6.0, 5.8, 5.6]] if seed == 4 else scratch(seed)

    folder = known(tmp_path, {"original": GROWN, FROM_SCRATCH: control}, seeds=12)
    [own] = made(study_of(folder), Claim.stepwise)
    assert own.accuracy.left_out == {LeftOut.cut_short: 1}
    assert (own.accuracy.n, own.verdict) == (11, Verdict.worse)
    assert 4 not in own.accuracy.differences


def test_a_verdict_that_was_settled_stays_though_later_seeds_are_cut(tmp_path: Path) -> None:
    def control(seed: int) -> list[list[float]]:
        return [[6.0, 5.8, 5.6]] if seed >= 6 else scratch(seed)

    folder = known(tmp_path, {"original": GROWN, FROM_SCRATCH: control}, seeds=8)
    found = [one for one in study_of(folder, looks=LOOKS).claims if one.claim is Claim.stepwise]
    assert [(one.verdict, one.look) for one in found] == [(Verdict.worse, 5)]


def test_more_than_one_failed_run_in_ten_makes_a_verdict_not_tested(tmp_path: Path) -> None:
    known(tmp_path, {"original": GROWN, FROM_SCRATCH: scratch}, seeds=19)
    for failed, tested in ((1, True), (2, True), (3, False)):
        folder = tmp_path / f"failed{failed}"
        synthetic.run(folder, FROM_SCRATCH, STANDARD, 100 + failed, status="failed")
        [own] = [one for one in study_of(tmp_path).claims if one.kind is Kind.budget]
        if tested:
            assert (own.verdict, own.accuracy.left_out) == (Verdict.worse, {"failed": failed})
        else:
            assert own.not_made
            assert own.not_made.reason is Reason.failed
            assert own.verdict is Verdict.untested
            assert "3 of 22 runs of from scratch, Standard failed" in words.clause(own)


# --- what is one comparison, and one model --------------------------------------------------------


def test_a_claim_is_not_judged_again_among_the_others(tmp_path: Path) -> None:
    study = study_of(known(tmp_path, {"original": GROWN, FROM_SCRATCH: scratch}))
    [own] = made(study, Claim.stepwise)
    assert (own.budgets, own.judged.levels.family) == ((Budget.tokens, Budget.compute), 1)
    assert study.others == []


def test_arms_that_trained_the_same_models_are_one(tmp_path: Path) -> None:
    """Phases may be longer by the settings, and have stopped all the same."""
    longer, other = "phase.initial.max_epochs=77", "lr.base=0.002"
    for seed in range(5):
        for place, (given, same) in enumerate((("", "a"), (longer, "a"), (other, "b"))):
            losses = [GROWN[0], [5.6, 5.5 + wobble(seed, 0.01 if same == "a" else 0.02), 5.7]]
            how: Any = {"same_as": same, "losses": losses}
            folder = tmp_path / f"{place}{seed}"
            synthetic.run(folder, "original", STANDARD, seed, *filter(None, [given]), **how)
    study = study_of(tmp_path)
    runs = study.arms.runs.drop_duplicates("variant").set_index("variant")["same_as"]
    assert runs.dropna().to_dict() == {f"original {longer}": "original"}
    [own] = study.others
    assert (own.a, own.judged.levels.family) == (f"original {other}", 1)


def test_moments_that_gave_the_same_models_are_one(tmp_path: Path) -> None:
    """Of six moments three are one: with 15 pairs the difference to the last is hidden."""
    for moment in (1, 2, 4, 6, 8, 10):
        for seed in range(1, 6):
            own = 0.02 * math.sin(7 * min(moment, 4) + seed)
            timing_run(tmp_path, moment, seed, own, trained=min(moment, 4))
    (found,) = measures.timings(*read(load(tmp_path)))
    assert list(found.losses) == [1, 2, 4]
    assert found.alike[4] == [6, 8, 10]
    half = stats.summary(found.losses[4] - found.losses[2], 1 - 0.05 / 3)
    assert (4 in found.worse) == (half.low > 0)
    said = words.timing_text(found)
    assert "grown after 4 epochs and after 6, 8, 10 epochs are the same" in said
    first = write_report([tmp_path], tmp_path / "r").read_text().partition("in numbers")[0]
    assert all(each in first for each in (said, "The immediate effect of growth"))


# --- intervals and estimates ----------------------------------------------------------------------


def test_each_interval_says_its_level_and_what_it_pays_for(tmp_path: Path) -> None:
    folder = known(tmp_path, {"original": GROWN, FROM_SCRATCH: scratch})
    [once] = made(study_of(folder), Claim.stepwise)
    [looked] = made(study_of(folder, looks=LOOKS), Claim.stepwise)
    both, _ = as_frames([once, looked])
    assert both["pays_for"].tolist() == ["1 comparison", "2 comparisons and all looks"]
    at = LOOKS.levels(LOOKS.at.index(looked.look), 2)
    levels = [0.05, at.each]
    assert both["confidence"].tolist() == pytest.approx([1 - level for level in levels])
    assert both["confidence_alone"].tolist() == pytest.approx([0.95, 1 - at.alone])
    assert "(95 % interval" in words.clause(once)
    assert f"({words.percent(1 - at.each)} repeated interval" in words.clause(looked)


def test_what_can_be_detected_has_a_range() -> None:
    value, low, high = stats.smallest_difference(0.3, 5)
    at_ends = (0.3 * math.sqrt(4 / scipy_chi2) for scipy_chi2 in (7.779, 1.064))
    assert [low, high] == pytest.approx([value * end / 0.3 for end in at_ends], rel=1e-3)


def test_the_estimate_of_a_study_that_stopped_is_nearer_to_the_truth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sequential, "DRAWS", 1_000)
    draw, true = np.random.default_rng(0), 0.7
    plain, better = [], []
    for values in draw.normal(true, 1.0, (150, LOOKS.most)):
        for look, seeds in enumerate(LOOKS.at):
            pairs = stats.paired(pd.Series(values[:seeds]), pd.Series(np.zeros(seeds)))
            [own] = stats.judge([pairs], LOOKS.levels(look, 3))
            if own.verdict in (Verdict.better, Verdict.worse):
                plain.append(pairs.mean)
                better.append(sequential.corrected_for_stopping(pairs, LOOKS, look, 3))
                if not look:
                    assert better[-1] == pytest.approx(plain[-1], rel=0.02)
                break
    assert true < np.mean(better) < np.mean(plain) - 0.05
