"""The report: its figures are those of the frames, its text is text, and no pile breaks it."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import pandas as pd
import pytest

from proglayer.config import flat_settings
from proglayer.files import everything
from proglayer.report import comparisons, ledger, page, sections, stats, study
from proglayer.report import pictures as figures
from proglayer.report import write as reporting
from proglayer.report.__main__ import main
from proglayer.report.study import DEEP, STANDARD, Margins
from proglayer.report.write import write_report
from proglayer.results import NOT_THE_EXPERIMENT, load, write_csv
from proglayer.store.record import CorpusRecord, read_jobs, write_jobs

from .. import synthetic
from ..helpers import SHORT, Command, config

# Text that would be an element, a formula, a cell, a heading or mathematics if it were let.
EVIL = '<script>alert("1")</script>'
FORMULA = "=1+1"
NASTY = f"{FORMULA} {EVIL} | `x` **b** $\\frac{{1}}$ [a](javascript:1)\n# head\x07 & é"


pytestmark = pytest.mark.usefixtures("no_fsync")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original and a control, both models, three seeds."""
    folder = tmp_path_factory.mktemp("study") / "sweep"
    experiments = ("original", "control_from_scratch")
    return synthetic.sweep(folder, experiments, seeds=(1, 2, 3))


@pytest.fixture(scope="module")
def report(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its report."""
    out = tmp_path_factory.mktemp("report")
    return write_report([sweep], out).parent


class Page(HTMLParser):
    """What a browser would make of a page: its elements, tables and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._in: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._in:
            while self._in.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if "script" in self._in:
            self.scripts.append(data)
        elif "style" not in self._in:
            self.text += data
            if "td" in self._in or "th" in self._in:
                self.tables[-1][-1][-1] += data

    def table(self, *heads: str) -> list[dict[str, str]]:
        """The rows of the first table whose heads begin with these."""
        for head, *rows in self.tables:
            if head[: len(heads)] == list(heads):
                return [dict(zip(head, row, strict=True)) for row in rows]
        raise AssertionError(f"no table {heads} among {[t[0] for t in self.tables]}")


def page_of(folder: Path) -> Page:
    return Page((folder / "index.html").read_text(encoding="utf-8"))


# --- numbers --------------------------------------------------------------------------------------


def test_the_founding_tables_are_those_of_the_frames(sweep: Path, report: Path) -> None:
    results = load(sweep)
    runs = results.runs[(results.runs["experiment"] == "original")]
    runs = runs[runs["model"] == STANDARD]
    own = results.phases[results.phases["run"].isin(runs["run"])]
    rows = page_of(report).table("Phase", "Layers", "Best Acc", "Best PPL", "Time", "Best Epoch")
    assert [row["Phase"] for row in rows] == ["initial", "grown", "Change"]
    for number, row in enumerate(rows[:2], start=1):
        phase = own[own["phase"] == number]
        perplexity = phase["validation_perplexity"]
        accuracy = phase["validation_accuracy_percent"]
        seconds = phase["train_seconds"] + phase["evaluation_seconds"]
        assert row["Layers"] == str(phase["layers"].iloc[0])
        assert row["Best PPL"] == f"{perplexity.mean():,.2f} ± {perplexity.std():,.2f}"
        assert row["Best Acc"] == f"{accuracy.mean():.2f} ± {accuracy.std():.2f} %"
        assert row["Time"] == f"{seconds.mean():.1f} ± {seconds.std():.1f} s"
    points, percent = runs["accuracy_points"], runs["perplexity_percent"]
    assert rows[2]["Best Acc"] == f"{points.mean():+.2f} ± {points.std():.2f} points"
    assert rows[2]["Best PPL"] == f"{percent.mean():+.2f} ± {percent.std():.2f} %"


def test_the_published_numbers_stand_beside_them(report: Path) -> None:
    text = page_of(report).text
    for number in ("978.89", "975.51", "950.45", "968.60", "16.35 %", "16.26 %", "-0.15 points",
                   "+0.34 %", "-0.19 points", "-1.91 %", "51.1 s", "2 min 25 s"):  # fmt: skip
        assert number in text, number


def test_changes_and_differences_are_what_the_statistics_say(sweep: Path, report: Path) -> None:
    runs = load(sweep).runs
    original = runs[runs["experiment"] == "original"]
    by_model = {
        model: group.set_index("seed")["accuracy_points"]
        for model, group in original.groupby("model")
    }
    changes = pd.read_csv(report / "tables" / "changes.csv")
    table = changes[(changes["variant"] == "original") & (changes["metric"] == "accuracy")]
    for row in table.to_dict("records"):
        expected = stats.summary(by_model[row["model"]].to_numpy(dtype=float))
        assert row["mean"] == pytest.approx(expected.mean)
        assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high))
    judged = pd.read_csv(report / "tables" / "comparisons.csv")
    claims = judged[judged["claim"].notna() & (judged["metric"] == "accuracy")]
    deeper = claims[claims["claim"].str.startswith("Deep supervision")].iloc[0]
    expected = stats.paired(by_model[DEEP], by_model[STANDARD], margin=0.1)
    assert deeper["mean"] == pytest.approx(expected.mean)
    assert deeper["p"] == pytest.approx(expected.p)
    # All comparisons that the claims rest on are one family; what was not tested is none of it.
    tested = claims[claims["n"] > 1]
    assert set(tested["family"]) == {len(tested)}
    assert (claims.loc[claims["n"] == 0, "verdict"] == "not tested").all()
    assert tested["p_adjusted"].tolist() == pytest.approx(
        (len(tested) * tested["p"]).clip(upper=1).tolist()
    )
    by_seed = pd.read_csv(report / "tables" / "differences.csv")
    own = by_seed[(by_seed["claim"] == deeper["claim"]) & (by_seed["metric"] == "accuracy")]
    expected_by_seed = (by_model[DEEP] - by_model[STANDARD]).astype(float)
    assert own.set_index("seed")["difference"].to_dict() == pytest.approx(
        expected_by_seed.to_dict()
    )


def test_the_ledger_counts_every_phase_and_every_epoch(sweep: Path, report: Path) -> None:
    results = load(sweep)
    runs = results.runs
    table = pd.read_csv(report / "tables" / "ledger.csv").set_index(["variant", "model"])
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
    arms = study.arms(results)
    curves = ledger.curves(results, arms.runs)
    last = curves.groupby("run")[["tokens", "flops", "flops_without_head", "seconds"]].max()
    ends = arms.runs.set_index("run")
    for column in last.columns:
        expected = ends[column].astype(float).reindex(last.index)
        np.testing.assert_allclose(last[column], expected, rtol=1e-9)


