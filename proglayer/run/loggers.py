"""Others that get a run's metrics as they come: TensorBoard and MLflow.

Each epoch is given as the row that `metrics.csv` gets (without `best`, which a later epoch may
still change), at a step that counts the epochs of all phases together from 1. Stored epochs are
given like those that were trained. A logger is made when the run starts, with its folder and its
record.

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
from typing import Any

from filelock import FileLock

from proglayer.config import LoggerConfig, flat_settings
from proglayer.errors import with_type
from proglayer.run.record import RunRecord, RunState

log = logging.getLogger(__name__)

# The end of its name, by which an event file is known as ours.
SUFFIX = ".proglayer"
MLFLOW_STORE = Path("multirun/.mlruns")
# Unasked, MLflow wants no store of files, tells its makers of its use, and waits long for a server.
MLFLOW_SETTINGS = {
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
}
ENDS = {RunState.completed: "FINISHED", RunState.failed: "FAILED"}


class TensorBoard:
    """An event file in the run's folder, in place of an earlier try's."""

    def __init__(self, folder: Path, record: RunRecord) -> None:
        from torch.utils.tensorboard import SummaryWriter

        for path in folder.glob(f"events.*{SUFFIX}"):
            path.unlink()
        self._writer = SummaryWriter(str(folder), filename_suffix=SUFFIX)

    def log(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # raises what went wrong, as on a full disk

    def end(self, state: RunState) -> None:
        self._writer.close()


class MLflow:
    """A run of MLflow, in the store that MLFLOW_TRACKING_URI names, else a folder of files.

    Its parameters are the settings, its tags the choices of the groups and the run's folder. Of the
    same folder and settings it is the same one.
    """

    def __init__(self, folder: Path, record: RunRecord) -> None:
        for name, value in MLFLOW_SETTINGS.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        uri = os.environ.get("MLFLOW_TRACKING_URI") or MLFLOW_STORE.resolve().as_uri()
        self._client = MlflowClient(uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "proglayer"
        MLFLOW_STORE.parent.mkdir(parents=True, exist_ok=True)
        params = {name: str(value) for name, value in flat_settings(record.config or {})}
        # Two jobs at once would make two experiments of this name.
        with FileLock(f"{MLFLOW_STORE}.lock"), contextlib.suppress(MlflowException):
            self._client.create_experiment(name)
        experiment = self._client.get_experiment_by_name(name)
        assert experiment is not None, f"no experiment {name} could be made"
        place = folder.resolve().as_uri()  # it has no quotes, which end a filter's text
        asked = [experiment.experiment_id], f'tags.`proglayer.folder` = "{place}"'
        known = [run for run in self._client.search_runs(*asked) if run.data.params == params]
        tags = {"proglayer.folder": place, **record.choices}
        run, *_ = known or [
            self._client.create_run(experiment.experiment_id, run_name=folder.name, tags=tags)
        ]
        self._run = run.info.run_id
        self._client.update_run(self._run, "RUNNING")
        entries = [Param(name, value) for name, value in params.items() if not known]
        for start in range(0, len(entries), 100):  # as many as MLflow takes at once
            self._client.log_batch(self._run, params=entries[start : start + 100])
        history = self._client.get_metric_history(self._run, "epoch")
        self._logged = max((entry.step for entry in history), default=0)

    def log(self, figures: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        if step <= self._logged:  # before the run was interrupted
            return
        now = int(1000 * time.time())
        batch = [Metric(name, value, now, step) for name, value in figures.items()]
        self._client.log_batch(self._run, metrics=batch)

    def end(self, state: RunState) -> None:
        self._client.set_terminated(self._run, ENDS.get(state, "KILLED"))


class Loggers:
    """The loggers that `config` asks for, as one that never fails."""

    def __init__(self, config: LoggerConfig, folder: Path, record: RunRecord) -> None:
        self._epochs = 0
        self._loggers: dict[str, TensorBoard | MLflow] = {}
        for name, start in {"tensorboard": TensorBoard, "mlflow": MLflow}.items():
            if getattr(config, name):
                with self._may_fail(name):
                    self._loggers[name] = start(folder, record)

    def epoch(self, row: dict[str, Any]) -> None:
        """Tell of an epoch; `row` is what `metrics.csv` gets of it."""
        self._epochs += 1
        known = {name: float(v) for name, v in row.items() if v is not None and name != "best"}
        self._tell("log", known, self._epochs)

    def end(self, state: RunState) -> None:
        """Tell how the run ended."""
        self._tell("end", state)

    def _tell(self, what: str, *arguments: Any) -> None:
        for name, logger in list(self._loggers.items()):
            with self._may_fail(name):
                getattr(logger, what)(*arguments)

    @contextlib.contextmanager
    def _may_fail(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            log.warning("logger=%s gets no more of this run (%s)", name, with_type(error))
            self._loggers.pop(name, None)
