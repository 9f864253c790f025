"""TensorBoard and MLflow are given what the record says, and can do a run no harm."""

from __future__ import annotations

import csv
import errno
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from proglayer import load_run
from proglayer.config import ConfigError, to_config
from proglayer.run import loggers
from proglayer.run import run as experiment
from proglayer.run.loggers import best_figures
from proglayer.run.record import EpochRow, SweepRecord, read_record, write_sweep

from ..helpers import TINY, composed, config, tiny_corpus

BOTH = ("tensorboard", "mlflow")
Run = Callable[..., Path]

for_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="needs the extra tensorboard"
)
for_mlflow = pytest.mark.skipif(
    importlib.util.find_spec("mlflow") is None, reason="needs the extra mlflow"
)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """A run on a tiny corpus in a folder of that name, given to those of BOTH that are there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROGLAYER_STORE", str(tmp_path / "stages"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(experiment, "open_corpus", lambda *_: tiny_corpus())

    def go(name: str, *overrides: str, given: tuple[str, ...] = BOTH) -> Path:
        given = tuple(module for module in given if importlib.util.find_spec(module))
        choice = f"logger=[{','.join(given)}]"
        (tmp_path / name).mkdir(exist_ok=True)
        settings = config(*TINY, "model.exit_weights=uniform", choice, *overrides)
        experiment.run(settings, tmp_path / name, choices={"model": "deep_supervision"})
        return tmp_path / name

    return go


def recorded(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What the record of a run says: name -> (step, value), as a logger is to be given."""
    with open(folder / "metrics.csv") as file:
        # An evaluation before the first step is no epoch, and goes to no logger.
        rows = [row for row in csv.DictReader(file) if row["epoch"] != "0"]
    flags = {"True": 1.0, "False": 0.0}
    figures = {
        name: [
            (step, flags[row[name]] if name == "reused" else float(row[name]))
            for step, row in enumerate(rows, start=1)
        ]
        for name in rows[0]
        if name != "best"
    }
    record = read_record(folder)
    for number, phase in enumerate(record.phases, start=1):
        for name, value in best_figures(record, phase).items():
            figures.setdefault(f"best/{name}", []).append((number, value))
    for name, value in record.changes._asdict().items() if record.changes else ():
        figures[f"changes/{name}"] = [(len(record.phases), value)]
    return figures


def in_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def mlflow_runs(folder: Path) -> list[Any]:
    """The runs that MLflow knows of this folder, the newest first."""
    client = mlflow_client(folder)
    (ours,) = [e for e in client.search_experiments() if e.name == "proglayer"]
    filtered = f"tags.`proglayer.folder` = '{folder}'"
    return list(client.search_runs([ours.experiment_id], filtered))


def mlflow_client(folder: Path) -> Any:
    from mlflow import MlflowClient

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        client = MlflowClient((folder.parent / "multirun" / ".mlruns").as_uri())
        client.search_experiments()
        return client


def in_mlflow(folder: Path) -> dict[str, list[tuple[int, float]]]:
    client = mlflow_client(folder)
    (logged,) = mlflow_runs(folder)
    return {
        name: [(m.step, m.value) for m in client.get_metric_history(logged.info.run_id, name)]
        for name in logged.data.metrics
    }


