"""The moment of growth in the report, from made-up runs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from proglayer.report import growth, stats, study
from proglayer.report.study import STANDARD
from proglayer.report.write import write_report
from proglayer.results import load

from .. import synthetic
from .test_report import page_of

SHOCKS = {"zero": (0.0, 0.0, 0.0), "stack": (0.4, 0.5, 0.6)}


@pytest.fixture(scope="module", autouse=True)
def no_fsync() -> Iterator[None]:
    """Made-up records by the dozen need not outlive a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
