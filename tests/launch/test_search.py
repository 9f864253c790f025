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

import pytest

from proglayer.errors import ConfigError
from proglayer.results import load
from proglayer.run.record import read_record

from ..helpers import SHORT, Command, results

SEARCH = ("-m", "hydra/sweeper=optuna", *SHORT, "phase.max_epochs=1")
GRID = (*SEARCH, "hydra/sweeper/sampler=grid")


def test_a_search_takes_a_failed_job_for_a_failed_trial(train: Command, tmp_path: Path) -> None:
    # One rate diverges, one number of heads does not divide the dimension, one is not whole.
    searched = ("lr.base=choice(1e-3,1e12)", "model.num_heads=choice(2,2.5,3)")
    place = "objective=validation_loss"
    done = train(*GRID, *searched, place, "hydra.sweep.dir=a")
    assert done.status == 0, done.err
    records = results(tmp_path / "a")
    reasons = " ".join(sorted(r["reason"] for r in records if r["state"] == "failed"))
    assert reasons.count("model.num_heads=3 does not divide model.dim=8") == 2
    assert reasons.count("model.num_heads=2.5 does not fit: it takes a whole number") == 2
    assert reasons.count("lower lr.base") == 1
    (best,) = [r for r in records if r["state"] == "completed"]
    assert best["objective"] == best["phases"][-1]["validation"]["loss"]
    replaced = ("model.num_heads=2", "phase.max_epochs=2")  # by what is said after them
    kept = " ".join(given for given in SEARCH[2:] if given not in replaced)
    assert done.out.splitlines()[-1] == (
        f"python train.py {kept} lr.base=0.001 model.num_heads=2 {place}"
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
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[str] = []
    monkeypatch.setattr(
        "proglayer.launch.sweep.leave_report", lambda folder, *_: reported.append(folder.name)
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
    gone_on = json.loads(next((tmp_path / "b").glob("2_*/run.json")).read_text())
    assert gone_on["phases"][0]["work"]["epochs_reused"] > 0
    # The table is of the whole study.
    assert "6 runs: 5 completed, 1 interrupted" in done.out
    command = shlex.split(done.out.splitlines()[-1])[2:]
    assert train(*command, "hydra.run.dir=best").status == 0
    record = json.loads((tmp_path / "best/run.json").read_text())
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
def test_trials_at_once_share_phases_and_are_all_told(train: Command, tmp_path: Path) -> None:
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
    trained = [p["trajectory"] for r in records for p in r["phases"] if p["work"]["epochs_trained"]]
    assert len(trained) == len(set(trained)) == 2 * 5
    command = shlex.split(done.out.splitlines()[-1])[2:]
    assert command[-1].startswith("threads=")
    assert train(*command, "hydra.run.dir=best").status == 0
    record = json.loads((tmp_path / "best/run.json").read_text())
    assert record["objective"] == min(r["objective"] for r in records)
    assert sum(phase["work"]["epochs_trained"] for phase in record["phases"]) == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["lr.bse=choice(1,2)"], "there is no setting lr.bse; did you mean lr.base?"),
        (["lr.base=1e-3"], "hydra/sweeper=optuna has nothing to search"),
        (["lr.base=choice(1,2)", "plan=true"], "plan=true shows jobs before they run"),
        (["lr.base=choice(1,2)", "hydra.sweeper.storage=sqlite:////dev/null/s"], "cannot be writ"),
        (["lr.base=choice(1,2)", "hydra.sweeper.storage=sqlite:///text"], "not a database"),
        (["lr.base=choice(1,2)", "hydra.sweeper.n_trials=0"], "n_trials=0 does not fit: it takes"),
        (["lr.base=choice(1,2)", "hydra.sweeper.n_jobs=true"], "n_jobs=True does not fit: it"),
        (["lr.base=choice(1,2)", "hydra.sweeper.direction=up"], "hydra.sweeper.direction=up: min"),
        (["lr.base=choice(1,2)", "hydra.sweeper.max_failure_rate=2"], "hydra.sweeper.max_failure_"),
        (["lr.base=choice(1,2)", "hydra.sweeper.sampler.seed=x"], "hydra.sweeper.sampler: "),
        (["lr.base=1e-3,1", "objective=loss"], "objective=loss"),
        (["lr.base=choice(1,2)", "hydra.sweeper.params={seed: [1,2]}"], "hydra.sweeper.params: se"),
        (["lr.base=choice(1,2)", "lr.base=3,4"], "lr.base is given twice"),
        (["lr.base=1,2", "hydra.sweeper.custom_search_space=no.such"], "hydra.sweeper.custom_sear"),
        (
            ["lr.base=interval(1e-3,1e-2)", "hydra/sweeper/sampler=grid"],
            "hydra/sweeper/sampler=grid: lr.base has no end of values",
        ),
        (
            ["lr.base=1,2", "hydra/sweeper/pruner=median", "hydra.sweeper.storage=null"],
            "hydra/sweeper/pruner needs a hydra.sweeper.storage",
        ),
        (
            ["lr.base=1,2", "hydra/sweeper/pruner=median", "hydra/launcher=slurm"],
            "hydra.sweeper.storage=sqlite:///multirun/optuna.db: trials on several machines cannot",
        ),
    ],
)
def test_a_search_that_cannot_work_says_why_and_runs_nothing(
    train: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: list[str], message: str
) -> None:
    monkeypatch.setattr("proglayer.launch.slurm.check", lambda: None)  # as where it answers
    (tmp_path / "text").write_text("no database, and no journal: this is text" * 100)
    done = train(*SEARCH, *given, "hydra.sweep.dir=a")
    assert done.status == 1
    (line,) = [line for line in done.err.splitlines() if not line.startswith("warning: ")]
    assert line.startswith("error: ")
    assert message in line
    assert "Traceback" not in done.err
    assert not list(tmp_path.glob("a/*/run.json"))
    # No trial is spent on it.
    assert not Path("multirun/optuna.db").exists() or not any(_studies())


