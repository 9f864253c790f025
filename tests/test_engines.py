"""Engines of others that run a sweep: what is ours of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from hydra_plugins.proglayer_engines import ProglayerRayLauncher

from .test_train import SHORT, Command, results, train  # noqa: F401 (a fixture)


def test_an_engine_that_is_missing_says_what_to_install(train: Command) -> None:  # noqa: F811
    if ProglayerRayLauncher.__mro__[1].__name__ == "RayLauncher":
        pytest.skip("Ray is installed")
    done = train("-m", *SHORT, "seed=1,2", "hydra/launcher=ray")
    assert done.status == 1
    assert done.err == (
        "error: hydra/launcher=ray is not installed: pip install 'proglayer[ray]'\n"
    )


def test_a_search_takes_a_failed_job_for_a_failed_trial_and_goes_on_when_given_again(
    train: Command,  # noqa: F811
    tmp_path: Path,
) -> None:
    optuna = pytest.importorskip("optuna")
    search = (
        "-m", "hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", *SHORT, "phase.max_epochs=1",
        "lr.base=choice(1e-3,1e-2,1e12)", "objective=phases.-1.best.validation_loss",
    )  # fmt: skip
    done = train(*search, "hydra.sweeper.n_trials=3", "hydra.sweep.dir=a")
    assert done.status == 0, done.err
    records = results(tmp_path / "a")
    assert sorted(r["status"] for r in records) == ["completed", "completed", "failed"]
    best = min(r["objective"] for r in records if r["objective"] is not None)
    (rate,) = [r["config"]["lr"]["base"] for r in records if r["objective"] == best]
    told = done.out.splitlines()[-1]
    assert told == f"python train.py {' '.join(search[3:-2])} {search[-1]} lr.base={rate}"

    (study,) = optuna.get_all_study_summaries("sqlite:///multirun/optuna.db")
    states = [t.state.name for t in _trials(study.study_name)]
    assert sorted(states) == ["COMPLETE", "COMPLETE", "FAIL"]
    assert train(*search, "hydra.sweeper.n_trials=1", "hydra.sweep.dir=b").status == 0
    assert len(_trials(study.study_name)) == 4


def test_a_grid_whose_last_trial_fails_ends_like_any_search(
    train: Command,  # noqa: F811
    tmp_path: Path,
) -> None:
    pytest.importorskip("optuna")
    search = ("-m", "hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", *SHORT, "report=true")
    done = train(*search, "lr.base=choice(1e12)", "hydra.sweeper.n_trials=1", "hydra.sweep.dir=a")
    assert done.status == 1
    assert done.err.endswith("error: every trial failed, for the reasons above\n")
    assert [r["status"] for r in results(tmp_path / "a")] == ["failed"]
    assert (tmp_path / "a/report/index.html").exists()


def _trials(study: str) -> list:
    import optuna

    return optuna.load_study(study_name=study, storage="sqlite:///multirun/optuna.db").trials


@pytest.mark.parametrize("place", ["phases.-1.best.accuracy", "phases.7", "status", "phases"])
def test_an_objective_that_is_no_number_fails_the_run_after_its_work(
    train: Command,  # noqa: F811
    tmp_path: Path,
    place: str,
) -> None:
    done = train(*SHORT, "phase.max_epochs=1", f"objective={place}", "hydra.run.dir=run")
    assert done.status == 1
    assert f"objective={place}" in done.err + done.out
    assert (tmp_path / "run/weights.safetensors").exists()
