"""Jobs of a sweep in Slurm's queue: handed over by submitit, and found again.

A job has the settings with which it was submitted, and runs from a copy of the code (`snapshot`).
Its folder says `pending` from the moment it is submitted. The command that submitted it may end:
given again, it waits for the jobs that Slurm still holds and submits only the others. How a job
ended is in its record; one that left the queue without a record is lost.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus

from proglayer import files
from proglayer.console import console, counted
from proglayer.errors import ConfigError, first_line
from proglayer.launch.common import Launcher, SweepJob, folder_of, jobs_of, record_of
from proglayer.launch.snapshot import SUBMITTED, snapshot_code
from proglayer.run.record import ENDS, RunState, change_state

log = logging.getLogger(__name__)


# In the folder of what was submitted: each job's folder -> its number in Slurm.
IDS = "slurm.json"
# What a job of Slurm prints, as links in its folder.
OUTPUTS = {"stdout": "slurm.out", "stderr": "slurm.err"}
# Each job in the queue of this user: its number and its script.
QUEUE = ("squeue", "--noheader", "--array", "--me", "--format=%i %o")
# Slurm's MaxArraySize, unless it is set, is one more.
LONGEST_ARRAY = 1000
# A shared file system may show a job's last files a little after Slurm tells that it ended.
LATE_S = 10.0
NOT_TAKEN_BACK = "it was not put back into Slurm's queue"


@dataclass
class SlurmJob:
    """A job as submitit pickles it, and calls it on the node."""

    job: SweepJob

    @property
    def folder(self) -> Path:
        return self.job.folder

    def __call__(self) -> None:
        """Run the job. Ends the process with a status that is not 0 unless the run completed."""
        import submitit

        try:
            job = self.job.run_elsewhere(submitit.JobEnvironment().job_id)
        except KeyboardInterrupt:
            self._ask_why_stopped()
            sys.exit(1)
        if job.status is JobStatus.FAILED:
            change_state(self.folder, RunState.interrupted, NOT_TAKEN_BACK, (RunState.preempted,))
        _ = job.return_value  # raises what the run could not record
        if record_of(self.folder).state not in (RunState.completed, RunState.pruned):
            sys.exit(1)

    def checkpoint(self) -> Any:
        """What submitit starts after the job was put back into the queue: the same."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)

    def _ask_why_stopped(self) -> None:
        """Find out what a SIGTERM meant, once the run has stored its state."""
        number = os.environ.get("SLURM_JOB_ID", "")
        about: dict[str, str] = {}
        with contextlib.suppress(ConfigError):
            answer = _ask("scontrol", "show", "job", "--oneliner", number)
            about = dict(re.findall(r"(\w+)=(\S*)", answer))
        restarts = int(about.get("Restarts", 0))
        why = "Slurm starts it again"
        if restarts > int(os.environ.get("SLURM_RESTART_COUNT") or 0):
            change_state(self.folder, RunState.preempted, why, (RunState.interrupted,))
        elif about.get("PreemptTime", "None") != "None" and about.get("Requeue") == "1":
            # In its grace time. A job that ends by itself now would not be started again.
            change_state(self.folder, RunState.preempted, why, (RunState.interrupted,))
            requeue = signal.getsignal(signal.SIGUSR2)
            assert callable(requeue), "submitit listens"
            try:
                requeue(signal.SIGUSR2, None)
            except Exception:
                change_state(
                    self.folder, RunState.interrupted, NOT_TAKEN_BACK, (RunState.preempted,)
                )
                raise


def launch(launcher: Launcher) -> list[JobReturn]:
    """Hand over the jobs that Slurm does not hold already; wait for all. Gives their objectives.

    Raises ConfigError or StoreError where they cannot be handed over.
    """
    sweep = folder_of(launcher)
    jobs = {job.name: job for job in jobs_of(launcher)}
    held = in_queue(launcher)
    ids = {name: held[name] for name in jobs if name in held}
    new = [SlurmJob(job) for name, job in jobs.items() if name not in ids]
    say = console().print
    if ids:
        say(f"in Slurm's queue already: {counted(len(ids), 'job')}", markup=False)
    if new:
        ids |= _submit(launcher, sweep, new)
        say(f"handed over to Slurm: {counted(len(new), 'job')}", markup=False)
    command = shlex.join(["python", "-m", "proglayer.results", os.path.relpath(sweep), "--watch"])
    say(f"{command} follows them from any shell", markup=False)
    try:
        _wait(launcher, set(ids.values()))
    except KeyboardInterrupt:
        say("jobs go on in Slurm; the same command waits for them again", markup=False)
        raise
    until = time.monotonic() + LATE_S
    return [_ended(sweep / name, ids[name], until) for name in jobs]


def check() -> None:
    """Raise ConfigError where Slurm does not answer. Comes before anything is left for it."""
    _ask(*QUEUE)