def test_a_grid_whose_trials_all_fail_says_so(train: Command, tmp_path: Path) -> None:
    done = train(*GRID, "report=true", "lr.base=choice(1e12)", "hydra.sweep.dir=a")
    assert done.status == 1
    assert done.err.endswith("error: every trial failed, for the reasons above\n")
    assert [r["state"] for r in results(tmp_path / "a")] == ["failed"]
    assert (tmp_path / "a/report/index.html").exists()


def _studies(storage: str = "sqlite:///multirun/optuna.db") -> list[list]:
    """The trials of every study."""
    import optuna

    from proglayer.launch.study import open_storage

    storage = open_storage(storage)
    names = [study.study_name for study in optuna.get_all_study_summaries(storage)]
    return [optuna.load_study(study_name=name, storage=storage).trials for name in names]


def test_a_search_gone_on_with_keeps_what_its_earlier_trials_were(
    train: Command, tmp_path: Path
) -> None:
    for trials in (1, 2):
        train(
            *SEARCH, "model.num_heads=choice(3,5)", f"hydra.sweeper.n_trials={trials}",
            "hydra.sweep.dir=a",
        )  # fmt: skip
    listed = json.loads((tmp_path / "a/sweep.json").read_text())
    assert len(listed) == 2
    assert all("model.num_heads=" in " ".join(job["overrides"]) for job in listed)


def test_a_study_is_searched_by_one_command_at_a_time(tmp_path: Path) -> None:
    from proglayer.launch.study import alone

    storage = f"sqlite:///{tmp_path}/optuna.db"
    for _ in range(2):  # and is free again
        searched = pytest.raises(ConfigError, match="is being searched by another command")
        with alone(storage, "rates"), alone(storage, "widths"), searched:
            alone(storage, "rates").__enter__()


@pytest.mark.usefixtures("own_workers")
def test_a_trial_whose_worker_is_killed_is_a_failed_one_and_the_others_go_on(
    train: Command, tmp_path: Path
) -> None:
    search = (
        *GRID, "seed=choice(1,2)", "phase.max_epochs=400", "phase.patience=400", "threads=1",
        "report=true", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2",
        "hydra.sweeper.n_jobs=2", "hydra.sweep.dir=a",
    )  # fmt: skip

    def kill_the_first() -> None:
        while not (begun := list(tmp_path.glob("a/*/metrics.csv"))):
            time.sleep(0.01)
        process = read_record(begun[0].parent).environment.process
        assert process != os.getpid()
        os.kill(process, signal.SIGKILL)

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
    train: Command, tmp_path: Path
) -> None:
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
    assert [p["trajectory"] for p in best["phases"]] == [p["trajectory"] for p in trial["phases"]]
    # Other settings are another search.
    train(*GRID, "seed=choice(3)", "hydra.sweeper.params={freeze:existing}", "hydra.sweep.dir=b")
    assert len(_studies()) == 2


