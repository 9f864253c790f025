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

from proglayer.run.record import Environment, GitState, Scheduler

PACKAGE = Path(__file__).resolve().parent.parent
CGROUP = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


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
        scheduler=_scheduler(),
    )


def _scheduler() -> Scheduler | None:
    """Return the scheduler that started this job, if one did."""
    if job := os.environ.get("SLURM_JOB_ID"):
        array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
        node = os.environ.get("SLURMD_NODENAME", "")
        return Scheduler(name="slurm", job=f"{array}_{task}" if array else job, node=node)
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        context = ray.get_runtime_context()
        # Outside a task it is the process of the command, which runs no jobs.
        if task := context.get_task_id():
            return Scheduler(name="ray", job=task, node=context.get_node_id())
    return None


def available_cores(cgroup: Path = CGROUP, membership: Path = MEMBERSHIP) -> int:
    """Return how many cores this process may use: of its affinity, and of its cgroups' quotas.

    cgroup: where cgroups are mounted. membership: which ones the process is in. A quota stands in
        `cpu.max` of version 2, `cpu.cfs_quota_us` of version 1, and holds for all groups below.
    """
    has_mask = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_mask else os.cpu_count() or 1
    with contextlib.suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            top = cgroup / "cpu" if controllers else cgroup
            if controllers and "cpu" not in controllers.split(","):
                continue
            folder = top / path.strip("/")
            for group in (folder, *folder.parents):
                cores = min(cores, _quota(group) or cores)
                if group == top:
                    break
    return cores


def _quota(group: Path) -> int | None:
    """Return the cores that a cgroup may use, at least one; None without a limit."""
    files = [["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]]
    for names in files:
        with contextlib.suppress(OSError):
            quota, period = " ".join((group / name).read_text() for name in names).split()
            return max(1, int(quota) // int(period)) if quota not in ("max", "-1") else None
    return None


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
