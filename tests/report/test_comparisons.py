"""Arms, what is compared of them within which budget, and what they spent, from made-up runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from proglayer.report import measures, stats, study
from proglayer.report.arms import DEEP, STANDARD, Margins, Metric, arms, differing
from proglayer.report.comparisons import Budget, Claim, Comparison, Kind, Reason
from proglayer.results import load
from proglayer.run.record import CorpusRecord

from .. import synthetic
from .test_report import known, wobble

pytestmark = pytest.mark.usefixtures("no_fsync")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original and a control, both models, three seeds."""
    folder = tmp_path_factory.mktemp("study") / "sweep"
    return synthetic.sweep(folder, ("original", "control_from_scratch"), seeds=(1, 2, 3))


def judged(*folders: Path, margins: Margins | None = None) -> study.Study:
    return study.judge_study(load(*folders), margins or Margins(), None)


def with_pairs(family: Sequence[Comparison]) -> list[Comparison]:
    return [own for own in family if own.tested]


# --- compute --------------------------------------------------------------------------------------


def test_the_ledger_counts_every_phase_and_every_epoch(sweep: Path) -> None:
    results = load(sweep)
    runs = arms(results).runs
    table = measures.spent(results, runs).set_index(["variant", "model"])
    for (variant, model), arm in runs.groupby(["variant", "model"]):
        row = table.loc[(variant, model)]
        phases = results.phases[results.phases["run"].isin(arm["run"])]
        seeds = len(arm)
        assert row["tokens"] == phases["train_tokens"].sum() / seeds
        both = phases["train_flops_head"] + phases["train_flops_body"]
        assert row["flops"] == pytest.approx(both.sum() / seeds)
        assert row["flops_without_head"] == pytest.approx(phases["train_flops_body"].sum() / seeds)
        assert row["train_seconds"] == pytest.approx(phases["train_seconds"].sum() / seeds)
    # and the courses end where the ledger does
    curves = measures.curves(results, runs)
    last = curves.groupby("run")[measures.COLUMNS].max()
    ends = runs.set_index("run")
    for column in last.columns:
        expected = ends[column].astype(float).reindex(last.index)
        np.testing.assert_allclose(last[column], expected, rtol=1e-9)


