"""Arms, and the comparisons of a study, from made-up runs of known truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proglayer.report import stats
from proglayer.report.arms import (
    DEEP,
    FROM_SCRATCH,
    KEEP_TRAINING,
    MARGIN,
    STANDARD,
    Metric,
    arms,
    binomial_errors,
    controls,
)
from proglayer.report.comparisons import Budget, Claim, Comparison, Kind, Reason
from proglayer.report.sequential import Looks
from proglayer.report.stats import LeftOut, Verdict
from proglayer.report.study import Study, judge_study
from proglayer.report.words import why_not
from proglayer.results import load

from .. import synthetic

pytestmark = pytest.mark.usefixtures("no_fsync")
BOTH = (Budget.tokens, Budget.compute)


def study_of(*folders: Path, margin: float = MARGIN, looks: Looks | None = None) -> Study:
    return judge_study(load(*folders), margin, looks)


def made(study: Study, claim: Claim) -> list[Comparison]:
    return [own for own in study.claims if own.claim is claim and own.pairs]


def known(folder: Path, arms: dict[str, Any], seeds: int = 8) -> Path:
    """Runs of these experiments, whose losses in each phase are given, or made of the seed."""
    for experiment, losses in arms.items():
        for seed in range(seeds):
            own = losses(seed) if isinstance(losses, Callable) else losses
            synthetic.run(folder / f"{experiment}{seed}", experiment, STANDARD, seed, losses=own)
    return folder


def wobble(seed: int, size: float = 0.001) -> float:
    """A deviation that differs between seeds and is none on average over eight."""
    return size * (-1) ** seed * (1 + seed // 2)


# --- arms -----------------------------------------------------------------------------------------


def test_what_was_swept_across_experiments_is_a_condition_and_the_rest_a_variant(
    tmp_path: Path,
) -> None:
    for rate in ("0.001", "0.003"):
        for experiment in ("original", "split_lr"):
            for seed in (1, 2):
                folder = tmp_path / f"{rate}{experiment}{seed}"
                synthetic.run(folder, experiment, STANDARD, seed, f"lr.base={rate}")
    for seed in (1, 2):
        choices = {"experiment": "split_lr", "model": STANDARD, "freeze": "none"}
        given = "lr.base=0.001", "freeze=none"
        folder = tmp_path / f"free{seed}"
        synthetic.run(folder, "split_lr", STANDARD, seed, *given, choices=choices)
    found = arms(load(tmp_path))
    assert found.conditions == ("pydocs lr.base=0.001", "pydocs lr.base=0.003")
    first = found.of(0)
    assert first.groupby("variant", sort=False).size().to_dict() == {
        "original": 2,
        "split_lr": 2,
        "split_lr freeze=none": 2,
    }


def test_runs_on_other_texts_do_not_compare(tmp_path: Path) -> None:
    synthetic.run(tmp_path / "a", "original", STANDARD, 1)
    synthetic.run(tmp_path / "b", "original", DEEP, 1)
    corpus = {
        "name": "wikitext2",
        "fingerprint": "e" * 64,
        "vocab_size": 8192,
        "seq_len": 32,
        "train_windows": 3000,
        "validation_windows": 500,
    }
    synthetic.run(tmp_path / "c", "original", DEEP, 2, corpus=corpus)
    found = arms(load(tmp_path))
    assert found.conditions == ("pydocs", "wikitext2")
    assert [len(found.of(number)) for number in (0, 1)] == [2, 1]


def test_a_variant_is_set_against_a_control_of_its_own_size(tmp_path: Path) -> None:
    names = ["original", "more_layers", "wider", FROM_SCRATCH, KEEP_TRAINING]
    synthetic.sweep(tmp_path / "s", names, [STANDARD], (1, 2))
    runs = arms(load(tmp_path)).runs
    assert controls(runs, FROM_SCRATCH) == {"original": FROM_SCRATCH}
    # more layers grow from what keeps training, wider does not
    assert set(controls(runs, KEEP_TRAINING)) == {"original", "more_layers"}
    for seed in (1, 2):
        synthetic.run(tmp_path / f"six{seed}", FROM_SCRATCH, STANDARD, seed, "added_layers=3")
    six = controls(arms(load(tmp_path)).runs, FROM_SCRATCH)["more_layers"]
    assert six == f"{FROM_SCRATCH} added_layers=3"


# --- seeds that did not complete ------------------------------------------------------------------


def test_a_comparison_knows_which_seeds_it_lacks_and_why(tmp_path: Path) -> None:
    """Of deep supervision seed 1 was stopped, 2 was killed, 3 never began, 4 was not asked for."""
    synthetic.sweep(tmp_path / "a", ["original"], [STANDARD], range(1, 7))
    synthetic.sweep(tmp_path / "b", ["original"], [DEEP], (5, 6))
    for seed, status in ((1, "interrupted"), (2, "running"), (3, "waiting")):
        own = {"status": status, "phases": [], "epochs": []}
        synthetic.run(tmp_path / status, "original", DEEP, seed, **own)
    study = study_of(tmp_path)
    [own] = made(study, Claim.deep_helps)
    assert own.accuracy.n == 2
    lacks = dict.fromkeys(("interrupted", "running", "waiting", LeftOut.no_partner), 1)
    assert own.accuracy.left_out == lacks


def test_a_failed_seed_that_was_run_again_is_not_lacked(tmp_path: Path) -> None:
    synthetic.sweep(tmp_path / "s", ["original"], seeds=(1, 2))
    synthetic.run(tmp_path / "again", "original", DEEP, 1, status="failed")
    synthetic.run(tmp_path / "other", "wider", DEEP, 3, status="failed")
    found = arms(load(tmp_path))
    assert found.lacking.empty
    assert len(found.asked(0)) == 4


def test_a_budget_knows_which_seeds_lack_on_either_side(tmp_path: Path) -> None:
    sweep = synthetic.sweep(tmp_path / "s", ["original", FROM_SCRATCH], [STANDARD], (1, 2))
    synthetic.run(sweep / "1_aaaaaa", "original", STANDARD, 2, status="interrupted")
    synthetic.run(tmp_path / "x", FROM_SCRATCH, STANDARD, 3, status="interrupted")
    stepwise = made(study_of(tmp_path), Claim.stepwise)
    assert {own.accuracy.n for own in stepwise} == {1}
    assert all(own.accuracy.left_out == {"interrupted": 2} for own in stepwise)


# --- what is compared -----------------------------------------------------------------------------


def test_a_claim_is_what_the_statistics_say_of_the_frames(sweep: Path) -> None:
    study = study_of(sweep)
    runs = load(sweep).runs
    original = runs[runs["experiment"] == "original"]
    points = {
        model: arm.set_index("seed")["validation_accuracy_change_points"]
        for model, arm in original.groupby("model")
    }
    [own] = made(study, Claim.deep_helps)
    expected = stats.paired(points[DEEP], points[STANDARD], margin=0.1)
    assert own.accuracy.mean == pytest.approx(expected.mean)
    assert own.accuracy.p == pytest.approx(expected.p)
    # All comparisons that the claims rest on are one family; what is not tested is none of it.
    tested = [own for own in study.claims if own.tested]
    assert {own.judged.levels.family for own in tested} == {len(tested)}
    [untested] = [own for own in study.claims if own.claim is Claim.stable]
    assert (untested.verdict, untested.accuracy.n) == (Verdict.untested, 0)
    assert untested.not_made
    assert untested.not_made.reason is Reason.no_runs
    assert untested.not_made.run[0] == "experiment=original,control_unfrozen"


def test_variants_are_compared_in_every_metric(sweep: Path) -> None:
    study = study_of(sweep, margin=3.0)
    by_seed = study.arms.runs[study.arms.runs["model"] == DEEP].set_index(["variant", "seed"])
    [found] = [own for own in made(study, Claim.stepwise) if own.model == DEEP]
    for metric in Metric:
        ends = by_seed[metric.last("validation")]
        expected = (ends.loc["original"] - ends.loc[FROM_SCRATCH]).astype(float)
        assert found.pairs[metric].mean == pytest.approx(expected.mean())
        assert found.pairs[metric].sd == pytest.approx(expected.std())
    assert found.accuracy.margin == 3.0
    assert found.verdict is Verdict.same


def test_a_comparison_is_made_once(sweep: Path) -> None:
    study = study_of(sweep)
    every = [own for own in (*study.claims, *study.others) if own.accuracy.n]
    asked = [(own.kind, frozenset((own.a, own.b)), own.model, own.budgets) for own in every]
    assert len(asked) == len(set(asked))
    # what is claimed of the models in the original is not among the others
    assert "original" not in {own.a for own in study.others if own.kind is Kind.models}


def test_the_claims_of_all_conditions_are_one_family(tmp_path: Path) -> None:
    for rate in ("0.001", "0.003"):
        given = ["original", "split_lr"], (STANDARD, DEEP), (1, 2, 3), f"lr.base={rate}"
        synthetic.sweep(tmp_path / rate, *given)
    tested = [own for own in study_of(tmp_path).claims if own.tested]
    assert len({own.condition for own in tested}) == 2
    assert {own.judged.levels.family for own in tested} == {2}


# --- at an equal budget ---------------------------------------------------------------------------


def test_a_comparison_is_not_made_where_max_epochs_cut_the_control(tmp_path: Path) -> None:
    """From scratch had half the tokens, still falling; nothing is said of it but what to run."""
    cut = known(
        tmp_path, {"original": [[6.0, 5.9, 5.8], [5.7, 5.6, 5.5]], FROM_SCRATCH: [[6.0, 5.8, 5.6]]}
    )
    [own] = [own for own in study_of(cut).claims if own.claim is Claim.stepwise]
    assert own.verdict is Verdict.untested
    assert own.not_made
    assert own.not_made.reason is Reason.cut_short
    assert own.not_made.share == pytest.approx(0.5)
    assert own.not_made.run[-1] == "phase.max_epochs=6"
    # what it asks for is then compared, also beside the runs that were cut
    for seed in range(8):
        losses = [[6.0, 5.8, 5.6, 5.5, 5.45, 5.4 + wobble(seed)]]
        folder = tmp_path / f"longer{seed}"
        synthetic.run(folder, FROM_SCRATCH, STANDARD, seed, own.not_made.run[-1], losses=losses)
    stepwise = made(study_of(cut), Claim.stepwise)
    assert [own.budgets for own in stepwise] == [(Budget.tokens,), (Budget.compute,)]
    assert {(own.verdict, own.accuracy.n) for own in stepwise} == {(Verdict.worse, 8)}


def by_phases_alone(folder: Path, experiment: str, epochs: int, *shape: str) -> list[Comparison]:
    """What is compared of arms that only the setting of their phases tells apart."""
    single = "phase=from_scratch", f"phase.initial.max_epochs={epochs}", *shape
    for seed in range(8):
        grown = [[6.0, 5.9, 5.8], [5.7, 5.6, 5.5 + wobble(seed)]]
        scratch = [[6.0 - 0.01 * epoch for epoch in range(epochs)]]
        for name, own, losses in (("grown", (), grown), ("scratch", single, scratch)):
            given = "added_layers=3", "freeze=none", *own
            at = folder / f"{epochs}{shape}{name}{seed}"
            choices = {"model": STANDARD, "phase": name}
            choices |= {"experiment": experiment} if experiment else {}
            synthetic.run(at, "original", STANDARD, seed, *given, losses=losses, choices=choices)
    return [own for own in study_of(folder).others if own.b]


@pytest.mark.parametrize("experiment", ["", "recipe/g_stack"])
def test_a_control_is_known_by_its_phases_and_its_schedule_ends_at_the_budget(
    experiment: str, tmp_path: Path
) -> None:
    [long, _] = by_phases_alone(tmp_path / "long", experiment, 12, "lr.schedule=cosine")
    assert (long.kind, long.verdict) == (Kind.budget, Verdict.untested)
    assert long.not_made
    assert long.not_made.reason is Reason.mid_schedule
    assert "times the compute: within it, its rate is amid" in why_not(long, long.not_made)
    *named, phases, _, length = long.not_made.run
    assert named == ([f"experiment={experiment}"] if experiment else [])
    assert phases == "phase=from_scratch"
    # What it asks for is then compared up to its last epoch, and once.
    epochs = int(length.removeprefix("phase.initial.max_epochs="))
    [own] = by_phases_alone(tmp_path / "fitting", experiment, epochs, "lr.schedule=cosine")
    assert (own.kind, own.verdict, own.accuracy.n) == (Kind.budget, Verdict.better, 8)
    assert own.loss.mean == pytest.approx(5.5 - (6.0 - 0.01 * (epochs - 1)), abs=0.01)
    # A constant rate may be read at any epoch.
    [own, _] = by_phases_alone(tmp_path / "constant", experiment, 12)
    assert own.tested


def test_the_model_right_after_a_growth_is_no_epoch_of_training(tmp_path: Path) -> None:
    """Growth leaves the unfrozen model as good as it was; training then makes it worse."""
    for seed in range(6):
        for experiment in ("original", "control_unfrozen"):
            losses = [[6.0, 5.5, 5.6], [5.8 + wobble(seed), 5.7 + wobble(seed), 5.9]]
            shock = 0.0 if experiment == "control_unfrozen" else 0.4
            folder = tmp_path / f"{experiment}{seed}"
            synthetic.run(folder, experiment, STANDARD, seed, losses=losses, shock=shock)
    [own] = made(study_of(tmp_path), Claim.stable)
    assert own.accuracy.mean == 0
    assert own.verdict is Verdict.same


# --- on which text --------------------------------------------------------------------------------


def on_two_texts(folder: Path, experiment: str, seed: int, *losses: Any, **own: Any) -> Path:
    *curves, on_test = losses
    name = folder / f"{experiment}{seed}"
    own |= {"losses": curves, "test_losses": on_test}
    return synthetic.run(name, experiment, STANDARD, seed, **own)


def test_runs_are_judged_on_the_test_text_where_all_have_one(tmp_path: Path) -> None:
    """From scratch was lucky on the text that chose its epoch; on the test text it is no better."""
    for seed in range(8):
        own = [5.9, 5.5 + wobble(seed)]
        on_two_texts(tmp_path, "original", seed, [6.0, 5.9, 6.0], [5.6, 5.5, 5.6], own)
        on_two_texts(tmp_path, FROM_SCRATCH, seed, [6.0, 5.4, 5.9], [5.52])
    [own] = made(study_of(tmp_path), Claim.stepwise)
    assert (own.verdict, own.budgets, own.text) == (Verdict.better, BOTH, "test")
    assert own.accuracy.mean == pytest.approx(0.1 - 5 * np.mean([wobble(s) for s in range(8)]))
    # beside a run of another time there is no test text that all have
    synthetic.run(tmp_path / "old", "split_lr", STANDARD, 1)
    study = study_of(tmp_path)
    assert set(study.arms.runs["judged_on"]) == {"validation"}
    assert [own.verdict for own in made(study, Claim.stepwise)] == [Verdict.worse]


@pytest.mark.parametrize(
    ("texts", "judged_on"), [("tt", "test"), ("t-", "validation"), ("--", "test")]
)
def test_runs_that_were_tested_on_several_texts_are_judged_on_the_validation_text(
    tmp_path: Path, texts: Iterable[str], judged_on: str
) -> None:
    """The same training with and without the data set's own test split at hand."""
    for seed, text in enumerate(texts):
        corpus = {
            "name": "wikitext2", "fingerprint": "f" * 64, "vocab_size": 8192, "seq_len": 32,
            "train_windows": 3_000, "validation_windows": 500, "test_windows": 700,
            "test_fingerprint": None if text == "-" else text * 64,
        }  # fmt: skip
        losses = [6.0, 5.9, 6.0], [5.6, 5.5, 5.6], [5.9, 5.5]
        on_two_texts(tmp_path, "original", seed, *losses, corpus=corpus)
    runs = arms(load(tmp_path)).runs
    assert set(runs["judged_on"]) == {judged_on}
    [row] = binomial_errors(runs).to_dict("records")
    assert row["tokens"] == (22_400 if judged_on == "test" else 16_000)
    expected = stats.binomial_error(row["accuracy_percent"] / 100, row["tokens"])
    assert row["error_of_difference"] == pytest.approx(math.sqrt(2) * expected)


def test_an_epoch_that_its_run_did_not_select_is_compared_on_the_validation_text(
    tmp_path: Path,
) -> None:
    for seed in range(3):
        grown = [5.6, 5.5 + wobble(seed), 5.6]
        on_two_texts(tmp_path, "original", seed, [6.0, 5.9, 6.0], grown, [7.0, 7.0])
        on_two_texts(tmp_path, FROM_SCRATCH, seed, [6.0, *[5.6] * 6, 5.0, 5.9], [5.0])
    [own] = made(study_of(tmp_path), Claim.stepwise)
    assert (own.budgets, own.text) == (BOTH, "validation")
    assert own.accuracy.mean == pytest.approx(0.5, abs=0.02)
