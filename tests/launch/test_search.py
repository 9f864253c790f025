"""A search by Optuna, end to end."""

from __future__ import annotations

import json
import os
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proglayer.errors import ConfigError
from proglayer.launch.search import read_space
from proglayer.launch.study import open_study, report_epoch
from proglayer.results import load
from proglayer.run.record import EpochRow, RunRecord, RunState, Score

from ..helpers import SHORT, Command, epochs, epochs_trained, results

optuna = pytest.importorskip("optuna")

SEARCH = ("-m", "hydra/sweeper=optuna", *SHORT, "phase.max_epochs=1")
GRID = (*SEARCH, "hydra/sweeper/sampler=grid")


def _trials(sweep: Path) -> list[optuna.trial.FrozenTrial]:
    """The trials of a search."""
    return open_study(sweep, "minimize").trials


def test_a_search_takes_a_failed_job_for_a_failed_trial(train: Command, tmp_path: Path) -> None:
    # One rate diverges, one number of heads does not divide the dimension, one is not whole.
    searched = ("lr.base=choice(1e-3,1e12)", "model.num_heads=choice(2,2.5,3)")
    done = train(*GRID, *searched, "hydra.sweep.dir=a")
    assert done.status == 0, done.err
    records = results(tmp_path / "a")
    reasons = " ".join(sorted(r["reason"] for r in records if r["state"] == "failed"))
    assert reasons.count("model.num_heads=3 does not divide model.dim=8") == 2
    assert reasons.count("model.num_heads=2.5") == 2
    assert reasons.count("lower lr.base") == 1
    (best,) = [r for r in records if r["state"] == "completed"]
    assert best["objective"] == best["phases"][-1]["validation"]["loss"]
    # What is said last of a setting holds.
    given = {*SEARCH[2:], "lr.base=0.001"} - {"phase.max_epochs=2"}
    command = shlex.split(done.out.splitlines()[-1])
    assert command[:2] == ["python", "train.py"]
    assert {*command[2:]} == given
    assert sorted(t.state.name for t in _trials(tmp_path / "a")) == ["COMPLETE"] + ["FAIL"] * 5

    # All points of the grid ended: nothing is left to do.
    again = train(*GRID, *searched, "hydra.sweep.dir=a")
    assert again.status == 0
    assert again.out.splitlines()[-1] == done.out.splitlines()[-1]
    assert len(_trials(tmp_path / "a")) == 6

    stopped = train(*GRID, "model.num_heads=choice(2,3)", "hydra.sweep.dir=b", "on_error=stop")
    assert stopped.status == 1
    assert "model.num_heads=3 does not divide model.dim=8\n" in stopped.err
    assert stopped.err.endswith(" failed, and on_error=stop\n")


def test_a_search_that_was_stopped_goes_on_with_the_trial_under_way(
    train: Command, tmp_path: Path
) -> None:
    search = (
        *SEARCH, "phase.max_epochs=8", "phase.patience=8", "model=deep_supervision",
        "lr.base=tag(log,interval(1e-4,1e-2))", "model.exit_weights=choice(uniform,linear,last)",
        "hydra.sweeper.sampler.seed=1", "hydra.sweeper.n_trials=5",
    )  # fmt: skip

    def stop_the_third() -> None:
        while not list(tmp_path.glob("multirun/search_*/2_*/metrics.csv")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop_the_third, daemon=True).start()
    assert train(*search).status == 130
    # The same command finds its folder again.
    (sweep,) = (tmp_path / "multirun").glob("search_*")
    before = _trials(sweep)
    assert [t.state.name for t in before] == ["COMPLETE", "COMPLETE", "RUNNING"]
    done = train(*search)
    assert done.status == 0, done.err
    assert "2 of 5 trials ended before, 1 to go on with" in done.out
    after = _trials(sweep)
    assert [t.state.name for t in after] == ["COMPLETE"] * 5
    assert [t.params for t in after[:3]] == [t.params for t in before]
    # Not a draw of the first three again, as the seed alone would make them.
    assert len({t.params["lr.base"] for t in after}) == 5
    assert epochs(results(sweep)[2], reused=True)[0] > 0


