"""Where jobs run. An engine is the model of its settings, `hydra.launcher`, with what it does.

To add one: a class here (or in a module of its own, as Slurm), its name in `sweep.ENGINES`, and a
file in conf/hydra/launcher that says `engine: <name>`. A job is plain data: pickled, it goes to any
process, which calls `run_elsewhere` with it. How it ended is in its record, which the job writes;
`lost` writes there of one that ended without a word. A first Ctrl-C raises KeyboardInterrupt in
`run`, which waits for the jobs at work to store their state before it lets it go on.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import sys
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import field_validator

from proglayer.config import Config, Settings
from proglayer.console import say
from proglayer.errors import ConfigError, check_installed, first_line
from proglayer.launch.job import GOING, Job, log_to_console, run_job
from proglayer.launch.snapshot import snapshot_code
from proglayer.run import signals
from proglayer.run.environment import available_cores
from proglayer.run.record import RunState, change_state

log = logging.getLogger(__name__)

# A job that is stopped stores its state; one that needs longer was not going to end.
STOP_S = 60.0
# At a wrong address Ray itself looks for a cluster for more than five minutes.
CONNECT_S = 10.0
# Where trajectories, corpora, models of the hub and runs of MLflow are.
VARIABLES = ("PROGLAYER_", "HF_", "MLFLOW_")


def run_elsewhere(job: Job) -> None:
    """Run a job in a process of its own, on this or another machine."""
    log_to_console()
    run_job(job)


def lost(job: Job, reason: str) -> None:
    """Record that a job is lost, unless its record says how it ended."""
    change_state(job.folder, RunState.lost, reason, GOING)


class Engine(Settings):
    """One job after another in this process; what the other engines do differently is theirs.

    engine: its choice of hydra/launcher, and the name of the extra that brings what it needs.
    elsewhere: jobs run on machines that this process cannot know.
    needs: the module that it needs.
    """

    engine: str = "basic"
    elsewhere: ClassVar[bool] = False
    needs: ClassVar[str | None] = None

    @property
    def at_once(self) -> int:
        """How many jobs run at once on this machine."""
        return 1

    @property
    def threads(self) -> int | None:
        """How many threads a job has that does not say; None for all cores."""
        return None

    def threads_of(self, config: Config) -> int | None:
        """How many of them each process of a job has."""
        return self.threads and max(1, self.threads // config.least_devices)

    def check(self) -> None:
        """Raise ConfigError where no job could be started. Comes before anything is written."""
        if self.needs is not None:
            check_installed(f"hydra/launcher={self.engine}", self.needs)

    def check_job(self, config: Config) -> None:
        """Raise ConfigError for a job that would not run as the engine is set."""

    def held(self, sweep: Path) -> dict[str, str]:
        """Return the jobs of a sweep that a scheduler holds: folder's name -> its number there."""
        return {}

    def run(self, jobs: Sequence[Job], sweep: Path) -> Generator[Job, None, None]:
        """Run jobs, and give each when it has ended. To close the iterator keeps others from
        being begun.

        Raises ConfigError where the engine gives up, and KeyboardInterrupt, once the jobs at work
        have stored their state, where they were stopped.
        """
        for job in jobs:
            say(f"{job.name}: {' '.join(job.overrides)}")
            if run_job(job) is RunState.interrupted:
                raise KeyboardInterrupt
            yield job


# --- joblib ---------------------------------------------------------------------------------------


