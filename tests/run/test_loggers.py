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

from proglayer.config import ConfigError, to_config
from proglayer.run import loggers, setup
from proglayer.run import run as experiment
from proglayer.run.record import read_record

from ..helpers import TINY, composed, config, tiny_corpus

BOTH = ("tensorboard", "mlflow")
Run = Callable[..., Path]
Figures = dict[str, list[tuple[int, float]]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """A run on a tiny corpus in a folder of that name, given to those of BOTH that are there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROGLAYER_STORE", str(tmp_path / "stages"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(setup, "open_corpus", lambda *_: tiny_corpus())

    def go(name: str, *overrides: str, given: tuple[str, ...] = BOTH) -> Path:
        for module in given:
            pytest.importorskip(module)
        choice = f"logger=[{','.join(given)}]"
        (tmp_path / name).mkdir(exist_ok=True)
        settings = config(*TINY, "model.exit_weights=uniform", choice, *overrides)
        experiment.run(settings, tmp_path / name, {"choices": {"model": "deep_supervision"}})
        return tmp_path / name

    return go


def recorded(folder: Path) -> Figures:
    """What the record of a run says: name -> (step, value), as a logger is to be given."""
    with open(folder / "metrics.csv") as file:
        # An evaluation before the first step is no epoch, and goes to no logger.
        rows = [row for row in csv.DictReader(file) if row["epoch"] != "0"]
    flags = {"True": 1.0, "False": 0.0}
    return {
        name: [
            (step, flags[row[name]] if name == "reused" else float(row[name]))
            for step, row in enumerate(rows, start=1)
            if row[name]
        ]
        for name in rows[0]
        if name != "best" and any(row[name] for row in rows)
    }


def in_tensorboard(folder: Path) -> Figures:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def in_mlflow(folder: Path) -> tuple[Any, Figures]:
    """The last run that MLflow knows of this folder, and its figures."""
    from mlflow import MlflowClient

    client = MlflowClient((folder.parent / "multirun" / ".mlruns").as_uri())
    (ours,) = [e for e in client.search_experiments() if e.name == "proglayer"]
    asked = f"tags.`proglayer.folder` = '{folder.as_uri()}'"
    logged = client.search_runs([ours.experiment_id], asked)[0]
    return logged, {
        name: [(m.step, m.value) for m in client.get_metric_history(logged.info.run_id, name)]
        for name in logged.data.metrics
    }


def as_float32(figures: Figures) -> Figures:
    """TensorBoard's format holds four bytes of a number."""
    return {
        name: [(step, float(np.float32(value))) for step, value in values]
        for name, values in figures.items()
    }


def test_both_read_what_the_record_says_of_trained_and_stored_epochs(run: Run) -> None:
    for name, reused in ("first", 0.0), ('the "second"', 1.0):
        folder = run(name)
        figures = recorded(folder)
        assert figures["reused"] == [(step, reused) for step in range(1, 7)]
        assert [value for _, value in figures["phase"]] == [1, 1, 1, 2, 2, 2]
        assert in_tensorboard(folder) == as_float32(figures)
        logged, told = in_mlflow(folder)
        assert told == figures
        assert (logged.info.run_name, logged.info.status) == (name, "FINISHED")
        assert logged.data.tags["model"] == "deep_supervision"
        assert logged.data.params["lr.factor.head"] == "0.1"
    # In the same folder, the new event file takes the place of the old one.
    run(name, "phase.max_epochs=2")
    assert in_tensorboard(folder) == as_float32(recorded(folder))
    assert len(in_tensorboard(folder)["epoch"]) == 4


def test_an_interrupted_run_goes_on_in_its_mlflow_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = loggers.MLflow.log

    def killed(logger: loggers.MLflow, figures: dict[str, float], step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt
        written(logger, figures, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loggers.MLflow, "log", killed)
        run("run", given=("mlflow",))
    first, told = in_mlflow(tmp_path / "run")
    assert (first.info.status, len(told["epoch"])) == ("RUNNING", 2)
    folder = run("run", given=("mlflow",))
    logged, told = in_mlflow(folder)
    assert (logged.info.run_id, logged.info.status) == (first.info.run_id, "FINISHED")
    assert told["validation_loss"] == recorded(folder)["validation_loss"]
    second, _ = in_mlflow(run("other", given=("mlflow",)))
    assert second.info.run_id != first.info.run_id


def test_a_failed_run_is_failed_there_too(run: Run) -> None:
    folder = run("run", "lr.base=1e15", "optimizer.clip_norm=null", given=("mlflow",))
    assert read_record(folder).state == "failed"
    assert in_mlflow(folder)[0].info.status == "FAILED"


@pytest.mark.parametrize("name", BOTH)
def test_a_logger_that_is_not_installed_is_told_before_anything_trains(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError) as error:
        to_config(composed(f"logger={name}"))
    assert str(error.value).startswith(f"logger.{name}=true needs the extra {name}: pip install ")


def test_a_logger_that_fails_is_dropped_with_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    written = loggers.TensorBoard.log

    def full(logger: loggers.TensorBoard, figures: dict[str, float], step: int) -> None:
        if step == 3:
            raise OSError(errno.ENOSPC, "No space\nleft on device")
        written(logger, figures, step)

    monkeypatch.setattr(loggers.TensorBoard, "log", full)
    folder = run("run")
    assert json.loads((folder / "run.json").read_text())["state"] == "completed"
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    why = "OSError: [Errno 28] No space left on device"
    assert warning == f"logger=tensorboard gets no more of this run ({why})"
    assert len(in_tensorboard(folder)["epoch"]) == 2
    assert in_mlflow(folder)[1] == recorded(folder)