@pytest.fixture
def own_workers() -> Iterator[None]:
    """joblib keeps its workers, in the folder where they were started, for whoever comes next."""
    loky = pytest.importorskip("joblib.externals.loky")
    loky.get_reusable_executor().shutdown()
    yield
    loky.get_reusable_executor().shutdown()


@pytest.mark.usefixtures("own_workers")
def test_trials_at_once_share_phases_and_are_all_told(train: Command, tmp_path: Path) -> None:
    search = (
        *GRID, "freeze=choice(existing,none,gradual)", "seed=choice(1,2)", "hydra.sweep.dir=a",
        "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweeper.n_jobs=2",
    )  # fmt: skip
    done = train(*search)
    assert done.status == 0, done.err
    assert [t.state.name for t in _trials(tmp_path / "a")] == ["COMPLETE"] * 6
    records = results(tmp_path / "a")
    # For each seed the initial phase, the grown one of two ways of freezing, which gradual
    # unfreezing begins like one of, and two more of its own.
    trained = [count for record in records for count in epochs(record, reused=False) if count]
    assert len(trained) == len([count for count in epochs_trained(records).values() if count]) == 10
    assert shlex.split(done.out.splitlines()[-1])[-1].startswith("threads=")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["lr.bse=choice(1,2)"], "lr.bse"),
        (["lr.base=1e-3"], "hydra/sweeper=optuna has nothing to search"),
        (["lr.base=choice(1,2)", "plan=true"], "plan=true shows jobs before they run"),
        (["lr.base=choice(1,2)", "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=0"),
        (["lr.base=choice(1,2)", "hydra.sweeper.n_jobs=true"], "hydra.sweeper.n_jobs"),
        (["lr.base=choice(1,2)", "hydra.sweeper.n_jobs=2"], "n_jobs takes a launcher"),
        (["lr.base=choice(1,2)", "hydra.sweeper.direction=up"], "hydra.sweeper.direction=up"),
        (["lr.base=choice(1,2)", "hydra/sweeper/sampler=best"], "hydra/sweeper/sampler has no "),
        (["lr.base=choice(1,2)", "+hydra.sweeper.pruner.x=1"], "hydra.sweeper.pruner cannot be "),
        (["lr.base=1e-3,1", "seed=-1"], "seed=-1"),
        (["lr.base=interval(1,2)", "hydra/sweeper/sampler=grid"], "lr.base has no end of values"),
        (["data.tokenizer=choice(words,bpe)"], "take objective=validation_bits_per_byte"),
        (["data.tokenizer=bpe", "data.max_vocab=choice(300,400)"], "does not compare tokenizers"),
    ],
)
def test_a_search_that_cannot_work_says_why_and_leaves_nothing(
    train: Command, tmp_path: Path, given: list[str], message: str
) -> None:
    done = train(*SEARCH, *given, "hydra.sweep.dir=a")
    assert done.status == 1
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "a").exists()


def test_a_grid_whose_trials_all_fail_says_so(train: Command, tmp_path: Path) -> None:
    done = train(*GRID, "report=true", "lr.base=choice(1e12)", "hydra.sweep.dir=a")
    assert done.status == 1
    assert done.err.endswith("error: every trial failed, for the reasons above\n")
    assert [r["state"] for r in results(tmp_path / "a")] == ["failed"]
    assert (tmp_path / "a/report/index.html").exists()