class Joblib(Engine):
    """joblib's workers on this machine, whose cores the jobs share."""

    needs = "joblib"
    engine: Literal["joblib"] = "joblib"
    n_jobs: int = -1

    @field_validator("n_jobs")
    @classmethod
    def _some(cls, jobs: int) -> int:
        if jobs == 0:
            raise ValueError("runs nothing: give a number from 1, or -1 for all cores")
        return jobs

    @property
    def at_once(self) -> int:
        return self.n_jobs if self.n_jobs > 0 else max(1, available_cores() + 1 + self.n_jobs)

    @property
    def threads(self) -> int | None:
        return max(1, available_cores() // self.at_once) if self.at_once > 1 else None

    def run(self, jobs: Sequence[Job], sweep: Path) -> Generator[Job, None, None]:
        """Hand a job to each worker that is free.

        A terminal sends a signal to all processes, `kill` to this one alone: the first one is
        passed on, and the workers store their state. A second one ends everything at once.
        """
        from joblib.externals.loky import get_reusable_executor

        from proglayer.run.machine import places

        at_once = min(filter(None, [self.at_once, *(places(job.config) for job in jobs)]))
        executor: Any = get_reusable_executor(at_once, timeout=60)
        waiting, running = iter(jobs), dict[Future[None], Job]()
        stops: list[int] = []

        def pass_on(number: int, *_: object) -> None:
            stops.append(number)
            signals.signal_children(number)

        try:
            with signals.on_signals(pass_on):
                while True:
                    free = 0 if stops else at_once - len(running)
                    for job in itertools.islice(waiting, free):
                        taken = {other.worker for other in running.values()}
                        worker = min(set(range(at_once)) - taken)
                        job = replace(job, worker=worker)
                        running[executor.submit(_in_worker, job, os.getpid())] = job
                    if not running:
                        break
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        future.result()
                        yield running.pop(future)
        except BrokenExecutor as error:
            if not stops:  # else it ended a worker that was not at a job yet
                for job in running.values():
                    lost(job, "its process was killed")
                raise ConfigError(
                    "a worker of joblib was killed, and the others with it (by the system, for "
                    "want of memory? then lower hydra.launcher.n_jobs); the same command goes on "
                    "from here"
                ) from error
        except GeneratorExit:  # no more are to be begun; those at work go to their end
            wait(running)
            raise
        except BaseException:
            executor.shutdown(kill_workers=True)
            raise
        if stops:
            executor.shutdown(kill_workers=True)
            raise KeyboardInterrupt


def _in_worker(job: Job, parent: int) -> None:
    """Run one job, unless this worker was told to stop."""
    signals.follow_parent(parent)
    log_to_console()
    # Processes of a run on several devices would be told to start others in joblib's way, which
    # they do not know.
    multiprocessing.set_start_method("spawn", force=True)
    # In a run the first signal is the run's own. This is for another, and for one between jobs.
    for number in signals.stop_signals():
        signal.signal(number, lambda number, _: signals.stopped.append(number))
    with contextlib.suppress(KeyboardInterrupt):
        if not signals.stopped and run_job(job) is not RunState.interrupted:
            return
    signals.stopped.append(signal.SIGINT)


# --- Ray ------------------------------------------------------------------------------------------


class RayParts(Settings):
    """What `ray.init` and, for each job, `ray.remote` are given."""

    init: dict[str, Any]
    remote: dict[str, Any]


class Ray(Engine):
    """Tasks of Ray: on a cluster that is there, or on this machine's cores.

    A job runs from a copy of the code. When its node dies, Ray starts it again elsewhere, and it
    goes on from the store; when it dies every time, it is lost, and the others go on.
    """

    needs = "ray"
    engine: Literal["ray"] = "ray"
    ray: RayParts

    @property
    def elsewhere(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.ray.init["address"] != "local"

    @property
    def threads(self) -> int | None:
        return max(1, int(self.ray.remote["num_cpus"]))

    def asked(self, job: Job) -> dict[str, Any]:
        """Return what Ray is asked for a job: room on one node for all devices that it takes."""
        room, devices = self.ray.remote, job.config.least_devices
        on_gpu = job.config.device == "cuda" and (devices > 1 or not room["num_gpus"])
        more = ["num_cpus"] * (devices > 1) + ["num_gpus"] * on_gpu
        return {"name": job.name} | {each: max(room[each], devices) for each in more}

    def run(self, jobs: Sequence[Job], sweep: Path) -> Generator[Job, None, None]:
        if not self.elsewhere:
            # Ray's default here; given, it is not warned of. Ray reads it when it is imported.
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        import ray

        self._connect()
        code = snapshot_code(sweep)
        variables = {k: v for k, v in os.environ.items() if k.startswith(VARIABLES)}

        # As a function of a function Ray sends its code along: a worker can import ours only once
        # it knows where from.
        def enter(pickled: bytes) -> None:
            if sys.path[0] != str(code):
                sys.path.insert(0, str(code))
            os.environ.update(variables)
            job, run = pickle.loads(pickled)
            run(job)

        task = ray.remote(**self.ray.remote)(enter)
        running: dict[Any, Job] = {}
        try:
            for job in jobs:
                pickled = pickle.dumps((job, run_elsewhere))
                running[task.options(**self.asked(job)).remote(pickled)] = job
            while running:
                (ended, *_), _ = ray.wait([*running])
                job = running.pop(ended)
                _end_task(ended, job)
                yield job
        finally:
            for started in running:
                ray.cancel(started)
            if running:
                ray.wait([*running], num_returns=len(running), timeout=STOP_S)

    def _connect(self) -> None:
        """Find the cluster, or start one on this machine. Raises ConfigError."""
        import ray

        if ray.is_initialized():
            return
        settings, address = self.ray.init, str(self.ray.init["address"])
        if not self.elsewhere:
            # Ray would set aside a third of the memory for objects that tasks share: a few kB here.
            settings = {"object_store_memory": 80_000_000, "include_dashboard": False, **settings}
        try:
            host, _, port = address.removeprefix("ray://").rpartition(":")
            if port.isdecimal():
                socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
            ray.init(**settings)
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"hydra.launcher.ray.init.address={address}: no cluster to work with ({reason})"
            ) from error


def _end_task(task: Any, job: Job) -> None:
    """See how a task ended; a job that Ray gave up is lost."""
    import ray
    from ray.exceptions import RayError, TaskCancelledError

    try:
        ray.get(task)
    except TaskCancelledError:
        pass  # by a signal to its worker: its record tells
    except RayError as error:
        # An error in the worker is the cause of one of Ray's.
        reason = first_line(getattr(error, "cause", None) or error)
        log.error("job %s was lost by Ray: %s", job.name, reason)
        lost(job, f"it was lost by Ray: {reason}")