def one_arm(
    variant: str, *points: tuple[float, float], layers: Any = 4
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A run of one arm, and its curve of (compute, loss)."""
    last = {"last_layers": 4, "last_loss": min(loss for _, loss in points)}
    run = pd.DataFrame([{"run": variant, "variant": variant, "model": STANDARD, "seed": 1} | last])
    curve = pd.DataFrame(points, columns=["compute", "loss"]).assign(layers=layers)
    measures = {m.column: curve["compute"] for m in ledger.MEASURES}
    return run, curve.assign(run=variant, **measures)


def reached(target: float, *points: tuple[float, float], layers: Any = 4) -> float | None:
    found = ledger.to_target(*one_arm("arm", *points, layers=layers), {STANDARD: target}).iloc[0]
    return None if not found["reached"] else found["flops"]


def test_a_target_is_reached_between_two_measurements() -> None:
    falling = ((10, 8.0), (20, 7.0), (40, 6.0))
    assert reached(7.0, *falling) == pytest.approx(20)
    assert reached(6.25, *falling) == pytest.approx(35)
    assert reached(8.5, *falling) == pytest.approx(10)  # already there when first measured
    assert reached(5.9, *falling) is None


def test_what_was_reached_before_growing_is_no_merit_of_growing() -> None:
    points = ((1, 7.0), (2, 6.0), (3, 6.8), (4, 6.4))
    assert reached(6.5, *points) == 1.5
    assert reached(6.5, *points, layers=[3, 3, 4, 4]) == pytest.approx(3.75)
    assert reached(6.2, *points, layers=[3, 3, 4, 4]) is None


def test_measurements_that_are_not_finite_are_passed_over() -> None:
    assert reached(7.0, (1, 8.0), (2, np.nan), (3, 6.0)) == 2
    assert reached(7.0, (1, np.nan)) is None


def gain(scratch: tuple[Any, ...], grown: tuple[Any, ...]) -> float | None:
    arms = [one_arm("scratch", *scratch), one_arm("grown", *grown)]
    runs, curves = (pd.concat(parts, ignore_index=True) for parts in zip(*arms, strict=True))
    found = ledger.speed_up(runs, curves, {"grown": "scratch"}).set_index("measure").loc["flops"]
    return found["mean"] if found["reached"] else None


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
        one_arm(f"{name}{seed}", (1, 3.0), (at, 2.0)) if at else one_arm(f"{name}{seed}", (1, 3.0))
        for name, ends in (("scratch", (2, 2, 2)), ("grown", (1, 4, None)))
        for seed, at in enumerate(ends)
    ]  # fmt: skip
    runs, curves = (pd.concat(parts, ignore_index=True) for parts in zip(*arms, strict=True))
    runs["seed"] = runs["variant"].str[-1].astype(int)
    runs["variant"] = runs["variant"].str[:-1]
    runs["last_loss"] = runs["last_loss"].where(runs["variant"] == "grown", 2.0)
    curves.loc[curves["run"] == "grown0", "loss"] = [2.0, 1.9]

    def found(seeds: int) -> Any:
        own = runs[runs["seed"] < seeds]
        return ledger.speed_up(own, curves, {"grown": "scratch"}).set_index("measure").loc["flops"]

    two = found(2)
    assert (two["seeds"], two["reached"]) == (2, 2)
    assert two["mean"] == pytest.approx(math.sqrt((2 / 1) * (2 / 4)) - 1)
    assert two["low"] < two["mean"] < two["high"]
    three = found(3)
    assert (three["seeds"], three["reached"]) == (3, 2)
    assert math.isnan(three["mean"])
    runs = runs.assign(model=STANDARD)
    reached = ledger.to_target(runs, curves, {STANDARD: 2.0}).set_index("variant")
    assert reached.loc["grown", ["seeds", "reached"]].tolist() == [3, 2]
    assert math.isnan(reached.loc["grown", "flops"])


def claims_of(results: Any, margins: Margins | None = None) -> pd.DataFrame:
    """The judged claims of all conditions."""
    arms, margins = study.arms(results), margins or Margins()
    curves = ledger.curves(results, arms.runs)
    asked = [
        replace(question, condition=name)
        for number, name in enumerate(arms.conditions)
        for question in comparisons.claimed(arms.asked(number), curves, margins)
    ]
    return comparisons.judge(asked)


def others_of(results: Any) -> pd.DataFrame:
    """The judged other comparisons of the first condition."""
    arms = study.arms(results)
    asked = arms.asked(0)
    claims = comparisons.claimed(asked, ledger.curves(results, arms.runs), Margins())
    return comparisons.judge(comparisons.others(asked, claims, Margins()))


def test_a_margin_is_the_readers(sweep: Path) -> None:
    made = claims_of(load(sweep), Margins(points=3.0, nats=0.02))
    made = made[made["n"] > 1]
    assert set(made["margin"]) == {3.0}
    assert set(made["verdict"]) == {"same within the margin"}
    own = made["comparisons"].iloc[0]
    assert own["loss"].margin == 0.02
    # 0.02 nats less are 1.98 % less perplexity.
    assert own["perplexity"].margin == pytest.approx(100 * (1 - np.exp(-0.02)))


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
    arms = study.arms(load(tmp_path))
    assert arms.conditions == ("pydocs lr.base=0.001", "pydocs lr.base=0.003")
    first = arms.of(0)
    assert list(first.groupby("variant", sort=False).size().items()) == [
        ("original", 2),
        ("split_lr", 2),
        ("split_lr freeze=none", 2),
    ]
    assert list(arms.of(1)["variant"].unique()) == ["original", "split_lr"]
    differs = study.differing(first, "split_lr")
    assert (differs["split_lr"], differs["split_lr freeze=none"]) == ("", "freeze.steps")


def test_the_original_is_known_by_its_settings(tmp_path: Path) -> None:
    """And what this module takes for its settings is what `experiment=original` sets."""
    settings = study.founding()["settings"]
    of_file = config("experiment=original").model_dump(mode="json")
    apart = (*NOT_THE_EXPERIMENT, "seed", "model.exit_weights", "model.vocab_size")
    set_there = {
        name: value if isinstance(value, (int, float, str, NoneType)) else json.dumps(value)
        for name, value in flat_settings(of_file)
        if name not in apart and not name.startswith("data.")
    }
    assert {n: v for n, v in settings.items() if n != "freeze.steps"} == {
        n: v for n, v in set_there.items() if n != "freeze.steps"
    }
    assert json.loads(settings["freeze.steps"]) == json.loads(set_there["freeze.steps"])


def test_a_plain_run_is_the_original_and_stands_beside_the_published_one(tmp_path: Path) -> None:
    unnamed = {"choices": {"model": STANDARD, "data": "pydocs", "experiment": None}}
    synthetic.run(tmp_path / "plain", "original", STANDARD, 42, overrides=[], **unnamed)
    page = page_of(write_report([tmp_path / "plain"], tmp_path / "a").parent)
    assert "original, Standard" in page.text
    assert "Published, Standard" in page.text
    assert "with its own" not in page.text

    other = synthetic.run(tmp_path / "other", "original", STANDARD, 42, "phase.patience=2",
                        overrides=["phase.patience=2"], **unnamed)  # fmt: skip
    page = page_of(write_report([other], tmp_path / "b").parent)
    assert "as configured, Standard" in page.text
    assert "Published" not in page.text

    named = synthetic.run(tmp_path / "named", "original", STANDARD, 42, "phase.patience=2")
    page = page_of(write_report([named], tmp_path / "c").parent)
    assert "Published, Standard" in page.text
    assert "with its own phase.patience." in page.text


def test_runs_on_other_texts_do_not_compare(tmp_path: Path) -> None:
    synthetic.run(tmp_path / "a", "original", STANDARD, 1)
    synthetic.run(tmp_path / "b", "original", DEEP, 1)
    folder = synthetic.run(tmp_path / "c", "original", DEEP, 2)
    result = json.loads((folder / "result.json").read_text())
    result["corpus"] |= {"fingerprint": "e" * 64, "name": "wikitext2"}
    (folder / "result.json").write_text(json.dumps(result))
    arms = study.arms(load(tmp_path))
    assert arms.conditions == ("pydocs", "wikitext2")
    assert [len(arms.of(number)) for number in (0, 1)] == [2, 1]


def test_a_sweep_without_an_experiment_is_told_by_what_it_varies(tmp_path: Path) -> None:
    for added in (1, 3):
        for seed in (1, 2):
            given = {
                "choices": {"model": STANDARD, "data": "pydocs", "experiment": None},
                "overrides": [f"added_layers={added}", f"seed={seed}"],
            }
            synthetic.run(tmp_path / f"{added}{seed}", "original", STANDARD, seed,
                        f"added_layers={added}", **given)  # fmt: skip
    runs = study.arms(load(tmp_path)).runs
    assert list(runs["variant"].unique()) == ["added_layers=1", "added_layers=3"]
    page = page_of(write_report([tmp_path], tmp_path / "report").parent)
    assert "added_layers=3, Standard" in page.text


# --- seeds that did not complete, controls of another size ----------------------------------------


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original in six seeds and both models; of deep supervision seed 1 failed, 2 was killed
    before its record was written, 3 never began and 4 was not asked for.
    """
    folder = tmp_path_factory.mktemp("broken") / "sweep"
    synthetic.sweep(folder, ["original"], seeds=range(1, 7))
    for number, status in ((6, "failed"), (7, "running"), (8, ""), (9, "")):
        shutil.rmtree(folder / f"{number}_aaaaaa")
        if status:
            synthetic.run(folder / f"{number}_aaaaaa", "original", DEEP, number - 5, status=status)
    write_jobs(folder, [job for job in read_jobs(folder) if "9_aa" not in job.folder])
    return folder


def test_a_verdict_tells_which_seeds_it_lacks_and_why(broken: Path, tmp_path: Path) -> None:
    out = write_report([broken], tmp_path, png=False).parent
    page = page_of(out)
    assert "2 of 6 seeds, left out: 1 failed, 1 not in both arms, 1 running, 1 waiting" in page.text
    row = page.table("Comparison", "Model")[0]
    assert row["Seeds"] == "2 of 6"
    assert row["Left out"] == "1 failed, 1 not in both arms, 1 running, 1 waiting"
    # the arm's own table and its changes say so, too; seed 4 is nobody's loss there
    assert "over 2 seeds. Left out: 1 failed, 1 running, 1 waiting." in page.text
    changes = page.table("Variant", "Model", "Seeds", "Accuracy: change, points")
    assert [row["Seeds"] for row in changes] == ["6", "2 of 5"]
    judged = pd.read_csv(out / "tables" / "comparisons.csv").iloc[0]
    assert (judged["n"], judged["dropped"]) == (2, 4)


def test_a_failed_seed_that_was_run_again_is_not_lacked(tmp_path: Path) -> None:
    sweep = synthetic.sweep(tmp_path / "s", ["original"], seeds=(1, 2))
    # Without a corpus its record does not tell that it is the same experiment.
    synthetic.run(tmp_path / "again", "original", DEEP, 1, status="failed", corpus=None)
    synthetic.run(tmp_path / "other", "wider", DEEP, 3, status="failed")
    arms = study.arms(load(sweep, tmp_path / "again", tmp_path / "other"))
    assert arms.lacking.empty
    assert len(arms.asked(0)) == 4


def test_from_scratch_at_an_equal_budget_tells_which_seeds_failed(tmp_path: Path) -> None:
    sweep = synthetic.sweep(
        tmp_path / "s", ["original", "control_from_scratch"], [STANDARD], (1, 2)
    )
    synthetic.run(sweep / "1_aaaaaa", "original", STANDARD, 2, status="failed")
    synthetic.run(tmp_path / "x", "control_from_scratch", STANDARD, 3, status="failed")
    claims = claims_of(load(sweep, tmp_path / "x"))
    stepwise = claims[claims["claim"] == comparisons.STEPWISE.title]
    assert set(stepwise["n"]) == {1}
    assert set(stepwise["left_out"]) == {"2 failed"}
    # one that never began has neither a budget nor a record
    synthetic.sweep(sweep.parent / "t", ["original", "control_from_scratch"], [STANDARD], (4,))
    shutil.rmtree(sweep.parent / "t" / "0_aaaaaa")
    claims = claims_of(load(sweep, tmp_path / "x", sweep.parent / "t"))
    stepwise = claims[claims["claim"] == comparisons.STEPWISE.title]
    assert set(stepwise["left_out"]) == {"2 failed, 1 waiting"}


def test_a_variant_is_set_against_a_control_of_its_own_size(tmp_path: Path) -> None:
    names = ["original", "more_layers", "wider", "control_from_scratch", "control_keep_training"]
    sweep = synthetic.sweep(tmp_path / "s", names, [STANDARD], (1, 2))
    page = page_of(write_report([sweep], tmp_path / "a", png=False).parent)
    assert "For more layers, wider there is no run of “from scratch” with the same depth" in (
        page.text
    )
    assert "For wider there is no run of “keep training” with the same depth" in page.text
    table = pd.read_csv(tmp_path / "a" / "tables" / "comparisons.csv")
    pairs = set(zip(table["a"], table["b"], strict=True))
    assert ("original", "control_from_scratch") in pairs
    assert not pairs & {(name, "control_from_scratch") for name in ("more_layers", "wider")}
    # more layers grow from what keeps training, wider does not
    assert ("more_layers", "control_keep_training") in pairs
    assert ("wider", "control_keep_training") not in pairs
    speed_up = pd.read_csv(tmp_path / "a" / "tables" / "speed_up.csv")
    assert set(speed_up["variant"]) == {"original"}

    for seed in (1, 2):
        six = "added_layers=3"
        synthetic.run(tmp_path / "six" / str(seed), "control_from_scratch", STANDARD, seed, six)
    write_report([sweep, tmp_path / "six"], tmp_path / "b", png=False)
    table = pd.read_csv(tmp_path / "b" / "tables" / "comparisons.csv")
    table = table[table["b"].astype(str).str.startswith("control_from")]
    found = dict(zip(table["a"], table["b"], strict=True))
    assert found["more_layers"] == "control_from_scratch added_layers=3"
    speed_up = pd.read_csv(tmp_path / "b" / "tables" / "speed_up.csv")
    assert set(speed_up["variant"]) == {"original", "more_layers"}


def test_variants_are_set_against_each_other_in_every_metric(sweep: Path) -> None:
    results = load(sweep)
    runs = study.arms(results).of(0)
    by_seed = runs[runs["model"] == DEEP].set_index(["variant", "seed"])
    own, other = by_seed.loc["original"], by_seed.loc["control_from_scratch"]
    before = other["last_perplexity"]
    judged = others_of(results)
    judged = judged[(judged["model"] == DEEP) & (judged["measured"] == "each at its own end")]
    [found] = judged["comparisons"]
    for metric, expected in (
        (study.ACCURACY, own["last_accuracy_percent"] - other["last_accuracy_percent"]),
        (study.PERPLEXITY, (before - own["last_perplexity"]) / before * 100),
        (study.LOSS, other["last_loss"] - own["last_loss"]),
    ):
        assert found[metric.name].mean == pytest.approx(expected.astype(float).mean())
        assert found[metric.name].sd == pytest.approx(expected.astype(float).std())
        assert found[metric.name].margin == metric.margin(Margins())


@pytest.mark.parametrize("models", [[STANDARD], [STANDARD, DEEP]])
def test_a_study_of_one_s_own_has_its_own_comparisons_on_the_first_screen(
    tmp_path: Path, models: list[str]
) -> None:
    for init, loss in (("random", 5.6), ("stack", 5.5), ("zero", 5.6)):
        for model in models:
            for seed in range(4):
                own = ["experiment=more_layers", f"model={model}", f"seed={seed}"]
                own += [f"growth.init={init}"] if init != "random" else []
                by = wobble(seed) * {"random": 0.5, "stack": 1.0, "zero": 0.8}[init]
                synthetic.run(tmp_path / f"{init}-{model}-{seed}", "more_layers", model, seed,
                              f"growth.init={init}", overrides=own,
                              losses=[[6.0, 5.9, 6.0], [5.7, loss + by, 5.8]])  # fmt: skip
    out = write_report([tmp_path], tmp_path / "out", png=False).parent
    first = (out / "report.md").read_text(encoding="utf-8").split("\n## ")[1]
    assert "more layers growth.init=stack − more layers: better." in first.replace("**", "")
    assert "each at its own end) Standard: better by 0.50" in first
    assert "more layers growth.init=zero − more layers: same within the margin" in first
    assert "figures/others.svg" in first
    # with both models one of the claims is tested, too
    assert ("What it takes to test" in first) == (len(models) == 1)
    assert ("The study's own comparisons" in first) == (len(models) == 2)
    made = others_of(load(tmp_path))
    assert set(made.loc[made["model"] != "", "b"]) == {"more_layers"}


def test_a_variant_with_one_model_is_no_finding_about_models(tmp_path: Path) -> None:
    for model, names in ((STANDARD, ["split_lr", "more_layers"]), (DEEP, ["split_lr"])):
        synthetic.sweep(tmp_path / model, names, [model], (1, 2))
    claims = claims_of(load(tmp_path))
    assert claims.loc[claims["n"] > 0, "a"].tolist() == ["split_lr"]


def test_more_conditions_than_are_drawn_are_in_the_tables_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sections, "MOST_CONDITIONS", 1)
    for rate in ("0.001", "0.003"):
        synthetic.sweep(tmp_path / rate, ["original", "control_from_scratch"], (STANDARD, DEEP),
                      (1, 2), f"lr.base={rate}")  # fmt: skip
    out = write_report([tmp_path / "0.001", tmp_path / "0.003"], tmp_path / "out", png=False).parent
    for name in ("comparisons", "differences", "changes", "ledger", "to_target", "speed_up"):
        assert pd.read_csv(out / "tables" / f"{name}.csv")["condition"].nunique() == 2, name
    text = page_of(out).text
    assert "1 more condition is in tables/: changes.csv (pydocs lr.base=0.003)." in text