def as_float32(figures: dict[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    return {
        name: [(step, float(np.float32(value))) for step, value in values]
        for name, values in figures.items()
    }


# --- what is logged -------------------------------------------------------------------------------


@for_tensorboard
def test_tensorboard_reads_what_the_record_says(run: Run) -> None:
    folder = run("run", given=("tensorboard",))
    figures = recorded(folder)
    assert [step for step, _ in figures["phase"]] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in figures["phase"]] == [1, 1, 1, 2, 2, 2]
    # its format holds four bytes of a number
    assert in_tensorboard(folder) == as_float32(figures)


@for_mlflow
def test_mlflow_reads_what_the_record_says(run: Run) -> None:
    folder = run("run", given=("mlflow",))
    assert in_mlflow(folder) == recorded(folder)
    (logged,) = mlflow_runs(folder)
    assert (logged.info.run_name, logged.info.status) == ("run", "FINISHED")
    assert logged.data.tags["model"] == "deep_supervision"
    assert logged.data.params["model.dim"] == "8"
    assert logged.data.params["lr.factor.head"] == "0.1"


@for_tensorboard
@for_mlflow
def test_stored_epochs_are_told_like_trained_ones(run: Run) -> None:
    first, second = run("first"), run("second")
    trained, stored = recorded(first), recorded(second)
    assert [value for _, value in trained.pop("reused")] == [0.0] * 6
    assert [value for _, value in stored.pop("reused")] == [1.0] * 6
    assert trained == stored
    assert in_tensorboard(second) == as_float32(recorded(second))
    assert in_mlflow(second) == recorded(second)
    # in the same folder, the new event file takes the place of the old one
    run("second", "phase.max_epochs=2")
    assert in_tensorboard(second) == as_float32(recorded(second))
    assert len(in_tensorboard(second)["epoch"]) == 4
    assert len(mlflow_runs(second)) == 2


@for_mlflow
def test_a_failed_run_is_failed_there_too(run: Run) -> None:
    folder = run("run", "lr.base=1e15", "optimizer.clip_norm=null", given=("mlflow",))
    assert json.loads((folder / "run.json").read_text())["state"] == "failed"
    assert mlflow_runs(folder)[0].info.status == "FAILED"


# --- no harm --------------------------------------------------------------------------------------


def test_loggers_change_no_bit(run: Run) -> None:
    logged, alone = run("logged", "store.dir=one"), run("alone", "store.dir=two", given=())
    results = [json.loads((folder / "run.json").read_text()) for folder in (logged, alone)]
    assert [p["exits"] for p in results[0]["phases"]] == [p["exits"] for p in results[1]["phases"]]
    ours, theirs = (load_run(folder).state_dict() for folder in (logged, alone))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list(alone.glob("events*"))


@pytest.mark.parametrize("name", BOTH)
def test_a_logger_that_is_not_installed_is_told_before_anything_trains(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError) as error:
        to_config(composed(f"logger={name}"))
    assert str(error.value).startswith(f"logger.{name}=true needs the extra {name}: pip install ")
    assert "\n" not in str(error.value)
    assert to_config(composed())


@for_tensorboard
@for_mlflow
def test_a_logger_that_fails_is_dropped_with_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    written = loggers.TensorBoard.log

    def full(logger: loggers.TensorBoard, figures: list[loggers.Metric]) -> None:
        if figures[0][2] == 3:
            raise OSError(errno.ENOSPC, "No space\nleft on device")
        written(logger, figures)

    monkeypatch.setattr(loggers.TensorBoard, "log", full)
    folder = run("run")
    assert json.loads((folder / "run.json").read_text())["state"] == "completed"
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    why = "OSError: [Errno 28] No space left on device"
    assert warning == f"logger=tensorboard gets no more of this run ({why})"
    assert len(in_tensorboard(folder)["epoch"]) == 2
    assert in_mlflow(folder) == recorded(folder)


@for_mlflow
def test_mlflows_settings_are_the_users(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "own store"))
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    run("run", given=("mlflow",))
    metas = [path.read_text() for path in (tmp_path / "own store").glob("*/meta.yaml")]
    assert any("name: mine" in meta for meta in metas)
    assert not (tmp_path / "multirun").exists()
    # who forbids a store of files gets none
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "false")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "another"))
    run("run", given=("mlflow",))
    assert not (tmp_path / "another").exists()
    assert "logger=mlflow gets no more" in caplog.text


@for_mlflow
def test_a_run_that_was_killed_goes_on_in_its_run_of_mlflow(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(session: experiment.Session, epoch: EpochRow) -> None:
        add(session, epoch)
        if epoch.phase == 2:
            raise Killed

    add = experiment.Session.add
    with monkeypatch.context() as patch:
        patch.setattr(experiment.Session, "add", kill)
        with pytest.raises(Killed):
            run("run", given=("mlflow",))
    folder = run("run", given=("mlflow",))
    figures, expected = in_mlflow(folder), recorded(folder)
    assert figures.pop("reused") == [(step, 0.0) for step in range(1, 7)]
    expected.pop("reused")
    assert figures == expected
    assert mlflow_runs(folder)[0].info.status == "FINISHED"


@for_mlflow
def test_the_jobs_of_a_sweep_have_one_parent(run: Run, tmp_path: Path) -> None:
    write_sweep(tmp_path, SweepRecord(jobs=[]))
    runs = [mlflow_runs(run(name, given=("mlflow",)))[0] for name in ("first", "second")]
    parents = {each.data.tags["mlflow.parentRunId"] for each in runs}
    assert len(parents) == 1
