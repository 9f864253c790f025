"""Studies that add seeds until their claims are settled."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from proglayer.launch.settle import Settle, SettleSettings
from proglayer.report.page import write_report
from proglayer.report.sequential import Looks, read_looks, write_looks
from proglayer.run.record import RecordError

from .. import synthetic
from ..helpers import SHORT, Command, assert_same_bits, contents, results, start, until

BOTH = "model=standard,deep_supervision"
SETTLE = (
    "hydra/sweeper=settle", *SHORT, "threads=1", BOTH, "experiment=original", "phase.max_epochs=3",
    "hydra.sweeper.first=2", "hydra.sweeper.step=1", "hydra.sweeper.most=3",
)  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("hydra.sweeper.first=1", "hydra.sweeper.first=1"),
        ("hydra.sweeper.first=5", "hydra.sweeper.most=3"),
        ("hydra.sweeper.most=3.5", "hydra.sweeper.most=3.5"),
        ("hydra.sweeper.margin=nan", "hydra.sweeper.margin=nan"),
        ("hydra.sweeper.margin=0", "hydra.sweeper.margin=0"),
        ("hydra.sweeper.step=0", "hydra.sweeper.step=0"),
        ("seed=1,2", "seed"),
        ("+hydra.sweeper.params.seed=3", "seed"),
        ("hydra.sweep.subdir=x", "hydra.sweep.subdir"),
        ("model=standard", "hydra/sweeper=settle: these arms test no claim: give both"),
    ],
)
def test_a_setting_that_cannot_work_is_named_in_one_line(
    train: Command, tmp_path: Path, given: str, said: str
):
    own = [each for each in SETTLE if given != "model=standard" or each != BOTH]
    done = train("-m", *own, given, "hydra.sweep.dir=s")
    assert done.status == 1
    assert not (tmp_path / "s").exists()
    (line,) = done.err.splitlines()
    assert line.startswith(f"error: {said}"), line


def test_a_plan_says_when_it_looks(train: Command, tmp_path: Path):
    done = train("-m", *SETTLE, "plan=true")
    assert done.status == 0, done.err
    assert "these 2 arms, looked at with 2, 3 seeds" in done.out
    assert not (tmp_path / "multirun").exists()


@pytest.mark.timeout(900)
def test_a_study_that_is_killed_goes_on_as_if_it_had_not_been(train: Command, tmp_path: Path):
    """Begun on workers, it goes on in one process."""
    pytest.importorskip("joblib")
    settle = (*SETTLE, "hydra.sweep.dir=s")
    whole = train("-m", *settle)
    assert whole.status == 0, whole.err
    for name in ("s", "stages"):
        (tmp_path / name).rename(tmp_path / f"whole_{name}")

    process = start(tmp_path, "-m", *settle, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    # Until its second batch has begun.
    until(lambda: [*tmp_path.glob("s/4_*/metrics.csv")], process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    looks = read_looks(tmp_path / "s")
    assert looks is not None
    assert looks.taken == (2,)

    again = train("-m", *settle)
    assert again.status == 0, again.err
    left = [(tmp_path / name / "looks.json").read_bytes() for name in ("s", "whole_s")]
    assert left[0] == left[1]
    records = results(tmp_path / "whole_s")
    assert len(records) == 6
    assert_same_bits(results(tmp_path / "s"), records)
    first, second = (
        [line for line in done.out.splitlines() if line.startswith(("open", "settled"))]
        for done in (whole, again)
    )
    assert first
    assert first == second
    # The claims as the report finds them.
    reports = [write_report([tmp_path / name], tmp_path / f"r_{name}") for name in ("s", "whole_s")]
    tables = [page.with_name("tables") / "comparisons.csv" for page in reports]
    assert tables[0].read_bytes() == tables[1].read_bytes()
    assert "interim looks with 2, 3 seeds, of at most 3." in reports[0].read_text()


@pytest.mark.timeout(900)
def test_another_study_in_the_same_folder_is_refused_and_named(train: Command, tmp_path: Path):
    settle = ("-m", *SETTLE, "hydra.sweep.dir=s")
    done = train(*settle)
    assert done.status == 0, done.err
    assert "hydra.sweeper.most=3 is reached" in done.out.splitlines()[-1]
    assert "were trained in" not in done.out
    before = contents(tmp_path / "s")
    for given, differs in (
        ("hydra.sweeper.first=3", "first=2, not 3"),
        ("hydra.sweeper.first_seed=2", "first_seed=0, not 2"),
        ("hydra.sweeper.most=5", "most=3, not 5"),
        ("hydra.sweeper.margin=0.2", "margin=0.1, not 0.2"),
        ("lr.base=0.01", "arms."),
        ("growth=random,copy", "arms."),
    ):
        refused = train(*settle, given)
        assert refused.status == 1
        (line,) = refused.err.splitlines()
        assert "holds a study with" in line
        assert differs in line
        assert contents(tmp_path / "s") == before

    # With a margin as wide as this all is the same; it is another study, on other seeds.
    wide = ("hydra.sweeper.margin=90", "hydra.sweeper.first_seed=2", "hydra.sweep.dir=wide")
    settled = train("-m", *SETTLE, *wide)
    assert settled.status == 0, settled.err
    assert f"seeds 2 were trained in {tmp_path / 's'}, too" in settled.out
    lines = settled.out.splitlines()
    assert lines[-1] == "every claim that can be tested is settled"
    assert any(line.startswith("settled at 2 seeds: ") for line in lines)
    assert {record["config"]["seed"] for record in results(tmp_path / "wide")} == {2, 3}


@pytest.mark.timeout(900)
def test_a_batch_of_which_nothing_is_left_is_not_looked_at(train: Command, tmp_path: Path):
    failing = ("-m", *SETTLE, "lr.base=1e12")
    for given, why in (("go_on", "every job of this batch failed"), ("stop", "job 0_")):
        done = train(*failing, f"on_error={given}", f"hydra.sweep.dir={given}")
        assert done.status == 1
        assert done.err.splitlines()[-1].startswith(f"error: {why}"), done.err
        looks = read_looks(tmp_path / given)
        assert looks is not None
        assert looks.taken == ()


ARMS = [
    ("original", "standard"), ("original", "deep_supervision"),
    ("control_unfrozen", "standard"), ("control_unfrozen", "deep_supervision"),
]  # fmt: skip


def study(folder: Path, seeds: int, taken: tuple[int, ...], **failing: Any) -> Settle:
    """A study in which one comparison is noise and the two others are plain after a few seeds."""
    draw = np.random.default_rng(0)
    for seed in range(seeds):
        for number, (experiment, model) in enumerate(ARMS):
            frozen = experiment == "original"
            # In nats; 0.2 of them are a point.
            lower = 0.3 * (model == "deep_supervision") * (1 + frozen)
            noise = 0.2 if model == "standard" and not frozen else 0.01
            loss = 6.8 - lower + noise * draw.normal()
            epochs = [loss + 0.1, loss, loss + 0.1] if frozen else [loss, loss + 1]
            name = f"{seed * len(ARMS) + number}_x"
            status = "failed" if failing.get("seed") == seed else "completed"
            synthetic.run(
                folder / name, experiment, model, seed, losses=[[6.9, 7.0], epochs], status=status
            )
    if taken:
        looks = Looks(first=4, step=2, most=8, first_seed=0, margin=0.1, taken=taken)
        write_looks(folder, looks)
    settings = SettleSettings(first=4, step=2, most=8, first_seed=0, margin=0.1)
    found = Settle(cast(Any, SimpleNamespace(folder=folder)), settings, [() for _ in ARMS])
    found.begin()
    return found


def test_arms_that_no_open_claim_needs_are_dropped(tmp_path: Path):
    found = study(tmp_path, 4, (4,))
    states = [(claim.settled, claim.open, bool(claim.not_made)) for claim in found.claims]
    # Deep supervision, stability under both models; stepwise training was not tested.
    settled, still_open, not_made = (True, False, False), (False, True, False), (False, False, True)
    assert sorted(states) == sorted([settled, still_open, settled, not_made])
    assert [ARMS[arm] for arm in found.needed] == [ARMS[0], ARMS[2]]


def test_what_is_settled_keeps_the_verdict_and_interval_of_its_look(tmp_path: Path):
    first = study(tmp_path, 6, (4,)).claims
    second = study(tmp_path, 6, (4, 6)).claims
    assert any(claim.settled for claim in first)
    for before, after in zip(first, second, strict=True):
        if not after.not_made:
            assert after.look == after.accuracy.n == (4 if before.settled else 6)
        if before.settled:
            assert str(after.accuracy) == str(before.accuracy)


def test_arms_of_which_more_than_one_run_in_ten_failed_are_not_judged(tmp_path: Path):
    found = study(tmp_path, 4, (4,), seed=2)
    assert all(claim.not_made for claim in found.claims)


def test_damaged_looks_are_refused(tmp_path: Path):
    study(tmp_path, 1, (4,))
    (tmp_path / "looks.json").write_text(json.dumps({"first": 4, "step": 2}))
    for reads in (lambda: study(tmp_path, 1, ()), lambda: write_report([tmp_path], tmp_path / "r")):
        with pytest.raises(RecordError, match="looks.json cannot be read"):
            reads()