def test_names_of_columns_are_no_formulas_either(tmp_path: Path) -> None:
    frame = pd.DataFrame({"=1+1": ["@x", None], "plain": [-1.5, 2.0]})
    write_csv(frame, tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_bytes() == b"'=1+1,plain\r\n'@x,-1.5\r\n,2.0\r\n"


# --- studies of known truth -----------------------------------------------------------------------


def known(folder: Path, arms: dict[str, Any], seeds: int = 8, model: str = STANDARD) -> Path:
    """Runs of these experiments, whose losses in each phase are given, or made of the seed."""
    for experiment, losses in arms.items():
        for seed in range(seeds):
            own = losses(seed) if callable(losses) else losses
            synthetic.run(folder / f"{experiment}-{model}-{seed}", experiment, model, seed,
                          losses=own)  # fmt: skip
    return folder


def wobble(seed: int, size: float = 0.001) -> float:
    """A deviation that differs between seeds and is none on average over eight."""
    return size * (-1) ** seed * (1 + seed // 2)


def test_growing_is_not_credited_with_what_was_reached_before_growing(tmp_path: Path) -> None:
    """All grown models end worse than from scratch; with three layers all but two were there."""
    early = known(tmp_path, {
        "original": lambda seed: [[6.0, 5.5 if seed < 6 else 5.6, 5.7], [5.75, 5.66, 5.68]],
        "control_unfrozen": lambda seed: [[6.0, 5.5 if seed < 6 else 5.6, 5.7], [5.7, 5.64, 5.65]],
        "control_from_scratch": [[6.2, 5.56, 5.58]],
    })  # fmt: skip
    out = write_report([early], tmp_path / "out", png=False).parent
    gains = pd.read_csv(out / "tables" / "speed_up.csv")
    assert set(gains["variant"]) == {"original", "control_unfrozen"}
    assert set(gains["reached"]) == {0}
    assert gains["mean"].isna().all()
    assert "only 0 of 8 got there" in page_of(out).text


def test_a_comparison_at_equal_tokens_is_not_made_where_from_scratch_was_cut(
    tmp_path: Path,
) -> None:
    """From scratch had half the tokens, still falling; nothing is said of it but what to run."""
    cut = known(tmp_path, {
        "original": [[6.0, 5.9, 5.8], [5.7, 5.6, 5.5]], "control_from_scratch": [[6.0, 5.8, 5.6]],
    })  # fmt: skip
    claims = claims_of(load(cut))
    [row] = claims[claims["claim"] == comparisons.STEPWISE.title].to_dict("records")
    assert (row["verdict"], row["n"]) == ("not tested", 0)
    text = page_of(write_report([cut], tmp_path / "out", png=False).parent).text
    assert "From scratch had half the tokens (cut by max_epochs). Run: python train.py -m" in text
    assert "experiment=control_from_scratch model=standard phase.max_epochs=6" in text
    assert "seed=range(0,8)" in text.replace("'", "")
    # what it asks for is then compared, also beside the runs that were cut
    for seed in range(8):
        synthetic.run(
            tmp_path / f"longer{seed}",
            "control_from_scratch",
            STANDARD,
            seed,
            "phase.max_epochs=6",
            losses=[[6.0, 5.8, 5.6, 5.5, 5.45, 5.4 + wobble(seed)]],
        )
    claims = claims_of(load(cut))
    stepwise = claims[claims["claim"] == comparisons.STEPWISE.title]
    assert stepwise["measured"].tolist() == ["at equal tokens", "at equal compute"]
    assert (set(stepwise["verdict"]), set(stepwise["n"])) == ({"worse"}, {8})


def test_one_that_stopped_by_itself_had_all_it_wanted(tmp_path: Path) -> None:
    """And tokens and operations that give the same numbers are one comparison of the family."""
    folder = known(tmp_path, {
        "original": lambda seed: [[6.0, 5.9, 6.0], [5.7, 5.5, 5.6]],
        "control_from_scratch": lambda seed: [[6.0, 5.6 + wobble(seed), 5.9]],
    })  # fmt: skip
    made = claims_of(load(folder))
    made = made[made["n"] > 1]
    assert made["measured"].tolist() == ["at equal tokens and compute"]
    assert made["family"].tolist() == [1]
    assert made["verdict"].tolist() == ["better"]


def test_the_frozen_run_sets_the_budget_of_the_unfrozen_one(tmp_path: Path) -> None:
    """An unfrozen model that got better only after more operations is no better at equal ones."""
    folder = known(tmp_path, {
        "original": lambda seed: [[6.0, 5.9, 6.0], [5.6, 5.5 + wobble(seed), 5.6]],
        "control_unfrozen": lambda seed: [[6.0, 5.9, 6.0], [5.6, 5.55, *[5.54] * 8, 5.0, 5.1]],
    })  # fmt: skip
    made = claims_of(load(folder))
    [row] = made[made["n"] > 1].to_dict("records")
    assert (row["measured"], row["verdict"]) == ("at equal compute", "better")
    others = others_of(load(folder))
    [end] = others[others["measured"] == "each at its own end"].to_dict("records")
    assert end["verdict"] == "worse"


def test_a_comparison_is_made_once_with_one_sign_and_one_word(sweep: Path) -> None:
    results = load(sweep)
    rows = pd.concat([claims_of(results), others_of(results)])
    rows = rows[rows["n"] > 0]
    pairs = [
        (frozenset((row["a"], row["b"])), row["model"], row["measured"])
        for row in rows.to_dict("records")
    ]
    assert len(pairs) == len(set(pairs))
    # what is claimed of the models in the original is not among the others
    assert "original" not in set(rows.loc[(rows["model"] == "") & (rows["claim"] == ""), "a"])
    assert set(rows["verdict"]) <= {str(verdict) for verdict in stats.Verdict}


def test_the_claims_of_all_conditions_are_one_family(tmp_path: Path) -> None:
    for rate in ("0.001", "0.003"):
        synthetic.sweep(tmp_path / rate, ["original", "split_lr"], (STANDARD, DEEP), (1, 2, 3),
                        f"lr.base={rate}")  # fmt: skip
    made = claims_of(load(tmp_path))
    made = made[made["n"] > 1]
    assert made["condition"].nunique() == 2
    assert set(made["family"]) == {2}
    text = page_of(write_report([tmp_path], tmp_path / "out", png=False).parent).text
    assert text.count("change in accuracy, on pydocs lr.base=0.00") == 2


def test_the_plan_is_of_all_seeds_with_a_range_and_warns_of_looking_twice(sweep: Path) -> None:
    made = claims_of(load(sweep))
    notes = " ".join(comparisons.limits(made[made["n"] > 1]))
    assert re.search(
        r"takes about [\d,]+ \([\d,]+ to [\d,]+\) seeds in all, with a power of", notes
    )
    assert "second look" in notes
    assert re.search(r"With 3 seeds, only differences above roughly [\d.]+ to [\d.]+ points", notes)


def test_seeds_that_were_added_to_a_reported_study_are_a_second_look(tmp_path: Path) -> None:
    first = synthetic.sweep(tmp_path / "first", ["original"], seeds=(1, 2))
    later = synthetic.sweep(tmp_path / "later", ["original"], seeds=(3, 4))
    for path in later.glob("*/result.json"):
        text = path.read_text()
        path.write_text(text.replace("2026-03-01", "2026-03-02"))

    def text(name: str, *folders: Path) -> str:
        return page_of(write_report(folders, tmp_path / name, png=False).parent).text

    # Run in parts, but nothing was shown in between.
    assert "Second look" not in text("a", first, later)
    write_report([first], first / "report", png=False)
    seen = "Second look: 1 report (of 2 seeds) had already shown part of these runs"
    assert seen in text("b", first, later)
    assert "up to about 8.3 %" in text("c", first, later)
    # the first study itself, and the later one alone, are first looks
    assert "Second look" not in text("d", first)
    assert "Second look" not in text("e", later)


def test_seeds_that_were_added_to_a_report_in_its_own_folder_are_a_second_look(
    tmp_path: Path,
) -> None:
    def text(study: str, seeds: tuple[int, ...], *models: str) -> str:
        for seed in seeds:
            for model in models:
                times = dict.fromkeys(("started", "ended"), f"2026-03-{seed:02}T12:00:00+00:00")
                folder = tmp_path / study / f"{seed}-{model}"
                synthetic.run(folder, "original", model, seed, **times)
        page = write_report([tmp_path / study], tmp_path / "s" / "report", png=False)
        return page_of(page.parent).text

    assert "Second look" not in text("s", (1, 2), STANDARD)
    # Another arm of the same seeds, and the same runs again, are no seeds that were added.
    assert "Second look" not in text("s", (1, 2), DEEP)
    assert "Second look: 1 report (of 2 seeds) had already shown" in text("s", (3,), STANDARD)
    more = text("s", (3, 4), STANDARD, DEEP)
    assert "Second look: 2 reports (of 2, 3 seeds) had already shown" in more
    assert "up to about 10.7 %" in more
    assert "Second look: 2 reports (of 2, 3 seeds) had already shown" in text("s", ())
    # Another study in its place.
    assert "Second look" not in text("t", (1, 2, 3), STANDARD, DEEP)


def test_a_seed_that_collapses_is_named_and_every_seed_is_drawn(tmp_path: Path) -> None:
    folder = known(tmp_path, {
        "original": lambda seed: [[6.0, 5.9, 6.0], [5.6, (7.0 if seed == 3 else 5.5), 7.1]],
        "control_from_scratch": lambda seed: [[6.0, 5.6 + wobble(seed), 5.9]],
    })  # fmt: skip
    out = write_report([folder], tmp_path / "out", png=False).parent
    assert "Outlying in original − from scratch, Standard: seed 3: " in page_of(out).text
    drawn = ET.parse(out / "figures" / "claims.svg").getroot()
    dots = [e for e in drawn.iter() if e.tag.endswith("use")]
    assert len(dots) >= 8


def test_the_noise_of_the_text_stands_beside_the_margin(sweep: Path, tmp_path: Path) -> None:
    accuracy = study.arms(load(sweep)).of(0).groupby("model")["end_accuracy"].mean().max() / 100
    error = 100 * math.sqrt(2 * accuracy * (1 - accuracy) / 16_000)
    text = page_of(write_report([sweep], tmp_path / "a", png=False).parent).text
    assert f"a difference with a standard error of about {error:.2g} points or less" in text
    assert "The margin of 0.1 points is below what this text can surely show" in text
    wide = write_report([sweep], tmp_path / "b", Margins(points=2.0), png=False).parent
    assert "below what this text" not in page_of(wide).text


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
    made = claims_of(load(tmp_path))
    [row] = made[made["n"] > 1].to_dict("records")
    assert (row["verdict"], row["measured"]) == ("better", "at equal tokens and compute")
    assert row["mean"] == pytest.approx(0.1 - 5 * np.mean([wobble(seed) for seed in range(8)]))
    # the founding experiment's tables keep to the validation text
    page = page_of(write_report([tmp_path], tmp_path / "a", png=False).parent)
    assert page.table("Phase", "Layers")[1]["Best PPL"].startswith(f"{np.exp(5.5):,.2f}")
    # beside a run of before, there is no test text that all have
    synthetic.run(tmp_path / "old", "split_lr", STANDARD, 1)
    made = claims_of(load(tmp_path))
    assert made[made["n"] > 1]["verdict"].tolist() == ["worse"]
    text = page_of(write_report([tmp_path], tmp_path / "b", png=False).parent).text
    assert "which also chose the epochs of these runs (they have no test text)" in text


def test_runs_that_were_tested_on_several_texts_are_judged_on_the_validation_text(
    tmp_path: Path,
) -> None:
    """The same training with and without the data set's own test split at hand."""

    def report_of(folder: Path, *texts: str | None) -> str:
        for seed, text in enumerate(texts):
            for experiment, on_test in (("original", [5.9, 5.5]), ("control_from_scratch", [6.0])):
                losses = [[6.0, 5.9, 6.0], [5.6, 5.5, 5.6]][-len(on_test) :]
                corpus = CorpusRecord(
                    name="wikitext2", fingerprint="f" * 64, vocab_size=8192, seq_len=32,
                    train_windows=3_000, validation_windows=500, test_windows=700,
                    test_fingerprint=text,
                )  # fmt: skip
                synthetic.run(folder / f"{experiment}{seed}", experiment, STANDARD, seed,
                              losses=losses, test_losses=on_test, corpus=corpus)  # fmt: skip
        return page_of(write_report([folder], folder / "report", png=False).parent).text

    assert "Judged on a test text of 22,400 tokens." in report_of(
        tmp_path / "a", "t" * 64, "t" * 64
    )
    assert "Judged on a test text of 22,400 tokens." in report_of(tmp_path / "b", None, None)
    text = report_of(tmp_path / "c", "t" * 64, None)
    assert "Judged on the validation text of 16,000 tokens" in text
    assert "chose the epochs of these runs (some were tested on another text)" in text


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
    made = claims_of(load(tmp_path))
    made = made[made["n"] > 1]
    assert made["measured"].tolist() == ["at equal tokens and compute, on the validation text"]
    assert made["mean"].tolist() == [pytest.approx(0.5, abs=0.02)]


def test_a_run_of_one_phase_has_not_changed(tmp_path: Path) -> None:
    synthetic.run(tmp_path / "a", "control_from_scratch", STANDARD, 1)
    page = page_of(write_report([tmp_path], tmp_path / "out", png=False).parent)
    [row] = page.table("Run", "Variant")
    assert (row["Change, points"], row["Perplexity fell by, %"]) == ("", "")


# --- one seed, one run, nothing -------------------------------------------------------------------


def test_one_seed_concludes_nothing_and_tells_the_binomial_error(tmp_path: Path) -> None:
    sweep = synthetic.sweep(tmp_path / "s", ["original"], seeds=[42])
    text = page_of(write_report([sweep], tmp_path / "out").parent).text
    runs = load(sweep).runs
    arm = runs[runs["model"] == STANDARD]
    accuracy = arm["last_accuracy_percent"].mean()
    error = stats.binomial_error(accuracy / 100, 16_000)
    assert "One seed: nothing can be concluded." in text
    assert f"Standard: {accuracy:.2f} % of 16,000 tokens, ±{error:.2g} points" in text
    judged = pd.read_csv(tmp_path / "out" / "tables" / "comparisons.csv")
    assert set(judged["verdict"].dropna()) == {"not tested"}


def test_an_arm_of_one_seed_tells_its_error_also_where_others_have_more(tmp_path: Path) -> None:
    synthetic.sweep(tmp_path / "s", ["original"], [STANDARD], (1, 2, 3))
    synthetic.run(tmp_path / "one", "split_lr", STANDARD, 1)
    text = page_of(write_report([tmp_path], tmp_path / "out", png=False).parent).text
    runs = load(tmp_path / "one").runs
    error = stats.binomial_error(runs["last_accuracy_percent"].iloc[0] / 100, 16_000)
    assert "One seed of split lr (Standard): nothing can be concluded." in text
    assert f"of 16,000 tokens, ±{error:.2g} points" in text


def test_a_single_run_has_a_report(tmp_path: Path) -> None:
    run = synthetic.run(tmp_path / "run", "original", STANDARD, 42)
    out = write_report([run], run / "report").parent
    page = page_of(out)
    assert "nothing can be concluded" in page.text
    assert page.table("Phase")[0]["Phase"] == "initial"
    assert "python train.py experiment=original model=standard seed=42" in page.text
    ran = {row["What"]: row["Values in these runs"] for row in page.table("What")}
    assert (ran["Working tree changed"], ran["Vocabulary"]) == ("no", "8,192")
    assert {path.suffix for path in (out / "figures").iterdir()} == {".svg", ".png"}
    # and it is neither a run of its own nor something that could not be read
    again = load(run)
    assert len(again.runs) == 1
    assert again.left_out.empty


def test_folders_without_a_run_are_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], report: Path, sweep: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "none"), "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: there is no folder {tmp_path / 'none'}\n"
    assert main([str(sweep), "-o", str(tmp_path / "file")]) == 2
    assert "file (File exists)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as end:
        main([str(sweep), "--margin", "0"])
    assert end.value.code == 2