@pytest.mark.parametrize(
    "params", ['+hydra.sweeper.params={seed: "1,2"}', "hydra.sweeper.params={seed: '1,2'}"]
)
def test_what_is_searched_can_stand_among_the_settings_of_the_sweeper(
    train: Command, tmp_path: Path, params: str
) -> None:
    done = train(*GRID, params, "initial_layers=1", "hydra.sweep.dir=a")
    assert done.status == 0, done.err
    assert sorted(r["seed"] for r in results(tmp_path / "a")) == [1, 2]
    plain = train("-m", *SHORT, "plan=true", params, "hydra.sweep.dir=b")
    assert plain.status == 0, plain.err
    assert "seed=1" in plain.out
    assert "seed=2" in plain.out
    refused = train("-m", *SHORT, "+hydra.sweeper.params.seed=[1,2]", "hydra.sweep.dir=c")
    assert refused.status == 1
    assert refused.err == (
        "error: hydra.sweeper.params: seed is a list: several values are written as '1,2' (one "
        "value that is a list: '[1,2]'), in quotes\n"
    )


def test_a_trial_and_its_command_are_the_same_run(train: Command, tmp_path: Path) -> None:
    done = train(*GRID, "seed=choice(3)", "lr.factor={new: 0.5, head: 0.25}", "hydra.sweep.dir=a")
    assert done.status == 0, done.err
    (trial,) = results(tmp_path / "a")
    factors = trial["config"]["lr"]["factor"]
    assert (factors["new"], factors["head"]) == (0.5, 0.25)
    command = shlex.split(done.out.splitlines()[-1])[2:]
    assert train(*command, "hydra.run.dir=best").status == 0
    (best,) = results(tmp_path / "best")
    assert best["config"] == trial["config"]
    assert best["objective"] == trial["objective"]


def test_a_named_study_takes_trials_of_its_own_search_alone(train: Command, tmp_path: Path) -> None:
    named = (*GRID, "hydra.sweeper.study_name=rates", "initial_layers=1", "hydra.sweep.dir=a")
    assert train(*named, "lr.base=1e-3,2e-3", "hydra.sweeper.n_trials=1").status == 0
    for other, message in (
        (
            ["lr.base=1e-3,2e-3", "objective=validation_accuracy_percent"],
            "study rates has trials with objective=validation_loss, not "
            "objective=validation_accuracy_percent: ",
        ),
        (["lr.base=1e-3,2e-3", "hydra.sweeper.direction=maximize"], "with direction=minimize, not"),
        (["lr.base=1e-3,2e-3", "data.max_vocab=100"], "data.max_vocab=200, not data.max_vocab=100"),
        (["seed=1,2"], "has trials with searched=lr.base, not searched=seed: "),
    ):
        done = train(*named, *other)
        assert done.status == 1
        assert message in done.err
        assert len(done.err.splitlines()) == 1
        assert "a hydra.sweeper.study_name of its own" in done.err
    # Where and how trials run is no part of them; neither is how wide is searched.
    same = train(*named, "lr.base=1e-3,2e-3", "store.dir=other", "hydra.sweeper.n_trials=2")
    assert same.status == 0, same.err
    # Another study lives in the same file.
    other = train(*GRID, "initial_layers=1", "seed=1,2", "hydra.sweep.dir=b")
    assert other.status == 0
    assert sorted(len(study) for study in _studies()) == [2, 2]


RATES = (
    *GRID, "lr.base=1e-2,1e-3,1e-4", "phase.max_epochs=3", "phase.patience=3", "initial_layers=1",
)  # fmt: skip
# The best rate comes first.
PRUNED = (
    *RATES, "hydra.sweeper.sampler.seed=1", "hydra/sweeper/pruner=median",
    "hydra.sweeper.pruner.n_startup_trials=1",
)  # fmt: skip


