"""The page of findings says what its data say."""

from __future__ import annotations

import importlib.util
import itertools
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from proglayer.report import early_exit

from .helpers import ROOT


@pytest.fixture(scope="module")
def findings() -> ModuleType:
    found = importlib.util.spec_from_file_location("findings", ROOT / "scripts" / "findings.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_text_and_pictures_are_those_of_the_data(findings: ModuleType, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    assert findings.render(tmp_path) == page
    shown = re.findall(r"\]\(findings/(.*?)\)", page)
    assert len(shown) >= 4
    for name in shown:
        assert b"<svg " in (tmp_path / name).read_bytes()
        assert (ROOT / "docs" / "findings" / name).is_file()


def test_the_data_are_small(findings: ModuleType) -> None:
    files = [path for path in findings.FINDINGS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 1.5e6


def test_the_data_do_not_say_where_they_come_from(findings: ModuleType) -> None:
    taken = [part for part in findings.DEPTH_PARTS if (findings.FINDINGS / part).exists()]
    for part in (*findings.PARTS, "asked", "settled", *taken):
        runs = findings.read(part).runs
        assert len(runs)
        for column in set(findings.PLACE) & set(runs):
            assert runs[column].isna().all()
        text = runs.to_json()
        assert not re.search(r'["=]\\?/', text), "an absolute path"
        assert "hydra.sweep.dir" not in text


def study_of(findings: ModuleType, seeds: int, gain: float, asked: Any, family: int) -> Any:
    """Return the study where depth pays of made-up losses: two layers are worse by `gain`."""
    rows = []
    for seed, arm in itertools.product(range(1000, 1000 + seeds), findings.DEPTH_ARMS):
        noise = 0.005 * np.sin(seed**2 * len(arm))
        loss = 1.5 + gain * arm.startswith("two") + noise
        overrides = f"experiment=recipe/depth_pays {findings.DEPTH_ARMS[arm]} seed={seed}"
        rows.append({"run": f"{seed} {arm}", "seed": seed, "overrides": overrides, "loss": loss})
    runs = pd.DataFrame(rows)
    figures = {f"test_{name}": runs["loss"] for name in ("loss", "bits_per_byte")}
    phases = runs[["run"]].assign(phase=1, stage=runs["run"], **figures, test_accuracy_percent=50.0)
    phases = phases.assign(train_seconds=3600.0, evaluation_seconds=0.0, epochs=9)
    phases["best_epoch"] = 7 + runs["seed"] % 2
    epochs = pd.concat(
        runs.assign(epoch=n, cumulative_epochs=n, flops=n * 1e12, validation_loss=runs["loss"])
        for n in (1, 2)
    )
    runs = runs.assign(epochs=15, flops=1e12)
    results = SimpleNamespace(runs=runs, phases=phases, epochs=epochs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(findings, "read", lambda part: results)
        return findings.Depth("nowhere", asked, family)


@pytest.mark.parametrize(("seeds", "gain", "judged"), [(7, 0.2, 0), (8, 0.2, 22), (8, 0.0, 1)])
def test_the_study_where_depth_pays_is_judged_once_and_if_there_is_something_to_reach(
    findings: ModuleType, seeds: int, gain: float, judged: int
) -> None:
    study = study_of(findings, seeds, gain, findings.DEPTH_QUESTIONS, findings.PLANNED)
    found = list(itertools.chain.from_iterable(study.questions.values()))
    assert sum(own.judged is not None for own in found) == judged
    assert all(own.judged is not None or own.text.endswith("not judged") for own in found)
    assert study.hours == seeds * len(findings.DEPTH_ARMS)
    assert {row["selected"] for row in study.rows()} == {"13 to 14"}
    assert study.alike("frozen", "frozen") == seeds
    assert study.alike("frozen", "two layers") == 0
    depth = found[0]
    assert depth.pairs.mean == pytest.approx(gain, abs=0.01)
    assert depth.text.startswith("**better**") == (judged == 22)
    assert {own.judged.levels for own in found if own.judged} <= {(26, 0.05 / 26, 0.05)}
    name, _ = next(study.named())
    assert study.size(name, depth.word) == f"{abs(depth.pairs.mean):.3f}"
    with pytest.raises(AssertionError, match=name):
        study.size(name, "worse")
    settled = sum(own.judged.verdict in findings.SETTLED for own in found if own.judged)
    assert study.surviving(1) == f"{settled} of {settled} verdicts"
    assert ("; these fall: **equivalent**: " in study.surviving(50)) == (judged > 1)
    assert [picture.name for picture in study.pictures()] == [
        "nowhere-comparisons",
        "nowhere-curves",
    ]


def test_a_second_text_replicates_a_verdict_contradicts_it_or_leaves_it_open(
    findings: ModuleType,
) -> None:
    first = study_of(findings, 8, 0.2, findings.DEPTH_QUESTIONS, findings.PLANNED)
    same, opposite, none = (
        study_of(findings, 8, gain, findings.AGAIN, 8) for gain in (0.2, -0.2, 0.0)
    )
    depth, others = "at equal tokens six layers − two", "at equal operations `random`"
    gradual, frozen = "gradually unfrozen − frozen", "frozen − nothing frozen"
    assert f"**replicated**: {gradual}, {others}" in same.replication(first)
    assert opposite.replication(first).startswith(f"**contradicted**: {depth}; **open here**: ")
    assert none.replication(first).startswith(f"**open here**: {gradual}, {others}")
    assert none.replication(first).endswith(f"{depth}, {frozen}")
    assert none.replication(none).startswith(f"**replicated**: {depth}; **nothing to replicate**")


def test_what_exits_are_worth_is_kept_of_the_arms_that_are_asked_and_replaced_by_seed(
    findings: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(findings, "FINDINGS", tmp_path)

    def keep(seed: int, loss: float, weights: str = "w") -> None:
        arms = [*findings.USING, findings.CONTROL, "two layers"]
        runs = pd.DataFrame({"arm": arms, "seed": seed, "weights_sha256": "w"})
        runs["run"] = runs["arm"] + str(seed)
        runs["folder"] = [str(tmp_path / run) for run in runs["run"]]
        figures = {"loss": loss, "accuracy_percent": 40.0}
        own = early_exit.Measured(
            exits=[
                early_exit.ExitWorth(layer=n, trained=n == 2, accepted_percent=50.0 * n, **figures)
                for n in (1, 2)
            ],
            early_exit=[early_exit.EarlyExit(threshold=1.0, layers=2.0, **figures)],
            changed_layers=[
                early_exit.ChangedLayers(
                    change="left out", layer=2, loss=loss + 0.5, accuracy_percent=9.0
                )
            ],
        )
        for folder in runs["folder"]:
            Path(folder).mkdir(exist_ok=True)
            early_exit.keep(Path(folder), weights, own)
        findings.keep_exits("depth", runs)

    keep(1, 2.0, weights="others")
    assert not (tmp_path / "depth").exists()
    for seed, loss in ((1, 2.0), (2, 2.0), (1, 1.0)):
        keep(seed, loss)
    exits = findings.Exits("depth", "variant")
    for arm in (*findings.USING, findings.CONTROL):
        assert [(own.n, own.mean) for own in exits.of(arm, "loss")] == [(2, 1.5), (2, 1.5)]
        assert [(own.n, own.mean) for own in exits.without(arm)] == [(2, 0.5)]
    assert set(exits.found.early_exit["variant"]) == {*findings.USING, findings.CONTROL}
