"""Others that get a run's metrics as they come: TensorBoard and MLflow.

Each epoch is given as the row that `metrics.csv` gets (without `best`, which a later epoch may
still change), at a step that counts the epochs of all phases together from 1. At the end come the
best epoch of each phase, as `best/...` at the phase's number, and what changed from the first
phase to the last, as `changes/...`. Stored epochs are given like those that were trained.

The record in the run's folder never depends on any of this: a logger that fails is dropped, with
one line of warning.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from proglayer.config import LoggerConfig, flat_settings
from proglayer.files import SWEEP_FILE
from proglayer.run.record import PhaseRecord, RunRecord, RunState

log = logging.getLogger(__name__)

# One metric: its name, its value, its step.
Metric = tuple[str, float, int]

# The end of its name, by which an event file is known as ours.
SUFFIX = ".proglayer"
MLFLOW_STORE = "multirun/.mlruns"
MLFLOW_EXPERIMENT = "proglayer"
ENDS = {RunState.completed: "FINISHED", RunState.failed: "FAILED"}


class Logger(Protocol):
    """What a logger takes. It is made when the run starts, with its folder and its record."""

    def log(self, metrics: list[Metric]) -> None: ...
    def end(self, state: RunState) -> None: ...


class Loggers:
    """The loggers that `config` asks for, as one that never fails."""

    def __init__(self, config: LoggerConfig, folder: Path, record: RunRecord) -> None:
        self._epochs = 0
        self._loggers: dict[str, Logger] = {}
        for name, start in {"tensorboard": TensorBoard, "mlflow": MLflow}.items():
            if getattr(config, name):
                with self._may_fail(name):
                    self._loggers[name] = start(folder, record)

    def epoch(self, row: dict[str, Any]) -> None:
        """Tell of an epoch; `row` is what `metrics.csv` gets of it."""
        self._epochs += 1
        self._log([(name, row[name], self._epochs) for name in row if name != "best"])

    def end(self, record: RunRecord) -> None:
        """Tell how the run ended."""
        for number, phase in enumerate(record.phases, start=1):
            best = best_figures(record, phase).items()
            self._log([(f"best/{name}", value, number) for name, value in best])
        changes = record.changes._asdict().items() if record.changes else ()
        self._log([(f"changes/{name}", value, len(record.phases)) for name, value in changes])
        for name, logger in list(self._loggers.items()):
            with self._may_fail(name):
                logger.end(record.state)

    def _log(self, metrics: list[tuple[str, float | None, int]]) -> None:
        known = [(name, float(value), step) for name, value, step in metrics if value is not None]
        for name, logger in list(self._loggers.items()):
            with self._may_fail(name):
                logger.log(known)

    @contextlib.contextmanager
    def _may_fail(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            what = " ".join(f"{type(error).__name__}: {error}".split())
            log.warning("logger=%s gets no more of this run (%s)", name, what)
            self._loggers.pop(name, None)


def best_figures(record: RunRecord, phase: PhaseRecord) -> dict[str, float | None]:
    """Return what the selected epoch of a phase came to."""
    assert record.corpus is not None, "it was opened"
    return {"train_loss": phase.train_loss, **record.corpus.figures(phase.validation)}


class TensorBoard:
    """An event file in the run's folder, in place of an earlier try's."""

    def __init__(self, folder: Path, record: RunRecord) -> None:
        from torch.utils.tensorboard import SummaryWriter

        del record
        for path in folder.glob(f"events.*{SUFFIX}"):
            path.unlink()
        self._writer = SummaryWriter(str(folder), filename_suffix=SUFFIX)

    def log(self, metrics: list[Metric]) -> None:
        for name, value, step in metrics:
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # raises what went wrong, as on a full disk

    def end(self, state: RunState) -> None:
        del state
        self._writer.close()


class MLflow:
    """A run of MLflow, in the store that MLFLOW_TRACKING_URI names, else a folder of files.

    Its parameters are the settings, its tags the choices of the groups and the run's folder. A run
    that goes on after a kill goes on there. The jobs of a sweep have one parent.
    """

    def __init__(self, folder: Path, record: RunRecord) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI") or Path(MLFLOW_STORE).resolve().as_uri()
        # Unasked, MLflow tells its makers of its use, and waits for minutes for a server.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        lock = contextlib.nullcontext()
        if uri != "databricks" and urlsplit(uri).scheme in ("", "file"):
            # MLflow wants it said that a store of files is meant.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            store = Path(unquote(urlsplit(uri).path))
            store.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{store}.lock")
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self._client = MlflowClient(uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or MLFLOW_EXPERIMENT
        with lock:
            with contextlib.suppress(MlflowException):  # it is there, or another job was faster
                self._client.create_experiment(name)
            experiment = self._client.get_experiment_by_name(name)
            assert experiment is not None, f"no experiment {name} could be made"
            self._experiment = experiment.experiment_id
            in_sweep = (folder.parent / SWEEP_FILE).exists()
            parent = {"mlflow.parentRunId": self._sweep(folder.parent)} if in_sweep else {}
        if record.mlflow_run is not None:
            self._run = record.mlflow_run
            self._client.update_run(self._run, status="RUNNING")
            told = self._client.get_metric_history(self._run, "epoch")
            self._told = max((metric.step for metric in told), default=0)
            return
        self._told = 0
        self._run = record.mlflow_run = self._create(folder, {**record.choices, **parent})
        from mlflow.entities import Param

        params = [Param(name, str(value)) for name, value in flat_settings(record.config or {})]
        for start in range(0, len(params), 100):  # as many as MLflow takes at once
            self._client.log_batch(self._run, params=params[start : start + 100])

    def _create(self, folder: Path, tags: dict[str, str]) -> str:
        tags = {"proglayer.folder": str(folder.resolve()), **tags}
        run = self._client.create_run(self._experiment, run_name=folder.name, tags=tags)
        return run.info.run_id

    def _sweep(self, folder: Path) -> str:
        """Return the run that stands for the sweep in this folder."""
        asked = f"tags.`proglayer.folder` = '{folder.resolve()}'"
        for run in self._client.search_runs([self._experiment], asked, max_results=1):
            return run.info.run_id
        parent = self._create(folder, {})
        self._client.set_terminated(parent)
        return parent

    def log(self, metrics: list[Metric]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        new = [m for m in metrics if "/" in m[0] or m[2] > self._told]
        batch = [Metric(name, value, now, step) for name, value, step in new]
        self._client.log_batch(self._run, metrics=batch)

    def end(self, state: RunState) -> None:
        self._client.set_terminated(self._run, ENDS.get(state, "KILLED"))
