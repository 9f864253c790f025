"""The analyses of `docs/analysis.md`: they run, they are short, and they give what they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from proglayer.results import load

from ..helpers import ROOT
from ..synthetic import run, sweep

FOLDER = Path("multirun/2026-01-31_12-00-00_1f3a9c")
SEEDS = range(1, 5)
MODELS = ("standard", "deep_supervision")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return sweep(tmp_path / FOLDER, ["original", "wider"], seeds=SEEDS)


def test_each_analysis_takes_six_lines_at_most_and_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = sweep(tmp_path / FOLDER, ["original", "wider"], seeds=SEEDS, shock=0.3, tested=0.02)
    matplotlib.use("Agg")
    begin, *analyses = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "analysis.md").read_text(), re.DOTALL
    )
    names: dict[str, Any] = {}
    exec(begin, names)
    for code in analyses:
        assert len(code.splitlines()) <= 6
        on_validation = "results.exits" in code or "results.phases" in code
        assert ("validation" in code) == on_validation
        exec(code, names)
    runs = load(folder).runs
    own = runs[(runs["variant"] == "wider") & (runs["model"] == "standard")].set_index("seed")
    other = runs[(runs["variant"] == "original") & (runs["model"] == "standard")].set_index("seed")
    accuracy = "last_test_accuracy_percent"
    arm = names["arms"].loc[("wider", "standard")]
    assert arm["mean"] == pytest.approx(own[accuracy].mean())
    # t of 3 degrees of freedom
    half = 3.182 * own[accuracy].std() / 2
    assert arm["high"] - arm["mean"] == pytest.approx(half, rel=1e-3)
    paired = (own[accuracy] - other[accuracy]).mean()
    assert names["paired"].loc["standard", "mean"] == pytest.approx(paired)
    deepest = names["by_exit"]["wider", "standard"].dropna().iloc[-1]
    # Exits are of the validation text: 0.02 nats are 0.1 points there.
    assert deepest == pytest.approx(own[accuracy].mean() + 0.1)
    shocks = names["rises"]
    assert shocks.index.tolist() == [(v, m) for v in ("original", "wider") for m in MODELS]
    assert shocks["mean"].tolist() == pytest.approx([0.3] * 4)
    assert shocks["count"].tolist() == [4] * 4
    # balanced arms: the coefficient is the difference of their means
    means = runs.groupby("variant", observed=True)[accuracy].mean()
    effect = names["fit"].params["C(variant)[T.wider]"]
    assert effect == pytest.approx(means["wider"] - means["original"])


def test_step_tokens_and_operations_count_all_phases_up_to_the_row(folder: Path) -> None:
    results = load(folder)
    for name, own in results.runs.set_index("run").iterrows():
        epochs = results.epochs[results.epochs["run"] == name]
        assert epochs["cumulative_epochs"].tolist() == list(range(1, own["epochs"] + 1))
        assert epochs["tokens"].iloc[-1] == own["tokens"] == epochs["train_tokens"].sum()
        assert epochs["flops"].iloc[-1] == pytest.approx(own["flops"])
        phases = results.phases[results.phases["run"] == name]
        exits = results.exits[results.exits["run"] == name]
        selected = phases["best_epoch"] + phases["epochs"].shift(fill_value=0)
        assert exits.groupby("phase")["cumulative_epochs"].first().tolist() == selected.tolist()
        at = epochs.set_index("cumulative_epochs")["flops"][exits["cumulative_epochs"]]
        np.testing.assert_array_equal(exits["flops"], at)
        for frame in (epochs, phases, exits):
            assert set(frame["variant"]) == {own["variant"]}
            assert set(frame["seed"]) == {own["seed"]}
    for frame in (results.runs, results.phases, results.epochs, results.exits):
        assert frame["variant"].cat.ordered
        assert frame["model"].cat.categories.tolist() == ["standard", "deep_supervision"]
        assert frame["seed"].dtype == "int64"
    assert results.epochs["cumulative_epochs"].dtype == results.epochs["tokens"].dtype == "int64"


def test_a_run_that_did_not_complete_took_what_its_epochs_did(tmp_path: Path) -> None:
    results = load(run(tmp_path / "failed", "original", "standard", 1, status="failed"))
    (row,) = results.runs.to_dict("records")
    assert len(results.phases) == 1
    for name in ("tokens", "flops"):
        assert row[name] == results.epochs[name].max() > 0


def test_a_variant_is_what_was_set_but_for_seed_model_and_machine(tmp_path: Path) -> None:
    given = {"a": ["threads=1"], "b": ["lr.base=1e-3", "threads=2"], "c": ["lr.base=0.002"]}
    for name, overrides in given.items():
        run(tmp_path / name, "original", "standard", 1, *overrides)
    assert load(tmp_path).runs["variant"].tolist() == [
        "original lr.base=0.001",
        "original lr.base=0.001",
        "original lr.base=0.002",
    ]
    assert load(tmp_path / "a").runs["variant"].tolist() == ["original"]
