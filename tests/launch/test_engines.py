"""Engines of others that run a sweep: what is ours of them."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from proglayer.config import ConfigError
from proglayer.results import load
from proglayer.store.record import read_jobs

from ..helpers import SHORT, Command, results


def test_an_engine_that_is_missing_says_what_to_install(
    train: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    done = train("-m", *SHORT, "seed=1,2", "hydra/launcher=ray")
    assert done.status == 1
    assert done.err == (
        "error: hydra/launcher=ray is not installed: pip install -c constraints.txt -e '.[ray]'\n"
    )


SEARCH = ("-m", "hydra/sweeper=optuna", *SHORT, "phase.max_epochs=1")
GRID = (*SEARCH, "hydra/sweeper/sampler=grid")


def test_a_search_takes_a_failed_job_for_a_failed_trial(
    train: Command,
    tmp_path: Path,
) -> None:
    pytest.importorskip("optuna")
    # One rate diverges, one number of heads does not divide the dimension, one is not whole.
    searched = ("lr.base=choice(1e-3,1e12)", "model.num_heads=choice(2,2.5,3)")
    place = "objective=phases.0.best.validation_loss"
    done = train(*GRID, *searched, place, "hydra.sweep.dir=a")
    assert done.status == 0, done.err
    records = results(tmp_path / "a")
    reasons = " ".join(sorted(r["reason"] for r in records if r["status"] == "failed"))
    assert reasons.count("model.num_heads=3 does not divide model.dim=8") == 2
    assert reasons.count("model.num_heads=2.5 does not fit") == 2
    assert reasons.count("lower lr.base") == 1
    (best,) = [r for r in records if r["status"] == "completed"]
    assert best["objective"] == best["phases"][0]["best"]["validation_loss"]
    kept = " ".join(given for given in SEARCH[2:] if not given.startswith("model.num_heads"))
    assert done.out.splitlines()[-1] == (
        f"python train.py {kept} {place} lr.base=0.001 model.num_heads=2"
    )
    (study,) = _studies()
    assert sorted(t.state.name for t in study) == ["COMPLETE"] + ["FAIL"] * 5

    # As many trials as were asked for, and all points of the grid: nothing is left to do.
    again = train(*GRID, *searched, place, "hydra.sweep.dir=b")
    assert again.status == 0
    assert again.out.splitlines()[-1] == done.out.splitlines()[-1]
    assert not (tmp_path / "b").exists()
    assert len(_studies()[0]) == 6


def test_a_search_that_was_stopped_goes_on_with_the_trial_under_way(
    train: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("optuna")
    from proglayer.launch import search as searching

    reported: list[str] = []
    monkeypatch.setattr(
        searching, "leave_report", lambda folder, *before: reported.append(folder.name)
    )
    search = (
        *SEARCH, "phase.max_epochs=8", "phase.patience=8", "model=deep_supervision",
        "lr.base=tag(log,interval(1e-4,1e-2))", "model.exit_weights=choice(uniform,linear,last)",
        "hydra.sweeper.sampler.seed=1", "report=true",
    )  # fmt: skip

    seen = []

    def stop_the_third() -> None:
        while not list(tmp_path.glob("a/2_*/metrics.csv")):
            time.sleep(0.01)
        seen.extend(load(tmp_path / "a").runs["status"])
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop_the_third, daemon=True).start()
    assert train(*search, "hydra.sweeper.n_trials=5", "hydra.sweep.dir=a").status == 130
    assert reported == []
    # Who follows it knows that there is more to come.
    assert seen == ["completed", "completed", "running", "waiting", "waiting"]
    (before,) = _studies()
    assert [t.state.name for t in before] == ["COMPLETE", "COMPLETE", "RUNNING"]
    done = train(*search, "hydra.sweeper.n_trials=5", "hydra.sweep.dir=b")
    assert done.status == 0, done.err
    assert "2 of 5 trials ended before, 1 to go on with" in done.out
    assert reported == ["b"]
    (after,) = _studies()
    assert [t.state.name for t in after] == ["COMPLETE"] * 5
    assert [t.params for t in after[:3]] == [t.params for t in before]
    # Not a draw of the first three again, as the seed alone would make them.
    assert len({t.params["lr.base"] for t in after}) == 5
    gone_on = json.loads(next((tmp_path / "b").glob("2_*/result.json")).read_text())
    assert gone_on["phases"][0]["work"]["epochs_reused"] > 0
    # The table is of the whole study.
    assert "6 runs: 5 completed, 1 interrupted" in done.out
    command = shlex.split(done.out.splitlines()[-1])[2:]
    assert train(*command, "hydra.run.dir=best").status == 0
    record = json.loads((tmp_path / "best/result.json").read_text())
    assert record["objective"] == min(t.value for t in after)
    assert sum(phase["work"]["epochs_trained"] for phase in record["phases"]) == 0


@pytest.fixture
def own_workers() -> Iterator[None]:
    """joblib keeps its workers, in the folder where they were started, for whoever comes next."""
    loky = pytest.importorskip("joblib.externals.loky")
    loky.get_reusable_executor().shutdown()
    yield
    loky.get_reusable_executor().shutdown()


@pytest.mark.usefixtures("own_workers")
def test_trials_at_once_share_phases_and_are_all_told(
    train: Command,
    tmp_path: Path,
) -> None:
    pytest.importorskip("optuna")
    search = (
        *GRID, "freeze=choice(existing,none,gradual)", "seed=choice(1,2)", "hydra.sweep.dir=a",
        "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweeper.n_jobs=2",
    )  # fmt: skip
    done = train(*search)
    assert done.status == 0, done.err
    assert [t.state.name for t in _studies()[0]] == ["COMPLETE"] * 6
    records = results(tmp_path / "a")
    # For each seed the initial phase, the grown one of two ways of freezing, which gradual
    # unfreezing begins like one of, and two more of its own.
    trained = [p["stage"] for r in records for p in r["phases"] if p["work"]["epochs_trained"]]
    assert len(trained) == len(set(trained)) == 2 * 5
    command = shlex.split(done.out.splitlines()[-1])[2:]
    assert command[-1].startswith("threads=")
    assert train(*command, "hydra.run.dir=best").status == 0
    record = json.loads((tmp_path / "best/result.json").read_text())
    assert record["objective"] == min(r["objective"] for r in records)
    assert sum(phase["work"]["epochs_trained"] for phase in record["phases"]) == 0


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["lr.bse=choice(1,2)"], "there is no setting lr.bse; did you mean lr.base?"),
        (["lr.base=1e-3"], "hydra/sweeper=optuna has nothing to search"),
        (["lr.base=choice(1,2)", "plan=true"], "plan=true shows jobs before they run"),
        (["lr.base=choice(1,2)", "hydra.sweeper.storage=sqlite:////dev/null/s"], "cannot be writ"),
    ],
)
def test_a_search_that_cannot_work_says_why_and_runs_nothing(
    train: Command,
    tmp_path: Path,
    given: list[str],
    told: str,
) -> None:
    pytest.importorskip("optuna")
    done = train(*SEARCH, *given, "hydra.sweep.dir=a")
    assert done.status == 1
    assert done.err.splitlines()[-1].startswith(f"error: {told}") or told in done.err
    assert not list(tmp_path.glob("a/*/result.json"))


def test_a_grid_whose_trials_all_fail_says_so(
    train: Command,
    tmp_path: Path,
) -> None:
    pytest.importorskip("optuna")
    done = train(*GRID, "report=true", "lr.base=choice(1e12)", "hydra.sweep.dir=a")
    assert done.status == 1
    assert done.err.endswith("error: every trial failed, for the reasons above\n")
    assert [r["status"] for r in results(tmp_path / "a")] == ["failed"]
    assert (tmp_path / "a/report/index.html").exists()


def _studies() -> list[list]:
    """The trials of every study."""
    import optuna

    storage = "sqlite:///multirun/optuna.db"
    names = [study.study_name for study in optuna.get_all_study_summaries(storage)]
    return [optuna.load_study(study_name=name, storage=storage).trials for name in names]


def test_a_search_gone_on_with_keeps_what_its_earlier_trials_were(
    train: Command,
    tmp_path: Path,
) -> None:
    pytest.importorskip("optuna")
    for trials in (1, 2):
        train(
            *SEARCH, "model.num_heads=choice(3,5)", f"hydra.sweeper.n_trials={trials}",
            "hydra.sweep.dir=a",
        )  # fmt: skip
    listed = read_jobs(tmp_path / "a")
    assert len(listed) == 2
    assert all("model.num_heads=" in " ".join(job.overrides) for job in listed)


def test_a_study_is_free_again_as_soon_as_its_search_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    from proglayer.launch import search

    locks: list[FileLock] = []

    def noted(path: Path) -> FileLock:
        locks.append(FileLock(path))
        return locks[-1]

    monkeypatch.setattr(search, "FileLock", noted)
    storage = f"sqlite:///{tmp_path}/optuna.db"
    with search._alone(storage, "rates"):
        with pytest.raises(ConfigError, match="is being searched by another command"):
            search._alone(storage, "rates").__enter__()
        with search._alone(storage, "widths"):
            assert [lock.is_locked for lock in locks] == [True, False, True]
    assert not any(lock.is_locked for lock in locks)


@pytest.mark.parametrize("place", ["phases.-1.best.accuracy", "phases.7", "status", "phases"])
def test_an_objective_that_is_no_number_is_told_before_anything_trains(
    train: Command,
    tmp_path: Path,
    place: str,
) -> None:
    done = train(*SHORT, "phase.max_epochs=1", f"objective={place}", "hydra.run.dir=run")
    assert done.status == 1
    (line,) = done.err.splitlines()
    assert line.startswith(f"error: objective={place}: ")
    if place.endswith("accuracy"):
        assert "validation_accuracy_percent" in line
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "stages").exists()


@pytest.mark.usefixtures("own_workers")
def test_a_trial_whose_worker_is_killed_is_a_failed_one_and_the_others_go_on(
    train: Command,
    tmp_path: Path,
) -> None:
    pytest.importorskip("optuna")
    search = (
        *GRID, "seed=choice(1,2)", "phase.max_epochs=400", "phase.patience=400", "threads=1",
        "report=true", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2",
        "hydra.sweeper.n_jobs=2", "hydra.sweep.dir=a",
    )  # fmt: skip

    def kill_the_first() -> None:
        while not (begun := list(tmp_path.glob("a/*/metrics.csv"))):
            time.sleep(0.01)
        sign = json.loads(begun[0].with_name("heartbeat.json").read_text())
        assert sign["process"] != os.getpid()
        os.kill(sign["process"], signal.SIGKILL)

    threading.Thread(target=kill_the_first, daemon=True).start()
    done = train(*search)
    assert done.status == 1
    assert done.err.splitlines()[-1].startswith("error: a worker of joblib was killed"), done.err
    runs = load(tmp_path / "a").runs
    lost = runs[runs["status"] == "lost"]
    assert len(lost) >= 1
    assert set(lost["reason"]) == {"its process was killed"}
    assert (tmp_path / "a/report/index.html").exists()
    (study,) = _studies()
    # joblib kills the worker of the other trial too, if that one has begun.
    assert [t.state.name for t in study].count("FAIL") == len(lost)


def test_the_command_of_the_best_names_what_the_sweeper_was_told_to_keep(
    train: Command,
    tmp_path: Path,
) -> None:
    pytest.importorskip("optuna")
    kept = "hydra.sweeper.params={freeze:none,growth:random,phase.batch_size:8}"
    done = train(*GRID, "seed=choice(3)", kept, "hydra.sweep.dir=a")
    assert done.status == 0, done.err
    command = shlex.split(done.out.splitlines()[-1])[2:]
    assert "freeze=none" in command
    # What the command line says of a setting goes before.
    assert [given for given in command if "batch_size" in given] == ["phase.batch_size=16"]
    (trial,) = results(tmp_path / "a")
    assert train(*command, "hydra.run.dir=best").status == 0
    (best,) = results(tmp_path / "best")
    assert best["config"]["freeze"] == trial["config"]["freeze"]
    assert [p["stage"] for p in best["phases"]] == [p["stage"] for p in trial["phases"]]
    # Other settings are another search.
    train(*GRID, "seed=choice(3)", "hydra.sweeper.params={freeze:existing}", "hydra.sweep.dir=b")
    assert len(_studies()) == 2
