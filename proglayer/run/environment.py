"""What a run runs from and on: the state of the code, the host, its scheduler and cores.

Needs no torch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from proglayer.run.record import Environment, GitState

PACKAGE = Path(__file__).resolve().parent.parent
QUOTA = Path("/sys/fs/cgroup/cpu.max")


class Place(NamedTuple):
    """Which of the processes of a run this one is, in all and of those on this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def place() -> Place:
    """Return the place that the variables of `torchrun` give this process; 0 of 1 without them."""
    names = ("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")
    return Place(*(int(os.environ.get(name) or without) for name, without in names))


def environment() -> Environment:
    """Return versions and place, for the record."""
    from proglayer import __version__

    return Environment(
        proglayer=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        host=socket.gethostname(),
        process=os.getpid(),
        cores=os.cpu_count(),
        **_scheduler(),
    )


def _scheduler() -> dict[str, str | None]:
    """Return the scheduler that started this job, its number there, and its node."""
    if job := os.environ.get("SLURM_JOB_ID"):
        array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
        job, node = f"{array}_{task}" if array else job, os.environ.get("SLURMD_NODENAME", "")
        return {"scheduler": "slurm", "scheduler_job": job, "node": node}
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        context = ray.get_runtime_context()
        # Outside a task it is the process of the command, which runs no jobs.
        if task := context.get_task_id():
            return {"scheduler": "ray", "scheduler_job": task, "node": context.get_node_id()}
    return {}


def available_cores(quota: Path = QUOTA) -> int:
    """Return how many cores this process may use: of its affinity, and of its container's quota.

    quota: the file that says how many microseconds of processor time it gets in how many.
    """
    has_mask = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_mask else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        time, period = map(int, quota.read_text().split())
        cores = min(cores, max(1, time // period))
    return cores


@functools.lru_cache(maxsize=1)
def git_state() -> GitState | None:
    """Return the state of the checkout that this package lies in; None outside of one.

    The difference is a hash of how the tracked files differ from the commit.
    """
    commit = _git("rev-parse", "HEAD").strip()
    if not commit or not _git("ls-files", "--", ".").strip():
        return None
    difference = _git("diff", "HEAD", "--binary")
    digest = hashlib.sha256(difference.encode()).hexdigest()[:12] if difference else None
    return GitState(commit=commit, changed=bool(difference), difference=digest)


def _git(*arguments: str) -> str:
    """Return what git prints about this package's folder; nothing where it fails."""
    command = ["git", "-C", str(PACKAGE), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout
