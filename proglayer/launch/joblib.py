"""Jobs of a sweep in joblib's workers, which store the state of their jobs on Ctrl-C.

What is ours of it: workers compose their jobs' settings from a copy, as an edit of conf/ meanwhile
would change them or, half done, end the sweep. And joblib kills its workers at once when the
process that started them is interrupted. So that process holds SIGINT back until they are done, and
sees that each gets one: a terminal sends it to all, but `kill` to a single process. A second Ctrl-C
ends everything at once.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, configure_log, filter_overrides, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from proglayer.config import ConfigError
from proglayer.errors import StoreError
from proglayer.launch.common import HydraLauncher, freeze
from proglayer.store.record import HEARTBEAT, RESULT, SUBMITTED, RunState, mark_lost, read_heartbeat

log = logging.getLogger(__name__)


class JoblibLauncher(HydraLauncher, Protocol):
    """With the arguments of `joblib.Parallel` that `hydra.launcher` sets."""

    joblib: Any


@dataclass
class Task:
    """What the jobs of a sweep have in common, as joblib pickles it with each."""

    config: DictConfig
    context: HydraContext
    function: TaskFunction
    singletons: Any
    parent: int

    def run(self, overrides: Sequence[str], number: int) -> JobReturn | None:
        """Run one job. A worker gives None for one that was stopped, or that it does not begin.

        Raised there, the interrupt would end the worker, and joblib all others with it.
        """
        from hydra_plugins.hydra_joblib_launcher._core import execute_job  # type: ignore

        given = number, overrides, self.context, self.config, self.function, self.singletons
        if os.getpid() == self.parent:
            return execute_job(*given)
        # In a run the first signal is the run's own. This is for another, and for one between jobs.
        signal.signal(signal.SIGINT, lambda number, _: _stops.append(number))
        with contextlib.suppress(KeyboardInterrupt):
            if not _stops:
                return execute_job(*given)
        _stops.append(signal.SIGINT)
        return None


# The signals that this worker got.
_stops: list[int] = []


def launch(
    launcher: JoblibLauncher, job_overrides: Sequence[Sequence[str]], first_number: int
) -> list[JobReturn]:
    """Run the jobs; wait for all. Raises ConfigError where a worker was killed.

    KeyboardInterrupt is raised once the jobs at work have ended.
    """
    import joblib
    from hydra_plugins.hydra_joblib_launcher._core import process_joblib_cfg
    from joblib.externals.loky import get_reusable_executor

    setup_globals()
    assert launcher.config is not None
    assert launcher.task_function is not None
    assert launcher.hydra_context is not None
    configure_log(launcher.config.hydra.hydra_logging, launcher.config.hydra.verbose)
    settings = dict(launcher.joblib) | {"backend": "loky"}  # threads would share Hydra's state
    process_joblib_cfg(settings)
    for number, overrides in enumerate(job_overrides, first_number):
        log.info("#%d: %s", number, " ".join(filter_overrides(overrides)))
    sweep = Path(launcher.config.hydra.sweep.dir)
    try:
        config, context, _ = freeze(launcher, (sweep / SUBMITTED).absolute())
    except StoreError as error:
        raise ConfigError(str(error)) from error
    task = Task(config, context, launcher.task_function, Singleton.get_state(), os.getpid())
    try:
        with _held_back() as stops:
            returns = joblib.Parallel(**settings)(
                joblib.delayed(task.run)(overrides, number)
                for number, overrides in enumerate(job_overrides, first_number)
                if not stops
            )
    except BrokenExecutor as error:
        if stops:  # that ended a worker which was not at a job yet
            raise KeyboardInterrupt from error
        for sign in sweep.glob(f"*/{HEARTBEAT}"):
            deferred = read_heartbeat(sign.parent).sign is RunState.deferred
            if not deferred and not (sign.parent / RESULT).exists():
                mark_lost(sign.parent, "its process was killed")
        raise ConfigError(
            "a worker of joblib was killed, and the others with it (by the system, for want of "
            "memory? then lower hydra.launcher.n_jobs); the same command goes on from here"
        ) from error
    ended = [job for job in returns if job is not None]
    if stops or len(ended) < len(job_overrides):
        get_reusable_executor().shutdown(kill_workers=True)
        raise KeyboardInterrupt
    return ended


@contextlib.contextmanager
def _held_back() -> Iterator[list[int]]:
    """Keep the first SIGINT to the list that is given, and pass it on to this process's children.

    Outside the main thread nothing is held back.
    """
    stops: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stops
        return
    before = signal.getsignal(signal.SIGINT)

    def hold(number: int, _: object) -> None:
        stops.append(number)
        signal.signal(signal.SIGINT, before)
        for worker in multiprocessing.active_children():
            if worker.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, number)

    signal.signal(signal.SIGINT, hold)
    try:
        yield stops
    finally:
        signal.signal(signal.SIGINT, before)
