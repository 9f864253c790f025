"""Jobs of a sweep as tasks of Ray: on a cluster that is there, or on this machine's cores.

What is ours of it. Hydra's plugin for Ray cannot connect to a cluster that is there (it asks for
memory, which only a new one can be asked for), gives up all jobs with the first whose process died,
and holds back joblib and others; so Ray is spoken to directly. A job runs from a copy of the code
and of `conf/`, as on Slurm, in the folder that the command was started in. When its node dies, Ray
starts it again elsewhere, and it goes on from the store; when it dies every time, it is lost, and
the others go on.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, configure_log, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from proglayer.config import ConfigError
from proglayer.errors import StoreError
from proglayer.launch.common import HydraLauncher, folder_name, freeze
from proglayer.store.record import SUBMITTED, mark_lost

log = logging.getLogger(__name__)


class RayLauncher(HydraLauncher, Protocol):
    """With `hydra.launcher.ray`: `init` and `remote`, the arguments of Ray's functions."""

    ray: DictConfig


# Where stages, corpora, models of the hub and runs of MLflow are.
VARIABLES = ("PROGLAYER_", "HF_", "MLFLOW_")
# Told to stop, a job stores its state; one that needs longer was not going to end.
STOP_S = 60.0
# At a wrong address Ray itself looks for a cluster for more than five minutes.
LOOK_S = 10.0


@dataclass
class Tasks:
    """What the jobs of a sweep have in common, as their workers get it."""

    config: DictConfig
    context: HydraContext
    function: TaskFunction
    singletons: Any

    def run(self, overrides: Sequence[str], number: int) -> JobReturn:
        """Run one job, in a worker. Gives how it ended, without its settings."""
        setup_globals()
        Singleton.set_state(self.singletons)
        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config.hydra.job):
            config.hydra.job.id = f"{config.hydra.job.name}_{number}"
            config.hydra.job.num = number
        HydraConfig.instance().set_config(config)
        job = run_job(
            hydra_context=self.context,
            task_function=self.function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        job.cfg = job.hydra_cfg = None
        return job


def launch(
    launcher: RayLauncher, job_overrides: Sequence[Sequence[str]], first_number: int
) -> list[JobReturn]:
    """Run the jobs as tasks of Ray; wait for all. Raises ConfigError where there is no cluster."""
    import ray
    from ray import cloudpickle

    assert launcher.config is not None
    assert launcher.task_function is not None
    setup_globals()
    configure_log(launcher.config.hydra.hydra_logging, launcher.config.hydra.verbose)
    _connect(launcher)
    sweep = Path(launcher.config.hydra.sweep.dir)
    try:
        config, context, code = freeze(launcher, (sweep / SUBMITTED).absolute())
    except StoreError as error:
        raise ConfigError(str(error)) from error
    tasks = Tasks(config, context, launcher.task_function, Singleton.get_state())
    pickled = ray.put(cloudpickle.dumps(tasks))  # pyright: ignore[reportPrivateImportUsage]
    variables = {k: v for k, v in os.environ.items() if k.startswith(VARIABLES)}
    here = os.getcwd()

    # As a function of a function Ray sends its code along: a worker can import ours only once it
    # knows where from.
    def enter(pickled: bytes, overrides: Sequence[str], number: int) -> JobReturn:
        if sys.path[0] != str(code):
            sys.path.insert(0, str(code))
        os.environ.update(variables)
        os.chdir(here)
        return cloudpickle.loads(pickled).run(overrides, number)

    remote: Any = OmegaConf.to_container(launcher.ray.remote, resolve=True)
    task = ray.remote(**remote)(enter)
    running: dict[str, Any] = {}
    try:
        for number, overrides in enumerate(job_overrides, first_number):
            name = folder_name(launcher, overrides, number)
            running[name] = task.options(name=name).remote(pickled, list(overrides), number)
        return [_ended(job, sweep / name) for name, job in running.items()]
    except KeyboardInterrupt:
        for job in running.values():
            ray.cancel(job)
        ray.wait([*running.values()], num_returns=len(running), timeout=STOP_S)
        raise


def _connect(launcher: RayLauncher) -> None:
    """Find the cluster, or start one on this machine. Raises ConfigError."""
    import ray

    if ray.is_initialized():
        return
    settings: Any = OmegaConf.to_container(launcher.ray.init, resolve=True)
    address = str(settings.get("address"))
    if address == "local":
        # Ray would set aside a third of the memory for objects that tasks share: a few kB here.
        settings = {"object_store_memory": 80_000_000, "include_dashboard": False} | settings
        # Ray's default here; given, it is not warned of.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
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
        mark_lost(folder, f"it was lost by Ray: {reason}")
    job = JobReturn(status=JobStatus.COMPLETED)
    job.return_value = None
    return job