# --- piles of all sorts ---------------------------------------------------------------------------


def test_a_mixed_pile_is_told_and_never_raises(tmp_path: Path) -> None:
    pile = tmp_path / "pile"
    sweep = synthetic.sweep(pile / "sweep", ["original", "control_unfrozen"], seeds=(1, 2))
    for number, status in ((0, "failed"), (3, "interrupted"), (5, "running")):
        shutil.rmtree(sweep / f"{number}_aaaaaa")
        traceback = {"traceback": "Traceback\nValueError: no"} if status == "failed" else {}
        synthetic.run(
            sweep / f"{number}_aaaaaa", "original", STANDARD, 9 + number, status=status, **traceback
        )
    shutil.rmtree(sweep / "6_aaaaaa")
    (sweep / "7_aaaaaa" / "result.json").write_text('{"format"')
    newer = synthetic.run(pile / "newer", "original", STANDARD, 1)
    record = json.loads((newer / "result.json").read_text())
    (newer / "result.json").write_text(json.dumps(record | {"format": 99}))
    synthetic.run(pile / "other", "wider", DEEP, 3, "phase.batch_size=32")
    (pile / "photos").mkdir()
    synthetic.run(pile / "nothing", "original", STANDARD, 4, phases=[], changes=None)
    page = page_of(write_report([pile], tmp_path / "out").parent)
    status = {row["Run"]: row["Status"] for row in page.table("Run", "Variant")}
    assert status["sweep/0_aaaaaa"] == "failed"
    assert status["sweep/6_aaaaaa"] == "waiting"
    reasons = {row["Run"]: row["Reason"] for row in page.table("Run", "Status", "Overrides")}
    assert reasons["sweep/0_aaaaaa"] == "the loss became NaN"
    assert "ValueError: no" in page.text
    left_out = {row["Folder"]: row["Kind"] for row in page.table("Folder", "Kind")}
    assert left_out == {"sweep/7_aaaaaa": "damaged", "newer": "newer"}