@pytest.mark.usefixtures("own_workers")
def test_a_trial_whose_worker_is_killed_goes_on_with_the_same_command(
    train: Command, tmp_path: Path
) -> None:
    search = (
        *GRID, "seed=choice(1,2)", "phase.max_epochs=40", "phase.patience=40", "threads=1",
        "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweeper.n_jobs=2",
        "hydra.sweep.dir=a",
    )  # fmt: skip

    def kill_the_first() -> None:
        while not (begun := list(tmp_path.glob("a/*/metrics.csv"))):
            time.sleep(0.01)
        record = json.loads(begun[0].with_name("run.json").read_text())
        os.kill(record["environment"]["process"], signal.SIGKILL)

    threading.Thread(target=kill_the_first, daemon=True).start()
    done = train(*search)
    assert done.status == 1
    assert done.err.splitlines()[-1].startswith("error: a worker of joblib was killed"), done.err
    runs = load(tmp_path / "a").runs
    lost = runs[runs["status"] == "lost"]
    assert len(lost) >= 1
    assert set(lost["reason"]) == {"its process was killed"}
    assert train(*search).status == 0
    assert [t.state.name for t in _trials(tmp_path / "a")] == ["COMPLETE"] * 2


def test_the_command_of_the_best_is_the_run_of_its_trial(train: Command, tmp_path: Path) -> None:
    kept = "hydra.sweeper.params={freeze:none,growth:random,phase.batch_size:8,seed:'3,4'}"
    factors = "lr.factor={new: 0.5, head: 0.25}"
    done = train(*GRID, kept, factors, "initial_layers=1", "hydra.sweep.dir=a")
    assert done.status == 0, done.err
    assert sorted(r["config"]["seed"] for r in results(tmp_path / "a")) == [3, 4]
    command = shlex.split(done.out.splitlines()[-1])[2:]
    assert "freeze=none" in command
    # What the command line says of a setting goes before.
    assert [given for given in command if "batch_size" in given] == ["phase.batch_size=16"]
    assert train(*command, "hydra.run.dir=best").status == 0
    (best,), trials = results(tmp_path / "best"), results(tmp_path / "a")
    assert best["objective"] == min(r["objective"] for r in trials)
    assert sum(epochs(best, reused=False)) == 0
    assert best["config"] in [r["config"] for r in trials]


def test_a_folder_takes_trials_of_its_own_search_alone(train: Command, tmp_path: Path) -> None:
    search = (*GRID, "initial_layers=1", "hydra.sweep.dir=a")
    assert train(*search, "lr.base=1e-3,2e-3", "hydra.sweeper.n_trials=1").status == 0
    rates = "lr.base=1e-3,2e-3"
    for other, differs in (
        ([rates, "objective=validation_accuracy_percent"], "by=validation_loss, not validation_ac"),
        ([rates, "hydra.sweeper.direction=maximize"], "direction=minimize, not max"),
        ([rates, "data.max_vocab=100"], "first.data.max_vocab=200, not 100"),
        (["seed=1,2"], "searched="),
    ):
        done = train(*search, *other)
        assert done.status == 1
        (line,) = done.err.splitlines()
        assert "holds a study with" in line
        assert differs in line
    # Where and how trials run is no part of them.
    more = ("lr.base=1e-3,2e-3", "store.dir=others", "hydra.sweeper.n_trials=2")
    assert train(*search, *more).status == 0
    assert len(_trials(tmp_path / "a")) == 2


PRUNED = (
    *GRID, "phase=from_scratch", "phase.max_epochs=6", "phase.patience=6",
    "hydra/sweeper/pruner=median", "hydra.sweeper.pruner.n_startup_trials=1",
    "lr.base=choice(1e-2,1e-4,1e-5,1e-6)", "hydra.sweeper.sampler.seed=3",
)  # fmt: skip


