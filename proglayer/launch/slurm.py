"""Jobs of a sweep in Slurm's queue: handed over by submitit, and found again.

A job has the settings with which it was submitted, and runs from a copy of the code. Its record
says `pending` from the moment it is submitted. The command that submitted it may end: given again,
it waits for the jobs that Slurm still holds and submits only the others. How a job ended is in its
record; one that left the queue without saying so is lost.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field

from proglayer import files
from proglayer.config import Config
from proglayer.console import counted, say
from proglayer.errors import ConfigError, first_line
from proglayer.launch.engines import Engine, lost, run_elsewhere
from proglayer.launch.job import GOING, Job, recorded_state
from proglayer.launch.snapshot import snapshot_code
from proglayer.run.environment import place
from proglayer.run.record import RunState, change_state

log = logging.getLogger(__name__)

# In a sweep's folder: what submitit writes, and each job's folder -> its number in Slurm.
FOLDER = ".slurm"
IDS = "jobs.json"
# Each job in the queue of this user: its number and its script.
QUEUE = ("squeue", "--noheader", "--array", "--me", "--format=%i %o")
# The tasks of a job meet at one of these ports, each job at the next: no system hands them out.
PORTS = range(20_000, 32_000)
# Slurm's MaxArraySize, unless it is set, is one more.
LONGEST_ARRAY = 1000
# A shared file system may show a job's last files a little after Slurm tells that it ended.
LATE_S = 10.0


class Slurm(Engine):
    """Jobs of a Slurm array. Settings that have no field here are those of submitit."""

    model_config = ConfigDict(extra="allow")

    elsewhere = True
    needs = "submitit"

    engine: Literal["slurm"] = "slurm"
    timeout_min: int = Field(ge=1)
    max_num_timeout: int = Field(ge=0)
    cpus_per_task: int = Field(ge=1)
    nodes: int = Field(default=1, ge=1)
    tasks_per_node: int = Field(default=1, ge=1)
    setup: list[str] | None = None

    @property
    def threads(self) -> int | None:
        return self.cpus_per_task

    def threads_of(self, config: Config) -> int | None:
        return self.threads if self.tasks > 1 else super().threads_of(config)

    @property
    def tasks(self) -> int:
        """How many processes Slurm starts for a job."""
        return self.nodes * self.tasks_per_node

    def check(self) -> None:
        """Raise ConfigError also where no Slurm answers."""
        super().check()
        _ask(*QUEUE)

    def check_job(self, config: Config) -> None:
        tasks = self.tasks
        if tasks > 1 and config.devices not in ("auto", tasks):
            start = f"nodes={self.nodes} with tasks_per_node={self.tasks_per_node} start"
            said = f"hydra.launcher.{start} {tasks} processes: give devices={tasks}, or auto"
            raise ConfigError(f"devices={config.devices}: {said}")

    def held(self, sweep: Path) -> dict[str, str]:
        ids = _read_ids(sweep)
        queue = _queue(sweep) if ids else set()
        return {name: number for name, number in ids.items() if number in queue}

    def run(self, jobs: Sequence[Job], sweep: Path) -> Generator[Job, None, None]:
        """Hand over the jobs that Slurm does not hold already, and wait for all."""
        held = self.held(sweep)
        new = [job for job in jobs if job.name not in held]
        ids = held | (self._submit(new, sweep) if new else {})
        command = ["python", "-m", "proglayer.results", os.path.relpath(sweep)]
        said = f"in Slurm's queue: {counted(len(jobs), 'job')}"
        say(f"{said}; {shlex.join(command)} follows them from any shell")
        left = {ids[job.name]: job for job in jobs}
        try:
            for number in _leaving([*left], sweep):
                _end(left[number], number)
                yield left.pop(number)
        except GeneratorExit:
            _ask("scancel", "--state=PENDING", *left)
            raise
        except KeyboardInterrupt:
            say("jobs go on in Slurm; the same command waits for them again")
            raise

    def asked(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """Return what submitit is told of each job: GPUs, too, where only `device` says so."""
        asked = self.model_dump(exclude={"engine", "max_num_timeout"})
        gpus = [job.config.least_devices for job in jobs if job.config.device == "cuda"]
        if gpus and not any(map(asked.get, ("gpus_per_node", "gpus_per_task", "gres"))):
            asked["gpus_per_node"] = max(self.tasks_per_node, max(gpus) // self.nodes)
        return asked

    def _submit(self, jobs: Sequence[Job], sweep: Path) -> dict[str, str]:
        """Submit jobs, as arrays. Returns each one's number in Slurm. Raises ConfigError."""
        import submitit
        from submitit.core.utils import FailedJobError

        asked = self.asked(jobs)
        # They import from a copy of the code, and nothing that lies where a job starts.
        path = shlex.quote(str(snapshot_code(sweep)))
        paths = f"export PYTHONPATH={path}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1"
        asked["setup"] = [*(self.setup or []), paths]
        folder = sweep / FOLDER
        executor = submitit.AutoExecutor(
            cluster="slurm", folder=str(folder / "%j"), slurm_max_num_timeout=self.max_num_timeout
        )
        executor.update_parameters(**{f"slurm_{name}": value for name, value in asked.items()})
        ids = _read_ids(sweep)
        for start in range(0, len(jobs), LONGEST_ARRAY):
            array = jobs[start : start + LONGEST_ARRAY]
            for job in array:
                change_state(job.folder, RunState.pending, None, (RunState.waiting,))
            try:
                started = executor.map_array(Task(), array)
            except (FailedJobError, RuntimeError) as error:
                for job in array:
                    change_state(job.folder, RunState.waiting, None, (RunState.pending,))
                last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
                raise ConfigError(
                    f"hydra/launcher=slurm cannot hand over jobs: {last[0]}"
                ) from error
            ids |= {job.name: task.job_id for job, task in zip(array, started, strict=True)}
            files.write_atomically(folder / IDS, json.dumps(ids, indent=1).encode())
        return ids


