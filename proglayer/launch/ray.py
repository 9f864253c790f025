"""Jobs of a sweep as tasks of Ray: on a cluster that is there, or on this machine's cores.

Hydra's plugin for Ray cannot connect to a cluster that is there (it asks for
memory, which only a new one can be asked for), gives up all jobs with the first whose process died,
and holds back joblib and others; so Ray is spoken to directly. A job runs from a copy of the code,
as on Slurm, in the folder that the command was started in. When its node dies, Ray
starts it again elsewhere, and it goes on from the store; when it dies every time, it is lost, and
the others go on.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus

from proglayer.errors import ConfigError
from proglayer.launch.common import Launcher, folder_of, jobs_of
from proglayer.launch.snapshot import SUBMITTED, snapshot_code
from proglayer.run.record import ENDS, RunState, change_state

log = logging.getLogger(__name__)


# Where the store, corpora, models of the hub and runs of MLflow are.
VARIABLES = ("PROGLAYER_", "HF_", "MLFLOW_")
# A job that is stopped stores its state; one that needs longer was not going to end.
STOP_S = 60.0
# At a wrong address Ray itself looks for a cluster for more than five minutes.
LOOK_S = 10.0


def launch(launcher: Launcher) -> list[JobReturn]:
    """Run the jobs as tasks of Ray; wait for all. Raises ConfigError where there is no cluster."""
    if launcher.settings["ray"]["init"]["address"] == "local":
        # Ray's default here; given, it is not warned of. Ray reads it when it is imported.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray
    from ray import cloudpickle

    _connect(launcher.settings["ray"]["init"])
    code = snapshot_code(folder_of(launcher) / SUBMITTED)
    variables = {k: v for k, v in os.environ.items() if k.startswith(VARIABLES)}
    here = os.getcwd()

    # As a function of a function Ray sends its code along: a worker can import ours only once it
    # knows where from.
    def enter(pickled: bytes) -> JobReturn:
        if sys.path[0] != str(code):
            sys.path.insert(0, str(code))
        os.environ.update(variables)
        os.chdir(here)
        return cloudpickle.loads(pickled).run_elsewhere()

    task = ray.remote(**launcher.settings["ray"]["remote"])(enter)
    running: dict[Path, Any] = {}
    try:
        for job in jobs_of(launcher):
            pickled = cloudpickle.dumps(job)  # pyright: ignore[reportPrivateImportUsage]
            running[job.folder] = task.options(name=job.name).remote(pickled)
        return [_ended(job, folder) for folder, job in running.items()]
    except KeyboardInterrupt:
        for job in running.values():
            ray.cancel(job)
        ray.wait([*running.values()], num_returns=len(running), timeout=STOP_S)
        raise


def _connect(settings: Mapping[str, Any]) -> None:
    """Find the cluster, or start one on this machine. Raises ConfigError."""
    import ray

    if ray.is_initialized():
        return
    address = str(settings.get("address"))
    if address == "local":
        # Ray would set aside a third of the memory for objects that tasks share: a few kB here.
        settings = {"object_store_memory": 80_000_000, "include_dashboard": False, **settings}
    try:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if port.isdecimal():
            socket.create_connection((host, int(port)), timeout=LOOK_S).close()
        ray.init(**settings)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"hydra.launcher.ray.init.address={address}: no cluster to work with ({reason})"
        ) from error


def _ended(task: Any, folder: Path) -> JobReturn:
    """How a job ended; one that Ray gave up is lost."""
    import ray
    from ray.exceptions import RayError, RayTaskError, TaskCancelledError

    try:
        return ray.get(task)
    except TaskCancelledError:
        pass  # by a signal to its worker: its record tells
    except RayError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # Of an error in the worker, what was raised is at the end of a traceback.
        reason = lines[-1] if isinstance(error, RayTaskError) else lines[0]
        log.error("job %s was lost by Ray: %s", folder.name, reason)
        not_ended = tuple(state for state in RunState if state not in ENDS)
        change_state(folder, RunState.lost, f"it was lost by Ray: {reason}", not_ended)
    return JobReturn(status=JobStatus.COMPLETED)
