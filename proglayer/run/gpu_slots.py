"""One job, one GPU: on a machine with several, each job holds one of them by a lock.

Where no scheduler hands out GPUs, processes that were started at once (joblib's workers, several
commands) would all take the first. A slot is a file in a folder of this machine and this user,
locked as long as the job runs; the operating system frees it however the job ends.

A GPU is chosen by its index within the process, not through CUDA_VISIBLE_DEVICES: jobs of the basic
launcher come one after another in one process, where CUDA reads that variable only once.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from proglayer.config import ConfigError
from proglayer.run.record import Gpu
from proglayer.store.trajectory import Hooks, Interrupted

LOOK_AGAIN_S = 0.2


@contextlib.contextmanager
def hold(device: torch.device, jobs_per_gpu: int, hooks: Hooks) -> Iterator[Gpu | None]:
    """Hold a slot on a GPU and make it this process's current device until the block ends.

    None, and nothing is held, on a device that is no GPU and where a scheduler gave this job its
    GPU. Raises Interrupted when `hooks.stop_requested` names a signal before a slot is free, and
    ConfigError where no lock can be written.
    """
    names = gpus(device)
    if not names:
        yield None
        return
    lock, index, seconds = _take(names, jobs_per_gpu, hooks)
    try:
        with use(index):
            yield Gpu(index=index, name=names[index], seconds_waited=seconds)
    finally:
        lock.release()


def gpus(device: torch.device) -> list[str]:
    """The names of the GPUs that a job for `device` may choose from, by their index here.

    A name means the same GPU in every process of the machine, whichever of them each sees.
    """
    if device.type != "cuda" or _given_by_scheduler():
        return []
    count = torch.cuda.device_count()
    return [str(torch.cuda.get_device_properties(index).uuid) for index in range(count)]


@contextlib.contextmanager
def use(index: int) -> Iterator[None]:
    """Have `cuda` mean the GPU with this index; leave no memory taken on it that nothing uses."""
    with torch.cuda.device(index):
        try:
            yield
        finally:
            torch.cuda.empty_cache()


def folder() -> Path:
    """Where the locks lie: on this machine, whatever is shared with others; one for each user."""
    return Path(tempfile.gettempdir()) / f"proglayer-gpus-{os.getuid()}"


def _given_by_scheduler() -> bool:
    """Whether the one GPU to be seen here is this job's, or its share of one.

    A job of Slurm may have several, for processes of its own to share out.
    """
    if os.environ.get("RAY_JOB_ID"):
        return True
    by_slurm = "SLURM_JOB_GPUS" in os.environ or "SLURM_STEP_GPUS" in os.environ
    return by_slurm and torch.cuda.device_count() == 1


def _take(names: Sequence[str], jobs_per_gpu: int, hooks: Hooks) -> tuple[FileLock, int, float]:
    """The lock of a free slot, the index of its GPU, and the seconds that it took to get it."""
    started = time.monotonic()
    waited = False
    # An empty GPU comes before a second place on one.
    slots = [(index, place) for place in range(jobs_per_gpu) for index in range(len(names))]
    while True:
        for index, place in slots:
            lock = _locked(f"{re.sub('[^A-Za-z0-9-]', '_', names[index])}.{place}")
            if lock is not None:
                return lock, index, time.monotonic() - started if waited else 0.0
        if not waited:
            hooks.on_wait(
                f"waiting for a GPU: {len(names)} here, each with as many jobs as "
                f"jobs_per_gpu={jobs_per_gpu} allows"
            )
            waited = True
        if signal := hooks.stop_requested():
            raise Interrupted(f"stopped by {signal}")
        time.sleep(LOOK_AGAIN_S)


def _locked(name: str) -> FileLock | None:
    """The lock of this name, taken; None if another job holds it."""
    try:
        folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        # Not a singleton: two jobs of one process would share it.
        lock = FileLock(folder() / name)
        lock.acquire(blocking=False)
    except Timeout:
        return None
    except OSError as error:
        raise ConfigError(
            f"cannot lock a GPU in {folder()} ({error.strerror}): set TMPDIR to another folder of "
            "this machine, the same for all jobs"
        ) from error
    return lock