class Task:
    """What submitit calls with a job, on the node."""

    def __call__(self, job: Job) -> None:
        """Run the job. Ends the process with a status that is not 0 unless the run completed."""
        _join_tasks()
        run_elsewhere(job)
        if place().rank:
            return
        if recorded_state(job) is RunState.interrupted:
            _ask_why_stopped(job)
        if recorded_state(job) not in (RunState.completed, RunState.pruned):
            sys.exit(1)

    def checkpoint(self, job: Job) -> Any:
        """Return what submitit starts after the job was put back into the queue: the same."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, job)


def _join_tasks() -> None:
    """Say which of several tasks of this job this one is, as `torchrun` would."""
    given = os.environ
    tasks, nodes = (int(given.get(f"SLURM_{name}") or 1) for name in ("NTASKS", "NNODES"))
    if tasks > 1:
        port = PORTS[int(given["SLURM_JOB_ID"]) % len(PORTS)]
        # The job's script, and with it `srun`, is on the node of the first task.
        given |= {"MASTER_ADDR": given["SLURM_LAUNCH_NODE_IPADDR"], "MASTER_PORT": str(port)}
        given |= {"RANK": given["SLURM_PROCID"], "LOCAL_RANK": given["SLURM_LOCALID"]}
        given |= {"WORLD_SIZE": str(tasks), "LOCAL_WORLD_SIZE": str(tasks // nodes)}


def _ask_why_stopped(job: Job) -> None:
    """Find out what a SIGTERM meant, once the run has stored its state."""
    about: dict[str, str] = {}
    with contextlib.suppress(ConfigError):
        number = os.environ.get("SLURM_JOB_ID", "")
        about = dict(re.findall(r"(\w+)=(\S*)", _ask("scontrol", "show", "job", "-o", number)))
    restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    put_back = int(about.get("Restarts", 0)) > restarts
    in_grace = about.get("PreemptTime", "None") != "None" and about.get("Requeue") == "1"
    if put_back or in_grace:
        stopped = (RunState.interrupted,)
        change_state(job.folder, RunState.preempted, "Slurm starts it again", stopped)
    if in_grace and not put_back:
        # A job that ends by itself in its grace time would not be started again.
        requeue = signal.getsignal(signal.SIGUSR2)
        assert callable(requeue), "submitit listens"
        requeue(signal.SIGUSR2, None)


def _leaving(left: list[str], sweep: Path) -> Iterator[str]:
    """Give the numbers of jobs as Slurm lets go of them, until none is left."""
    began = time.monotonic()
    while left:
        try:
            queue = _queue(sweep)
            for number in [number for number in left if number not in queue]:
                left.remove(number)
                yield number
        except ConfigError as error:
            log.warning("%s: waiting until one does", error)
        if left:
            time.sleep(min(30.0, max(1.0, (time.monotonic() - began) / 20)))


def _end(job: Job, number: str) -> None:
    """See how a job ended that Slurm no longer holds, a little later where files are late."""
    until = time.monotonic() + LATE_S
    while (state := recorded_state(job)) in GOING and time.monotonic() < until:
        time.sleep(0.5)
        with contextlib.suppress(OSError):
            os.listdir(job.folder)  # makes a network file system look again
    if state in GOING:
        lost(job, "Slurm ended it without a record")
        printed = job.folder.parent / FOLDER
        log.error("job %s of Slurm ended without a record: see %s", number, printed)
    stopped = RunState.interrupted, "Slurm no longer holds it"
    change_state(job.folder, *stopped, (RunState.preempted,))


def _queue(sweep: Path) -> set[str]:
    """Return the numbers of the jobs in the queue, also running ones, that this sweep submitted.

    Numbers begin at 1 again when a cluster is set up again, so they alone would not do. Raises
    ConfigError where Slurm does not answer.
    """
    scripts = f"{os.path.realpath(sweep / FOLDER)}/"
    rows = [line.split(maxsplit=1) for line in _ask(*QUEUE).splitlines()]
    return {
        row[0] for row in rows if len(row) == 2 and os.path.realpath(row[1]).startswith(scripts)
    }


def _ask(*command: str) -> str:
    """Return what a command of Slurm's prints. Raises ConfigError where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        lines = str(getattr(error, "stderr", None) or "").strip().splitlines()
        reason = lines[-1] if lines else first_line(error)
        raise ConfigError(
            f"hydra/launcher=slurm: no Slurm answers here ({command[0]}: {reason})"
        ) from error
    return done.stdout


def _read_ids(sweep: Path) -> dict[str, str]:
    try:
        return json.loads((sweep / FOLDER / IDS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