def in_queue(launcher: Launcher) -> dict[str, str]:
    """Folder's name -> number in Slurm, of the jobs of this sweep that Slurm holds.

    Raises ConfigError where Slurm does not answer.
    """
    ids = _read_ids(folder_of(launcher))
    queue = _queue(launcher) if ids else set()
    return {name: number for name, number in ids.items() if number in queue}


def _submit(launcher: Launcher, sweep: Path, jobs: list[SlurmJob]) -> dict[str, str]:
    """Submit jobs, as arrays.

    Returns each one's number in Slurm. Raises ConfigError or StoreError.
    """
    from submitit.core.utils import FailedJobError

    code = snapshot_code(sweep / SUBMITTED)
    left = list(jobs)
    ids: dict[str, str] = {}
    try:
        executor = _executor(launcher, code)
        for task in jobs:
            change_state(task.folder, RunState.pending, "", (RunState.waiting,))
        while left:
            array = left[:LONGEST_ARRAY]
            with executor.batch():
                submitted = [executor.submit(task) for task in array]
            del left[:LONGEST_ARRAY]
            for task, job in zip(array, submitted, strict=True):
                ids[task.folder.name] = job.job_id
                _link_outputs(task.folder, job.paths)
            data = json.dumps(_read_ids(sweep) | ids, indent=1).encode()
            files.write_atomically(sweep / SUBMITTED / IDS, data)
    except (FailedJobError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"hydra/launcher=slurm cannot hand over jobs: {lines[-1]}") from error
    finally:
        for task in left:
            change_state(task.folder, RunState.waiting, "", (RunState.pending,))
    for task in jobs:
        log.info("#%d is job %s of Slurm", task.job.number, ids[task.folder.name])
    return ids


def _executor(launcher: Launcher, code: Path) -> Any:
    """submitit's, set to import from `code` and from nothing that lies where the job starts."""
    import submitit

    asked = dict(launcher.settings)
    asked["setup"] = [
        *(asked.get("setup") or []),
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export PYTHONSAFEPATH=1",
    ]
    executor = submitit.AutoExecutor(
        cluster="slurm",
        folder=asked.pop("submitit_folder"),
        slurm_max_num_timeout=asked.pop("max_num_timeout"),
    )
    executor.update_parameters(**{f"slurm_{name}": value for name, value in asked.items()})
    return executor


def _link_outputs(folder: Path, paths: Any) -> None:
    """Let a job's folder lead to what it prints, which Slurm keeps by number."""
    for name, link in OUTPUTS.items():
        with contextlib.suppress(OSError):
            (folder / link).unlink(missing_ok=True)
            (folder / link).symlink_to(os.path.relpath(getattr(paths, name), folder))


def _wait(launcher: Launcher, ids: set[str]) -> None:
    """Come back when Slurm holds none of these jobs any more."""
    began = time.monotonic()
    warned = False
    while True:
        try:
            if not ids & _queue(launcher):
                return
            warned = False
        except ConfigError as error:
            if not warned:
                log.warning("%s: waiting until one does", error)
            warned = True
        time.sleep(min(30.0, max(1.0, (time.monotonic() - began) / 20)))


def _queue(launcher: Launcher) -> set[str]:
    """The numbers of the jobs in the queue, also running ones, that this sweep's folder submitted.

    Numbers begin at 1 again when a cluster is set up again, so they alone would not do. Raises
    ConfigError where Slurm does not answer.
    """
    from submitit.core.utils import JobPaths

    answer = _ask(*QUEUE)
    scripts = JobPaths.get_first_id_independent_folder(launcher.settings["submitit_folder"])
    rows = [line.split(maxsplit=1) for line in answer.splitlines()]
    return {
        row[0]
        for row in rows
        if len(row) == 2 and os.path.realpath(row[1]).startswith(f"{os.path.realpath(scripts)}/")
    }


def _ask(*command: str) -> str:
    """What a command of Slurm's prints. Raises ConfigError where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        lines = str(getattr(error, "stderr", None) or "").strip().splitlines()
        reason = lines[-1] if lines else first_line(error)
        raise ConfigError(f"hydra/launcher=slurm: no Slurm answers here ({reason})") from error
    return done.stdout


def _ended(folder: Path, number: str, until: float) -> JobReturn:
    """How a job ended that Slurm no longer holds. Waits for a record `until` then at most."""
    job = JobReturn(status=JobStatus.COMPLETED)
    while (record := record_of(folder)).state not in ENDS and time.monotonic() < until:
        time.sleep(0.5)
        with contextlib.suppress(OSError):
            os.listdir(folder)  # makes a network file system look again
    if record.state not in ENDS:
        change_state(folder, RunState.lost, "Slurm ended it without a record")
        log.error("job %s of Slurm ended without a record: see %s", number, folder / "slurm.err")
        return job
    no_longer = "Slurm no longer holds it"
    change_state(folder, RunState.interrupted, no_longer, (RunState.preempted,))
    job.return_value = record.objective
    return job


def _read_ids(sweep: Path) -> dict[str, str]:
    try:
        return json.loads((sweep / SUBMITTED / IDS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