def one_arm(
    variant: str, *points: tuple[float, float], layers: Any = 4
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A run of one arm, and its curve of (compute, loss)."""
    last = {"last_layers": 4, "last_loss": min(loss for _, loss in points)}
    run = pd.DataFrame([{"run": variant, "variant": variant, "model": STANDARD, "seed": 1} | last])
    curve = pd.DataFrame(points, columns=["compute", "loss"]).assign(layers=layers, epoch=1)
    spent = dict.fromkeys(measures.COLUMNS, curve["compute"])
    return run, curve.assign(run=variant, **spent)


def reached(target: float, *points: tuple[float, float], layers: Any = 4) -> float | None:
    found = measures.to_target(*one_arm("arm", *points, layers=layers), {STANDARD: target})
    return None if not found["reached"].iloc[0] else found["flops"].iloc[0]


def test_a_target_is_reached_between_two_measurements() -> None:
    falling = ((10, 8.0), (20, 7.0), (40, 6.0))
    assert reached(7.0, *falling) == pytest.approx(20)
    assert reached(6.25, *falling) == pytest.approx(35)
    assert reached(8.5, *falling) == pytest.approx(10)  # already there when first measured
    assert reached(5.9, *falling) is None
    # measurements that are not finite are passed over
    assert reached(7.0, (1, 8.0), (2, np.nan), (3, 6.0)) == 2
    assert reached(7.0, (1, np.nan)) is None


def test_what_was_reached_before_growing_is_no_merit_of_growing() -> None:
    points = ((1, 7.0), (2, 6.0), (3, 6.8), (4, 6.4))
    assert reached(6.5, *points) == 1.5
    assert reached(6.5, *points, layers=[3, 3, 4, 4]) == pytest.approx(3.75)
    assert reached(6.2, *points, layers=[3, 3, 4, 4]) is None


def gain(scratch: tuple[Any, ...], grown: tuple[Any, ...]) -> float | None:
    both = [one_arm("scratch", *scratch), one_arm("grown", *grown)]
    runs, curves = (pd.concat(parts, ignore_index=True) for parts in zip(*both, strict=True))
    found = measures.speed_up(runs, curves, {"grown": "scratch"}).set_index("measure").loc["flops"]
    return found["mean"] if found["reached"] else None


def test_the_speed_up_is_that_of_the_stacking_literature() -> None:
    # Du et al. 2024: the loss of 300 B tokens from scratch is reached with 194 B: 54.6 % faster.
    from_scratch = ((100, 3.0), (200, 2.5), (300, 2.25))
    grown = ((100, 2.75), (194, 2.25), (300, 2.0))
    assert gain(from_scratch, grown) == pytest.approx(0.546, abs=0.0005)
    assert gain(grown[:2], from_scratch) == pytest.approx(194 / 300 - 1)
    assert gain(from_scratch, from_scratch) == 0
    # none where the target is never reached
    assert gain(((1, 3.0), (2, 2.0)), ((1, 3.0), (2, 2.5))) is None
    assert gain(((1, np.nan),), ((1, 3.0), (2, 2.5))) is None


def test_a_speed_up_is_the_geometric_mean_and_none_where_a_seed_does_not_get_there() -> None:
    every = [
        one_arm(f"{name}{seed}", (1, 3.0), (at, 2.0)) if at else one_arm(f"{name}{seed}", (1, 3.0))
        for name, ends in (("scratch", (2, 2, 2)), ("grown", (1, 4, None)))
        for seed, at in enumerate(ends)
    ]  # fmt: skip
    runs, curves = (pd.concat(parts, ignore_index=True) for parts in zip(*every, strict=True))
    runs["seed"] = runs["variant"].str[-1].astype(int)
    runs["variant"] = runs["variant"].str[:-1]
    runs["last_loss"] = runs["last_loss"].where(runs["variant"] == "grown", 2.0)
    curves.loc[curves["run"] == "grown0", "loss"] = [2.0, 1.9]

    def found(seeds: int) -> Any:
        shown = runs[runs["seed"] < seeds]
        gains = measures.speed_up(shown, curves, {"grown": "scratch"})
        return gains.set_index("measure").loc["flops"]

    two = found(2)
    assert (two["seeds"], two["reached"]) == (2, 2)
    assert two["mean"] == pytest.approx(math.sqrt((2 / 1) * (2 / 4)) - 1)
    assert two["low"] < two["mean"] < two["high"]
    three = found(3)
    assert (three["seeds"], three["reached"]) == (3, 2)
    assert math.isnan(three["mean"])
    to = measures.to_target(runs, curves, {STANDARD: 2.0}).set_index("variant")
    assert to.loc["grown", ["seeds", "reached"]].tolist() == [3, 2]
    assert math.isnan(to.loc["grown", "flops"])


# --- arms -----------------------------------------------------------------------------------------


def test_what_was_swept_across_experiments_is_a_condition_and_the_rest_a_variant(
    tmp_path: Path,
) -> None:
    for rate in ("0.001", "0.003"):
        for experiment in ("original", "split_lr"):
            for seed in (1, 2):
                synthetic.run(tmp_path / f"{rate}{experiment}{seed}", experiment, STANDARD, seed,
                            f"lr.base={rate}")  # fmt: skip
    for seed in (1, 2):
        synthetic.run(tmp_path / f"free{seed}", "split_lr", STANDARD, seed, "lr.base=0.001",
                    "freeze=none", choices={"experiment": "split_lr", "model": STANDARD,
                                            "freeze": "none"})  # fmt: skip
    found = arms(load(tmp_path))
    assert found.conditions == ("pydocs lr.base=0.001", "pydocs lr.base=0.003")
    first = found.of(0)
    assert list(first.groupby("variant", sort=False).size().items()) == [
        ("original", 2),
        ("split_lr", 2),
        ("split_lr freeze=none", 2),
    ]
    assert list(found.of(1)["variant"].unique()) == ["original", "split_lr"]
    differs = differing(first, "split_lr")
    assert (differs["split_lr"], differs["split_lr freeze=none"]) == ("", "freeze.steps")


def corpus(**of: Any) -> CorpusRecord:
    given = {
        "name": "wikitext2", "fingerprint": "e" * 64, "vocab_size": 8192, "seq_len": 32,
        "train_windows": 3_000, "validation_windows": 500,
    }  # fmt: skip
    return CorpusRecord(**(given | of))


def test_runs_on_other_texts_do_not_compare(tmp_path: Path) -> None:
    synthetic.run(tmp_path / "a", "original", STANDARD, 1)
    synthetic.run(tmp_path / "b", "original", DEEP, 1)
    synthetic.run(tmp_path / "c", "original", DEEP, 2, corpus=corpus())
    found = arms(load(tmp_path))
    assert found.conditions == ("pydocs", "wikitext2")
    assert [len(found.of(number)) for number in (0, 1)] == [2, 1]


def test_a_failed_seed_that_was_run_again_is_not_lacked(tmp_path: Path) -> None:
    sweep = synthetic.sweep(tmp_path / "s", ["original"], seeds=(1, 2))
    synthetic.run(tmp_path / "again", "original", DEEP, 1, status="failed")
    synthetic.run(tmp_path / "other", "wider", DEEP, 3, status="failed")
    found = arms(load(sweep, tmp_path / "again", tmp_path / "other"))
    assert found.lacking.empty
    assert len(found.asked(0)) == 4


# --- comparisons ----------------------------------------------------------------------------------


def test_a_margin_is_the_readers(sweep: Path) -> None:
    made = with_pairs(judged(sweep, margins=Margins(points=3.0, nats=0.02)).claims)
    assert {own.verdict for own in made} == {stats.Verdict.same}
    pairs = made[0].pairs
    assert (pairs[Metric.accuracy].margin, pairs[Metric.loss].margin) == (3.0, 0.02)
    # 0.02 nats less are 1.98 % less perplexity.
    assert pairs[Metric.perplexity].margin == pytest.approx(100 * (1 - np.exp(-0.02)))


def test_variants_are_set_against_each_other_in_every_metric(sweep: Path) -> None:
    found = judged(sweep)
    runs = found.arms.runs
    by_seed = runs[runs["model"] == DEEP].set_index(["variant", "seed"])
    own, other = by_seed.loc["original"], by_seed.loc["control_from_scratch"]
    before = other["last_perplexity"]
    [ends] = [c for c in found.others if c.model == DEEP and c.kind is Kind.ends]
    for metric, expected in (
        (Metric.accuracy, own["last_accuracy_percent"] - other["last_accuracy_percent"]),
        (Metric.perplexity, (before - own["last_perplexity"]) / before * 100),
        (Metric.loss, other["last_loss"] - own["last_loss"]),
    ):
        assert ends.pairs[metric].mean == pytest.approx(expected.astype(float).mean())
        assert ends.pairs[metric].sd == pytest.approx(expected.astype(float).std())


def test_a_variant_is_set_against_a_control_of_its_own_size(tmp_path: Path) -> None:
    names = ["original", "more_layers", "wider", "control_from_scratch", "control_keep_training"]
    sweep = synthetic.sweep(tmp_path / "s", names, [STANDARD], (1, 2))
    found = judged(sweep)
    pairs = {(own.a, own.b) for own in found.others}
    assert ("original", "control_from_scratch") in pairs
    assert not pairs & {(name, "control_from_scratch") for name in ("more_layers", "wider")}
    # more layers grow from what keeps training, wider does not
    assert ("more_layers", "control_keep_training") in pairs
    assert ("wider", "control_keep_training") not in pairs
    assert set(found.conditions[0].tables["speed_up"]["variant"]) == {"original"}
    for seed in (1, 2):
        six = "added_layers=3"
        synthetic.run(tmp_path / "six" / str(seed), "control_from_scratch", STANDARD, seed, six)
    found = judged(sweep, tmp_path / "six")
    pairs = {(own.a, own.b) for own in found.others}
    assert ("more_layers", "control_from_scratch added_layers=3") in pairs
    speed_up = found.conditions[0].tables["speed_up"]
    assert set(speed_up["variant"]) == {"original", "more_layers"}


def test_a_variant_with_one_model_is_no_finding_about_models(tmp_path: Path) -> None:
    for model, names in ((STANDARD, ["split_lr", "more_layers"]), (DEEP, ["split_lr"])):
        synthetic.sweep(tmp_path / model, names, [model], (1, 2))
    assert [own.a for own in with_pairs(judged(tmp_path).claims)] == ["split_lr"]


def test_growing_is_not_credited_with_what_was_reached_before_growing(tmp_path: Path) -> None:
    """All grown models end worse than from scratch; with three layers all but two were there."""
    early = known(tmp_path, {
        "original": lambda seed: [[6.0, 5.5 if seed < 6 else 5.6, 5.7], [5.75, 5.66, 5.68]],
        "control_unfrozen": lambda seed: [[6.0, 5.5 if seed < 6 else 5.6, 5.7], [5.7, 5.64, 5.65]],
        "control_from_scratch": [[6.2, 5.56, 5.58]],
    })  # fmt: skip
    gains = judged(early).conditions[0].tables["speed_up"]
    assert set(gains["variant"]) == {"original", "control_unfrozen"}
    assert set(gains["reached"]) == {0}
    assert gains["mean"].isna().all()


def stepwise(found: study.Study) -> list[Comparison]:
    return [own for own in found.claims if own.claim is Claim.stepwise]


def test_from_scratch_that_was_cut_is_not_compared_and_what_is_asked_for_is(tmp_path: Path) -> None:
    """From scratch had half the tokens, still falling."""
    cut = known(tmp_path, {
        "original": [[6.0, 5.9, 5.8], [5.7, 5.6, 5.5]], "control_from_scratch": [[6.0, 5.8, 5.6]],
    })  # fmt: skip
    [own] = stepwise(judged(cut))
    assert own.verdict is stats.Verdict.untested
    assert own.not_made is not None
    assert (own.not_made.reason, own.not_made.share) == (Reason.cut_short, 0.5)
    assert "phase.max_epochs=6" in own.not_made.settings
    for seed in range(8):
        losses = [[6.0, 5.8, 5.6, 5.5, 5.45, 5.4 + wobble(seed)]]
        synthetic.run(tmp_path / f"longer{seed}", "control_from_scratch", STANDARD, seed,
                      "phase.max_epochs=6", losses=losses)  # fmt: skip
    made = stepwise(judged(cut))
    assert [own.budgets for own in made] == [(Budget.tokens,), (Budget.compute,)]
    assert {(own.verdict, own.accuracy.n) for own in made} == {(stats.Verdict.worse, 8)}


def test_seeds_that_failed_or_never_began_are_counted_at_an_equal_budget(tmp_path: Path) -> None:
    names = ["original", "control_from_scratch"]
    sweep = synthetic.sweep(tmp_path / "s", names, [STANDARD], (1, 2))
    synthetic.run(sweep / "1_aaaaaa", "original", STANDARD, 2, status="failed")
    synthetic.run(tmp_path / "x", "control_from_scratch", STANDARD, 3, status="failed")
    made = stepwise(judged(sweep, tmp_path / "x"))
    assert {own.accuracy.n for own in made} == {1}
    assert {str(dict(own.accuracy.left_out)) for own in made} == {"{'failed': 2}"}


def test_one_that_stopped_by_itself_had_all_it_wanted(tmp_path: Path) -> None:
    """And tokens and operations that give the same numbers are one comparison of the family."""
    folder = known(tmp_path, {
        "original": lambda seed: [[6.0, 5.9, 6.0], [5.7, 5.5, 5.6]],
        "control_from_scratch": lambda seed: [[6.0, 5.6 + wobble(seed), 5.9]],
    })  # fmt: skip
    [own] = with_pairs(judged(folder).claims)
    assert own.budgets == (Budget.tokens, Budget.compute)
    assert own.judged.levels.family == 1
    assert own.verdict is stats.Verdict.better


def test_the_frozen_run_sets_the_budget_of_the_unfrozen_one(tmp_path: Path) -> None:
    """An unfrozen model that got better only after more operations is no better at equal ones."""
    folder = known(tmp_path, {
        "original": lambda seed: [[6.0, 5.9, 6.0], [5.6, 5.5 + wobble(seed), 5.6]],
        "control_unfrozen": lambda seed: [[6.0, 5.9, 6.0], [5.6, 5.55, *[5.54] * 8, 5.0, 5.1]],
    })  # fmt: skip
    found = judged(folder)
    [own] = with_pairs(found.claims)
    assert (own.budgets, own.verdict) == ((Budget.compute,), stats.Verdict.better)
    [end] = [other for other in found.others if other.kind is Kind.ends]
    assert end.verdict is stats.Verdict.worse


def test_a_comparison_is_made_once_and_the_claims_of_all_conditions_are_one_family(
    sweep: Path, tmp_path: Path
) -> None:
    found = judged(sweep)
    made = [own for own in [*found.claims, *found.others] if own.pairs]
    pairs = [(frozenset((own.a, own.b)), own.model, own.kind, own.budgets) for own in made]
    assert len(pairs) == len(set(pairs))
    # what is claimed of the models in the original is not among the others
    assert "original" not in {own.a for own in found.others if own.kind is Kind.models}
    for rate in ("0.001", "0.003"):
        synthetic.sweep(tmp_path / rate, ["original", "split_lr"], (STANDARD, DEEP), (1, 2, 3),
                        f"lr.base={rate}")  # fmt: skip
    claims = with_pairs(judged(tmp_path).claims)
    assert len({own.condition for own in claims}) == 2
    assert {own.judged.levels.family for own in claims} == {2}


# --- the text that is judged on -------------------------------------------------------------------


def test_what_is_judged_is_judged_on_the_test_text(tmp_path: Path) -> None:
    """From scratch was lucky on the text that chose its epoch; on the test text it is no better."""
    for seed in range(8):
        by = wobble(seed)
        for experiment, losses, on_test in (
            ("original", [[6.0, 5.9, 6.0], [5.6, 5.5, 5.6]], [5.9, 5.5 + by]),
            ("control_from_scratch", [[6.0, 5.4, 5.9]], [5.52]),
        ):
            synthetic.run(tmp_path / f"{experiment}{seed}", experiment, STANDARD, seed,
                          losses=losses, test_losses=on_test)  # fmt: skip
    [own] = with_pairs(judged(tmp_path).claims)
    assert (own.verdict, own.on_validation) == (stats.Verdict.better, False)
    expected = 0.1 - 5 * np.mean([wobble(seed) for seed in range(8)])
    assert own.accuracy.mean == pytest.approx(expected)
    # beside a run without a test text there is none that all have
    synthetic.run(tmp_path / "old", "split_lr", STANDARD, 1)
    found = judged(tmp_path)
    assert [own.verdict for own in with_pairs(found.claims)] == [stats.Verdict.worse]
    assert set(found.arms.runs["judged_on"]) == {"validation"}


@pytest.mark.parametrize(
    ("texts", "on"),
    [(("t" * 64, "t" * 64), "test"), ((None, None), "test"), (("t" * 64, None), "validation")],
)
def test_runs_that_were_tested_on_several_texts_are_judged_on_the_validation_text(
    tmp_path: Path, texts: tuple[str | None, ...], on: str
) -> None:
    """The same training with and without the data set's own test split at hand."""
    for seed, text in enumerate(texts):
        synthetic.run(tmp_path / str(seed), "control_from_scratch", STANDARD, seed,
                      losses=[[6.0, 5.9]], test_losses=[6.0],
                      corpus=corpus(test_windows=700, test_fingerprint=text))  # fmt: skip
    assert set(arms(load(tmp_path)).runs["judged_on"]) == {on}


def test_an_epoch_that_its_run_did_not_select_is_compared_on_the_validation_text(
    tmp_path: Path,
) -> None:
    for seed in range(3):
        for experiment, losses, on_test in (
            ("original", [[6.0, 5.9, 6.0], [5.6, 5.5 + wobble(seed), 5.6]], [7.0, 7.0]),
            ("control_from_scratch", [[6.0, 5.6, 5.6, 5.6, 5.6, 5.6, 5.6, 5.0, 5.9]], [5.0]),
        ):
            synthetic.run(tmp_path / f"{experiment}{seed}", experiment, STANDARD, seed,
                          losses=losses, test_losses=on_test)  # fmt: skip
    [own] = with_pairs(judged(tmp_path).claims)
    assert own.on_validation
    assert own.accuracy.mean == pytest.approx(0.5, abs=0.02)