@pytest.mark.parametrize("status", ["failed", "interrupted", "running"])
def test_a_pile_of_which_nothing_completed(tmp_path: Path, status: str) -> None:
    synthetic.run(tmp_path / "run", "original", STANDARD, 1, status=status)
    text = page_of(write_report([tmp_path], tmp_path / "out").parent).text
    assert "No run has completed yet" in text


# --- text is text ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of runs whose names, settings, reasons and tracebacks mean harm."""
    pile = tmp_path_factory.mktemp("nasty")
    choices = {"model": f"m{EVIL}", "experiment": NASTY, "data": "pydocs"}
    for seed in (1, 2):
        synthetic.run(pile / f"{FORMULA}{seed}<b>", "original", STANDARD, seed, choices=choices,
                    overrides=[f"seed={seed}", f"data.files=[{NASTY}]"])  # fmt: skip
    synthetic.run(pile / "bad", "original", STANDARD, 3, status="failed", choices=choices,
                reason=NASTY, traceback=NASTY, overrides=[FORMULA, EVIL])  # fmt: skip
    return write_report([pile], pile / "report").parent


def test_text_from_settings_and_logs_is_text_in_the_page(nasty: Path) -> None:
    text = (nasty / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    known = Page((nasty / "index.html").read_text(encoding="utf-8"))
    assert text.count("<script") == 1
    assert len(known.scripts) == 1
    assert "alert" not in known.scripts[0]
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert not any("javascript" in (a.get("href") or "") for _, a in page.elements)
    # nothing was lost on the way either
    assert NASTY.replace("\x07", " ") in page.text
    assert "\x07" not in text


def test_text_from_settings_and_logs_is_text_in_markdown(nasty: Path) -> None:
    text = (nasty / "report.md").read_text(encoding="utf-8")
    outside = re.sub(r"(?ms)^(`{3,})text\n.*?^\1$", "", text)
    assert "<script" not in outside
    assert not re.search(r"(?<!\\)\]\(javascript", outside)
    # Every heading is one of ours, and no row has more cells than its head.
    ours = re.findall(r"(?m)^#+ (.*)$", outside)
    assert not any(heading.startswith("head") for heading in ours)
    rows = [line for line in outside.splitlines() if line.startswith("|")]
    widths = [len(re.findall(r"(?<!\\)\|", row)) for row in rows]
    heads = [w for w, after in zip(widths, rows[1:], strict=False) if after.startswith("| ---")]
    assert set(widths) <= set(heads)


def test_no_cell_of_a_table_is_a_formula(nasty: Path) -> None:
    import csv

    for path in (nasty / "tables").iterdir():
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.reader(file):
                for cell in row:
                    harmless = re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?|-?inf", cell)
                    assert harmless or not cell.startswith(("=", "+", "-", "@")), (path.name, cell)


def test_pictures_show_text_as_it_is(nasty: Path) -> None:
    for path in (nasty / "figures").glob("*.svg"):
        root = ET.parse(path).getroot()
        assert not [e for e in root.iter() if e.tag.endswith("script")]
    words = "".join(path.read_text() for path in (nasty / "figures").glob("loss-*.svg"))
    assert html.escape(FORMULA) in words


# --- pictures of several seeds --------------------------------------------------------------------


def drawn(paint: Callable[[figures.Gallery], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The panel that `paint` would draw into a gallery."""
    from matplotlib.figure import Figure

    panels = []

    def draw(*arguments: Any, **_: Any) -> None:
        axes = Figure().add_subplot()
        next(a for a in arguments if callable(a) and not isinstance(a, str))(axes)
        panels.append(axes)

    gallery = figures.Gallery(Path(), everything)
    monkeypatch.setattr(gallery, "draw", draw)
    paint(gallery)
    return panels[0]


@pytest.fixture
def uneven() -> pd.DataFrame:
    """Two seeds of one phase: one stops after two epochs, a worse one goes on for four."""
    loss = [7.0, 6.0, 9.0, 8.5, 8.0, 8.2]
    return pd.DataFrame(
        {
            "run": list("aabbbb"),
            "seed": [1, 1, 2, 2, 2, 2],
            "variant": "original",
            "model": STANDARD,
            "phase": 1,
            "phase_name": "initial",
            "layers": 3,
            "epoch": [1, 2, 1, 2, 3, 4],
            "step": [1, 2, 1, 2, 3, 4],
            "loss": loss,
            "best": [False, True, False, False, True, False],
            "tokens": [10.0, 20.0, 10.0, 20.0, 30.0, 40.0],
        }
    )


def test_a_mean_curve_ends_where_the_first_seed_stops(
    uneven: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = drawn(
        lambda gallery: figures.learning_curve(gallery, "c", "original", uneven, (6.0, 9.0)),
        monkeypatch,
    )
    [mean] = axes.lines
    assert mean.get_xydata().tolist() == [[1, 8.0], [2, 7.25]]
    [band] = axes.collections
    sd = np.std([7.0, 9.0], ddof=1)
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(8.0 + sd)


def test_loss_against_compute_is_that_of_the_model_in_hand(
    uneven: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A seed that has stopped counts with its selected epoch; growth shows as it is."""
    later = uneven[uneven["epoch"] <= 2].assign(
        phase=2, layers=4, loss=[7.5, 6.5, 9.5, 8.5], tokens=[30.0, 40.0, 50.0, 60.0],
        best=[False, True, False, True],
    )  # fmt: skip
    curves = pd.concat([uneven, later], ignore_index=True)
    axes = drawn(
        lambda gallery: figures.against_compute(
            gallery, "c", "t", curves, "tokens", "tokens", ["original"]
        ),
        monkeypatch,
    )
    [mean] = axes.lines
    assert mean.get_xydata().tolist() == [
        [10, 8.0], [20, 7.25], [25, 7.0], [30, pytest.approx(7.1)], [30, 7.0],
        [40, 8.5], [50, 7.5], [50, 7.5],
    ]  # fmt: skip
    assert mean.get_markevery() == [4, 7]


# --- the page itself ------------------------------------------------------------------------------


def test_equal_runs_give_equal_bytes(tmp_path: Path) -> None:
    run = synthetic.run(tmp_path / "run", "original", STANDARD, 1)
    one, other = (write_report([run], tmp_path / name).parent for name in ("one", "other"))
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(p.relative_to(other) for p in other.rglob("*") if p.is_file())
    for name in files:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_pictures_of_an_earlier_report_are_not_left_beside_newer_ones(tmp_path: Path) -> None:
    sweep = synthetic.sweep(tmp_path / "sweep", ["original"], [STANDARD], [1])
    for png in (True, False):
        write_report([sweep], tmp_path / "out", png=png)
        assert any((tmp_path / "out").rglob("*.png")) is png


def test_the_page_asks_for_nothing(report: Path) -> None:
    page = page_of(report)
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:")), (tag, target)
    text = (report / "index.html").read_text()
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text
    assert "Content-Security-Policy" in text


@pytest.fixture(scope="module")
def two_conditions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the original and a variant, on two rates."""
    folder = tmp_path_factory.mktemp("two")
    for rate in ("0.001", "0.003"):
        synthetic.sweep(folder / rate, ["original", "split_lr"], [STANDARD], (1, 2),
                      f"lr.base={rate}")  # fmt: skip
    return write_report([folder], folder / "out", png=False).parent


@pytest.mark.parametrize("which", ["report", "two_conditions"])
def test_no_name_is_given_twice_and_every_reference_leads_somewhere(
    which: str, request: pytest.FixtureRequest
) -> None:
    report: Path = request.getfixturevalue(which)
    page = page_of(report)
    assert page.text.count("Validation curves across phases") == (2 if "two" in which else 1)
    names = [a["id"] for _, a in page.elements if "id" in a]
    assert len(names) == len(set(names))
    text = (report / "index.html").read_text()
    used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text))
    assert {a or b for a, b in used} <= set(names)


def test_every_picture_is_in_both_documents_and_says_what_it_shows(report: Path) -> None:
    page = page_of(report)
    figures = [a for tag, a in page.elements if tag == "figure"]
    drawn = {path.stem for path in (report / "figures").glob("*.svg")}
    assert {a["id"] for a in figures} == {f"figure-{name}" for name in drawn}
    assert all(len(a["aria-label"] or "") > 40 for a in figures)
    markdown = (report / "report.md").read_text()
    assert set(re.findall(r"\]\(figures/([^)]+)\.svg\)", markdown)) == drawn


def test_markdown_and_page_hold_the_same_tables(report: Path) -> None:
    markdown = (report / "report.md").read_text()
    tables = re.findall(r"(?m)(?:^\|.*\n)+", markdown)
    plain = [
        [
            [html.unescape(re.sub(r"\\(.)|\*\*|<!-- -->", r"\1", cell)).strip()
             for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in table.splitlines()
            if not line.startswith("| ---")
        ]
        for table in tables
    ]  # fmt: skip
    assert plain == page_of(report).tables


@pytest.mark.parametrize(
    "text",
    ["a | b", "# x", "- x", "1. x", "1.66", "-0.5", "*b*", "_u_", "`c`", "<i>", "&amp;", "[a](b)"],
)
def test_marks_of_markdown_are_taken_off(text: str) -> None:
    marked = page._marked(text)
    back = html.unescape(re.sub(r"\\([\\`*_\[\]|~$#+\-=.)])", r"\1", marked))
    assert back == text
    assert not re.search(r"(?<!\\)[|*_`\[<]", marked)
    assert marked == text if text in ("1.66", "-0.5") else True


# --- by itself ------------------------------------------------------------------------------------


def test_a_sweep_with_a_failure_leaves_its_report(train: Command, tmp_path: Path) -> None:
    # the second job's loss cannot but become NaN
    rates = ("lr.base=0.001,1e15", "optimizer.clip_norm=null")
    done = train("-m", *SHORT, *rates, "report=true", "hydra.sweep.dir=sweep")
    assert done.status == 1
    assert "report: sweep/report/index.html" in done.out
    page = page_of(tmp_path / "sweep" / "report")
    assert [row["Status"] for row in page.table("Run", "Status")] == ["failed"]
    assert "python train.py -m" in page.text


def test_a_run_leaves_its_report_unless_told_not_to_and_never_fails_for_it(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = train(*SHORT, "report=true", "hydra.run.dir=a")
    assert (done.status, "a/report/index.html" in done.out) == (0, True)
    assert train(*SHORT, "report=false", "hydra.run.dir=b").status == 0
    assert not (tmp_path / "b" / "report").exists()

    def broken(*_: object, **__: object) -> Path:
        raise RuntimeError("no ink")

    monkeypatch.setattr(reporting, "write_report", broken)
    done = train(*SHORT, "report=true", "hydra.run.dir=c")
    assert (done.status, "report:" in done.out) == (0, False)
    log = (tmp_path / "c" / "train.log").read_text()
    assert "no report could be written (RuntimeError: no ink)" in log


# --- in a browser ---------------------------------------------------------------------------------

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_page_without_a_complaint(report: Path, tmp_path: Path) -> None:
    assert CHROMIUM
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=390,900",
         "--enable-logging=stderr", "--v=0", "--dump-dom", (report / "index.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    assert "<figure" in done.stdout