def test_trials_that_promise_less_are_pruned(train: Command, tmp_path: Path) -> None:
    ends = []
    for name in ("sqlite:///one.db", "journal:///two.journal"):
        folder = name[-3:]
        done = train(*PRUNED, f"hydra.sweeper.storage={name}", f"hydra.sweep.dir={folder}")
        assert done.status == 0, done.err
        records = results(tmp_path / folder)
        ends.append([(r["state"], r["reason"]) for r in records])
        (study,) = _studies(name)
        pruned = [t for t in study if t.state.name == "PRUNED"]
        assert len(pruned) == sum(r["state"] == "pruned" for r in records) >= 1
        for trial in study:
            rows = load(tmp_path / folder).epochs
            # What a growth came to before it was trained is no epoch.
            own = rows[rows["run"].str.contains(f"{trial.number}_") & (rows["epoch"] > 0)]
            losses = own["validation_loss"].tolist()
            assert list(trial.intermediate_values.values()) == losses
            assert list(trial.intermediate_values) == list(range(1, 1 + len(losses)))
            assert len(losses) == 6 or trial.state.name == "PRUNED"
        assert "pruned" in done.out
        # All of the grid came to an end: nothing is left to do.
        again = train(*PRUNED, f"hydra.sweeper.storage={name}", "hydra.sweep.dir=b")
        assert again.status == 0
        assert not (tmp_path / "b").exists()
    # One after the other, the same trials are pruned for the same reasons.
    assert ends[0] == ends[1]
    assert any((reason or "").startswith("pruned by MedianPruner after ") for _, reason in ends[0])


@pytest.mark.usefixtures("own_workers")
def test_trials_in_other_processes_are_pruned(train: Command, tmp_path: Path) -> None:
    done = train(
        *PRUNED, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=a",
        "hydra.sweeper.storage=journal:///optuna.journal",
    )  # fmt: skip
    assert done.status == 0, done.err
    (study,) = _studies("journal:///optuna.journal")
    records = results(tmp_path / "a")
    states = {"completed": "COMPLETE", "pruned": "PRUNED"}
    assert [states[r["state"]] for r in records] == [t.state.name for t in study]
    assert "pruned" in {r["state"] for r in records}


def test_what_is_reported_goes_the_way_of_the_objective(tmp_path: Path) -> None:
    import optuna
    from omegaconf import OmegaConf

    from proglayer.launch.study import open_storage, pruning

    storage = f"sqlite:///{tmp_path}/optuna.db"
    row = {"validation_loss": 3.0, "validation_accuracy_percent": 25.0}
    for direction, objective, reported in (
        ("minimize", "validation_loss", 3.0),
        ("maximize", "validation_accuracy_percent", 25.0),
        ("maximize", "test_accuracy_percent", -3.0),
        ("minimize", "test_loss", 3.0),
    ):
        study = optuna.create_study(
            study_name=f"{direction} {objective}", storage=open_storage(storage)
        )
        study.ask()
        sweeper = OmegaConf.create(
            {
                "pruner": {"_target_": "optuna.pruners.MedianPruner"},
                "direction": direction,
                "storage": storage,
                "study_name": study.study_name,
            }
        )
        prune = pruning(sweeper, objective, 0)
        assert prune is not None
        assert prune(row) is None
        assert study.trials[0].intermediate_values == {1: reported}
        # A trial that is gone on with tells nothing twice.
        again = pruning(sweeper, objective, 0)
        assert again is not None
        again(row)
        again(row)
        assert study.trials[0].intermediate_values == {1: reported, 2: reported}


def test_a_study_that_trials_cannot_reach_prunes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from omegaconf import OmegaConf

    from proglayer.launch.study import pruning

    pruner = {"_target_": "optuna.pruners.MedianPruner"}
    about = {"direction": "minimize", "storage": f"sqlite:///{tmp_path}/no/optuna.db"}
    sweeper = OmegaConf.create({"pruner": pruner, "study_name": "rates", **about})
    assert pruning(sweeper, "validation_loss", 0) is None
    assert "no epoch is reported to the study" in caplog.text


def test_a_function_can_draw_values_itself(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spaces.py").write_text(
        "def heads(settings, trial):\n"
        "    if trial.params['growth'] == 'random':\n"
        "        trial.suggest_int('model.num_heads', 1, 1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    done = train(
        *SEARCH, "hydra.sweeper.custom_search_space=spaces.heads", "growth=choice(random)",
        "hydra.sweeper.n_trials=1", "hydra.sweep.dir=a",
    )  # fmt: skip
    assert done.status == 0, done.err
    (trial,) = results(tmp_path / "a")
    assert trial["config"]["model"]["num_heads"] == 1
    assert "model.num_heads=1" in done.out.splitlines()[-1]
