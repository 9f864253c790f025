"""Jobs of a sweep in joblib's workers, which store the state of their jobs when they are stopped.

joblib kills its workers at once when the process that started them is interrupted. So that process
holds the first signal back until they are done, and sees that each gets one: a terminal sends it to
all, but `kill` to a single process. A second one ends everything at once. A worker whose parent was
killed stops itself in the same way.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import BrokenExecutor

from hydra.core.utils import JobReturn

from proglayer.errors import ConfigError
from proglayer.launch.common import Launcher, SweepJob, folder_of, jobs_of
from proglayer.run.record import RunState, change_state
from proglayer.run.signals import on_signals, stop_signals

# How often a worker looks whether its parent lives.
LOOK_S = 1.0
# The signals that this worker got.
_stops: list[int] = []


def run_in_worker(job: SweepJob, parent: int) -> JobReturn | None:
    """Run one job.

    Returns None from a worker whose job was stopped, or not begun as another was: raised there, the
    interrupt would end the worker, and joblib all others with it.
    """
    if os.getpid() == parent:
        return job.run()
    _follow_parent(parent)
    # In a run the first signal is the run's own. This is for another, and for one between jobs.
    for number in stop_signals():
        signal.signal(number, lambda number, _: _stops.append(number))
    with contextlib.suppress(KeyboardInterrupt):
        if not _stops:
            return job.run_elsewhere()
    _stops.append(signal.SIGINT)
    return None


def _follow_parent(parent: int) -> None:
    """Stop this worker's job, and then the worker, once its parent is gone."""

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_S)
        os.kill(os.getpid(), signal.SIGTERM)
        while not _stops:  # until the run has stored its state
            time.sleep(LOOK_S / 10)
        os._exit(1)

    name = "follow-parent"
    if not any(thread.name == name for thread in threading.enumerate()):
        threading.Thread(target=follow, name=name, daemon=True).start()


def launch(launcher: Launcher) -> list[JobReturn]:
    """Run the jobs; wait for all. Raises ConfigError where a worker was killed.

    KeyboardInterrupt is raised once the jobs at work have ended.
    """
    import joblib
    from joblib.externals.loky import get_reusable_executor

    settings = dict(launcher.settings) | {"backend": "loky"}  # threads would share Hydra's state
    parent = os.getpid()
    stops: list[int] = []

    def hold_back(number: int, *_: object) -> None:
        stops.append(number)
        for worker in multiprocessing.active_children():
            if worker.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, number)

    try:
        with on_signals(hold_back):
            returns = joblib.Parallel(**settings)(
                joblib.delayed(run_in_worker)(job, parent) for job in jobs_of(launcher) if not stops
            )
    except BrokenExecutor as error:
        if stops:  # that ended a worker which was not at a job yet
            raise KeyboardInterrupt from error
        for job in launcher.jobs:
            folder = folder_of(launcher) / job.folder
            change_state(folder, RunState.lost, "its process was killed", (RunState.running,))
        raise ConfigError(
            "a worker of joblib was killed, and the others with it (by the system, for want of "
            "memory? then lower hydra.launcher.n_jobs); the same command goes on from here"
        ) from error
    ended = [job for job in returns if job is not None]
    if stops or len(ended) < len(launcher.jobs):
        get_reusable_executor().shutdown(kill_workers=True)
        raise KeyboardInterrupt
    return ended