@pytest.mark.usefixtures("own_workers")
def test_trials_that_promise_less_end_early_wherever_they_run(
    train: Command, tmp_path: Path
) -> None:
    for folder, engine in ("a", ()), ("b", ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")):
        done = train(*PRUNED, *engine, f"hydra.sweep.dir={folder}")
        assert done.status == 0, done.err
        records = results(tmp_path / folder)
        states = {"completed": "COMPLETE", "pruned": "PRUNED"}
        trials = _trials(tmp_path / folder)
        assert [states[r["state"]] for r in records] == [t.state.name for t in trials]
        assert "pruned" in {r["state"] for r in records}
        for trial, record in zip(trials, records, strict=True):
            losses = [row["validation"]["loss"] for row in record["epochs"] if row["epoch"]]
            assert trial.intermediate_values == dict(enumerate(losses, start=1))
            assert len(losses) == 6 or trial.state.name == "PRUNED"
        reasons = [r["reason"] for r in records if r["state"] == "pruned"]
        assert all(reason.startswith("pruned by MedianPruner after ") for reason in reasons)
        # All of the grid came to an end: nothing is left to do.
        assert "4 of 4 trials ended before" in train(*PRUNED, f"hydra.sweep.dir={folder}").out


def test_a_trial_that_is_gone_on_with_reports_nothing_twice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    epoch = EpochRow(
        phase=1, layers=3, epoch=1, train_loss=3.0, validation=Score(loss=3.0, accuracy=0.1),
        train_tokens=1, train_flops_head=1, train_flops_body=1, train_seconds=1,
        evaluation_seconds=1, best=True, reused=False,
    )  # fmt: skip
    about = {"_target_": "optuna.pruners.MedianPruner"}, "maximize"
    study = open_study(tmp_path, "maximize")
    study.ask()
    for count in (1, 1, 2):
        record = RunRecord(state=RunState.running, epochs=[epoch] * count)
        assert report_epoch(tmp_path, 0, *about, record) is None
    # What is better goes the way of the objective.
    assert study.trials[0].intermediate_values == {1: -3.0, 2: -3.0}
    # A study that cannot be reached prunes nothing.
    assert report_epoch(tmp_path, 7, *about, record) is None
    assert "an epoch is not reported to the study" in caplog.text


# --- what is drawn from ---------------------------------------------------------------------------

FLOAT = optuna.distributions.FloatDistribution
INT = optuna.distributions.IntDistribution
CHOICE = optuna.distributions.CategoricalDistribution


@pytest.mark.parametrize(
    ("text", "distribution"),
    [
        ("interval(1e-4,1e-2)", FLOAT(1e-4, 1e-2)),
        # Hydra makes the ends of an interval real numbers, unless they are to be whole.
        ("interval(1,4)", FLOAT(1, 4)),
        ("int(interval(1,4))", INT(1, 4)),
        ("tag(log,interval(1e-4,1e-2))", FLOAT(1e-4, 1e-2, log=True)),
        ("tag(log,int(interval(1,3)))", INT(1, 3, log=True)),
        # As in any sweep, the end of a range is not in it.
        ("range(1,5)", INT(1, 4)),
        ("range(10,0,-4)", INT(2, 10, step=4)),
        ("range(0,1,0.25)", CHOICE([0.0, 0.25, 0.5, 0.75])),
        ("a,1.5,true,null", CHOICE(["a", 1.5, True, "null"])),
        ("choice('a,b',[1,2])", CHOICE(["a\\,b", "[1,2]"])),
        ("'1',1", CHOICE(["'1'", 1])),
    ],
)
def test_an_override_is_what_it_says(text: str, distribution: Any) -> None:
    assert read_space([f"model={text}"], None).distributions == {"model": distribution}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["a=interval(2.0,1.0)"], r"^a=interval\(2.0,1.0\) "),
        (["a=tag(log,interval(0.0,1.0))"], r"^a=tag\(log,interval\(0.0,1.0\)\) "),
        (["a=tag(log,range(1,9,2))"], r"^a=tag\(log,range\(1,9,2\)\) "),
        (["a=1,2", "b=range(1,1)"], r"^b=range\(1,1\) gives no value"),
    ],
)
def test_what_nothing_can_be_drawn_from_is_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_space(overrides, None)


def test_drawn_values_stand_where_they_were_drawn_from() -> None:
    # What is said last of a setting holds.
    read = read_space(["a=1", "+d=3", "b={c: 1}", "d=interval(0.5,1)", "e=2", "a=range(1,3)"], None)
    assert read.drawn({"d": 0.75, "a": 2}) == ("a=2", "d=0.75", "b={c: 1}", "e=2")
    assert [read.point(n) for n in (0, 1)] == [
        (f"a={n}", "d=0.5", "b={c: 1}", "e=2") for n in (1, 2)
    ]
