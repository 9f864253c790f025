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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from proglayer.config import LoggerConfig, flat_settings
from proglayer.run.record import PhaseRecord, RunRecord, RunState

log = logging.getLogger(__name__)

# One metric: its name, its value, its step.
Metric = tuple[str, float, int]

# The end of its name, by which an event file is known as ours.
SUFFIX = ".proglayer"
MLFLOW_STORE = "multirun/.mlruns"
MLFLOW_EXPERIMENT = "proglayer"


class Loggers:
    """The loggers that `config` asks for, as one that never fails."""

    def __init__(self, config: LoggerConfig, folder: Path, record: RunRecord) -> None:
        settings, choices = record.config or {}, record.choices
        self._epochs = 0
        self._loggers: dict[str, TensorBoard | MLflow] = {}
        openers: dict[str, Callable[[], TensorBoard | MLflow]] = {
            "tensorboard": lambda: TensorBoard(folder),
            "mlflow": lambda: MLflow(folder, settings, choices),
        }
        for name, opened in openers.items():
            if getattr(config, name):
                with self._may_fail(name):
                    self._loggers[name] = opened()

    def epoch(self, row: dict[str, Any]) -> None:
        """An epoch is done: `row` is what `metrics.csv` gets of it."""
        self._epochs += 1
        metrics = [
            (name, float(value), self._epochs)
            for name, value in row.items()
            if name != "best" and value is not None
        ]
        self._each(lambda logger: logger.metrics(metrics))

    def end(self, record: RunRecord) -> None:
        """The run ended with this record."""
        metrics: list[Metric] = [
            (f"best/{name}", value, number)
            for number, phase in enumerate(record.phases, start=1)
            for name, value in best_figures(record, phase).items()
        ]
        if record.changes:
            changes = record.changes._asdict().items()
            metrics += [(f"changes/{name}", value, len(record.phases)) for name, value in changes]
        known = [metric for metric in metrics if metric[1] is not None]
        self._each(lambda logger: logger.metrics(known))
        self._each(lambda logger: logger.end(record.state))

    def _each(self, act: Callable[[TensorBoard | MLflow], None]) -> None:
        for name, logger in list(self._loggers.items()):
            with self._may_fail(name):
                act(logger)

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
    """An event file in the run's folder; an earlier try's is taken away."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        for path in folder.glob(f"*{SUFFIX}"):
            path.unlink()
        self._writer = SummaryWriter(str(folder), filename_suffix=SUFFIX)

    def metrics(self, metrics: list[Metric]) -> None:
        for name, value, step in metrics:
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # raises what went wrong, as on a full disk

    def end(self, status: RunState | None) -> None:
        self._writer.close()


class MLflow:
    """A run of MLflow, in the store that MLFLOW_TRACKING_URI names, else a folder of files.

    Its parameters are the settings, its tags the choices of the groups and the run's folder.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], choices: dict[str, str]) -> None:
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
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException

        self._metric = Metric
        self._client = MlflowClient(uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or MLFLOW_EXPERIMENT
        with lock, contextlib.suppress(MlflowException):  # it is there, or another job was faster
            self._client.create_experiment(name)
        experiment = self._client.get_experiment_by_name(name)
        assert experiment is not None, f"no experiment {name} could be made"
        tags = {"proglayer.folder": str(folder.resolve()), **choices}
        run = self._client.create_run(experiment.experiment_id, run_name=folder.name, tags=tags)
        self._run = run.info.run_id
        params = [Param(name, str(value)) for name, value in flat_settings(settings)]
        for start in range(0, len(params), 100):  # as many as MLflow takes at once
            self._client.log_batch(self._run, params=params[start : start + 100])

    def metrics(self, metrics: list[Metric]) -> None:
        now = int(1000 * time.time())
        batch = [self._metric(name, value, now, step) for name, value, step in metrics]
        self._client.log_batch(self._run, metrics=batch)

    def end(self, status: RunState | None) -> None:
        ends: dict[RunState | None, str] = {
            RunState.completed: "FINISHED",
            RunState.failed: "FAILED",
        }
        self._client.set_terminated(self._run, ends.get(status, "KILLED"))
