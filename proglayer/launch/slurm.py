"""Jobs of a sweep in Slurm's queue: handed over by submitit, frozen as they are, found again.

What is ours of it. A job runs from a copy of the code and of `conf/` (`snapshot`). Its
folder says `pending` from the moment it is handed over. The command that handed it over may end:
given again, it waits for the jobs that Slurm still holds and hands over only the others. How a job
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
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from proglayer import files
from proglayer.config import ConfigError
from proglayer.console import console
from proglayer.errors import StoreError
from proglayer.launch.common import HydraLauncher, folder_name, freeze
from proglayer.store.record import (
    RESULT,
    SUBMITTED,
    SWEEP,
    RunRecord,
    RunState,
    amend_record,
    mark_lost,
    read_record,
    remove_heartbeat,
    remove_record,
    write_heartbeat,
)

log = logging.getLogger(__name__)


class SlurmLauncher(HydraLauncher, Protocol):
    """With `hydra.launcher`'s settings for submitit, by name."""

    params: dict[str, Any]


# In the folder of what was submitted: each job's folder -> its number in Slurm.
IDS = "slurm.json"
is_ids = files.begins_with(b'{"')
# What a job of Slurm prints, as links in its folder.
OUTPUTS = {"stdout": "slurm.out", "stderr": "slurm.err"}
# Slurm's MaxArraySize, unless it is set, is one more.
LONGEST_ARRAY = 1000
# A shared file system may show a job's last files a little after Slurm tells that it ended.
LATE_S = 10.0
NOT_TAKEN_BACK = "it was not put back into Slurm's queue"


@dataclass
class Task:
    """A job as submitit pickles it, and calls it on the node."""

    folder: Path
    overrides: list[str]
    number: int
    config: DictConfig
    context: HydraContext
    function: TaskFunction
    singletons: Any

    def __call__(self) -> None:
        """Run the job. Ends the process with a status that is not 0 unless the run completed."""
        import submitit

        Singleton.set_state(self.singletons)
        setup_globals()
        loader = self.context.config_loader
        config = loader.load_sweep_config(self.config, self.overrides)
        with open_dict(config.hydra.job):
            config.hydra.job.id = submitit.JobEnvironment().job_id
            config.hydra.job.num = self.number
        try:
            job = run_job(
                hydra_context=self.context,
                task_function=self.function,
                config=config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
        except KeyboardInterrupt:
            self._told_to_end()
            sys.exit(1)
        if job.status is JobStatus.FAILED:
            amend_record(self.folder, RunState.preempted, RunState.interrupted, NOT_TAKEN_BACK)
        _ = job.return_value  # raises what the run could not record
        record = read_record(self.folder)
        if record is None or record.status not in (RunState.completed, RunState.pruned):
            sys.exit(1)

    def checkpoint(self) -> Any:
        """What submitit starts after the job was put back into the queue: the same."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)

    def _told_to_end(self) -> None:
        """Find out what a SIGTERM meant, once the run has stored its state."""
        number = os.environ.get("SLURM_JOB_ID", "")
        told = _ask("scontrol", "show", "job", "--oneliner", number) or ""
        about = dict(re.findall(r"(\w+)=(\S*)", told))
        restarts = int(about.get("Restarts", 0))
        why = "Slurm starts it again"
        if restarts > int(os.environ.get("SLURM_RESTART_COUNT") or 0):
            amend_record(self.folder, RunState.interrupted, RunState.preempted, why)
        elif about.get("PreemptTime", "None") != "None" and about.get("Requeue") == "1":
            # In its grace time. A job that ends by itself now would not be started again.
            amend_record(self.folder, RunState.interrupted, RunState.preempted, why)
            requeue = signal.getsignal(signal.SIGUSR2)
            assert callable(requeue), "submitit listens"
            try:
                requeue(signal.SIGUSR2, None)
            except Exception:
                amend_record(self.folder, RunState.preempted, RunState.interrupted, NOT_TAKEN_BACK)
                raise


def launch(
    launcher: SlurmLauncher, job_overrides: Sequence[Sequence[str]], first_number: int
) -> list[JobReturn]:
    """Hand over the jobs that Slurm does not hold already; wait for all. Gives their objectives.

    Raises ConfigError where they cannot be handed over.
    """
    sweep = _sweep_folder(launcher)
    numbered = list(enumerate(job_overrides, first_number))
    names = [folder_name(launcher, overrides, number) for number, overrides in numbered]
    held = in_queue(launcher)
    ids = {name: held[name] for name in names if name in held}
    new = {n: job for n, job in zip(names, numbered, strict=True) if n not in ids}
    say = console().print
    if ids:
        say(f"in Slurm's queue already: {_jobs(len(ids))}", markup=False)
    if new:
        try:
            ids |= _hand_over(launcher, sweep, new)
        except StoreError as error:
            raise ConfigError(str(error)) from error
        say(f"handed over to Slurm: {_jobs(len(new))}", markup=False)
    command = shlex.join(["python", "-m", "proglayer.results", os.path.relpath(sweep), "--watch"])
    say(f"{command} follows them from any shell", markup=False)
    try:
        _wait(launcher, set(ids.values()))
    except KeyboardInterrupt:
        say("jobs go on in Slurm; the same command waits for them again", markup=False)
        raise
    until = time.monotonic() + LATE_S
    return [_ended(sweep / name, ids[name], until) for name in names]


def _jobs(number: int) -> str:
    return f"{number} job{'' if number == 1 else 's'}"


def in_queue(launcher: SlurmLauncher) -> dict[str, str]:
    """Folder's name -> number in Slurm, of the jobs of this sweep that Slurm holds.

    Raises ConfigError where Slurm does not answer.
    """
    ids = _read_ids(_sweep_folder(launcher))
    if not ids:
        return {}
    queue = _queue(launcher)
    if queue is None:
        raise ConfigError(
            "hydra/launcher=slurm cannot tell which jobs of this sweep are in the queue: squeue "
            "does not answer"
        )
    return {name: number for name, number in ids.items() if number in queue}


def _hand_over(
    launcher: SlurmLauncher, sweep: Path, jobs: dict[str, tuple[int, Sequence[str]]]
) -> dict[str, str]:
    """Submit jobs, as arrays. Gives each one's number in Slurm. Raises ConfigError, StoreError."""
    from submitit.core.utils import FailedJobError

    config, context, code = freeze(launcher, sweep / SUBMITTED)
    assert launcher.task_function is not None
    singletons = Singleton.get_state()
    tasks = [
        Task(
            sweep / name,
            list(overrides),
            number,
            config,
            context,
            launcher.task_function,
            singletons,
        )
        for name, (number, overrides) in jobs.items()
    ]
    old_records = {task.folder: _look(task.folder / RESULT) for task in tasks}
    left = list(tasks)
    ids: dict[str, str] = {}
    made: set[Path] = set()
    try:
        executor = _executor(launcher, code)
        for task in tasks:
            if not task.folder.exists():
                made.add(task.folder)
            task.folder.mkdir(parents=True, exist_ok=True)
            write_heartbeat(task.folder, RunState.pending)
        while left:
            array = left[:LONGEST_ARRAY]
            with executor.batch():
                submitted = [executor.submit(task) for task in array]
            del left[:LONGEST_ARRAY]
            for task, job in zip(array, submitted, strict=True):
                ids[task.folder.name] = job.job_id
                _link_outputs(task.folder, job.paths)
                # That of an earlier try: this one has not had the time to leave one.
                if old_records[task.folder] == _look(task.folder / RESULT):
                    remove_record(task.folder)
            data = json.dumps(_read_ids(sweep) | ids, indent=1).encode()
            files.write_atomically(sweep / SUBMITTED / IDS, data, SWEEP, is_ids)
    except (FailedJobError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"hydra/launcher=slurm cannot hand over jobs: {lines[-1]}") from error
    finally:
        for task in left:
            remove_heartbeat(task.folder)
            if task.folder in made:
                files.delete_if_empty(task.folder)
    for name, (number, overrides) in jobs.items():
        log.info(
            "job %s of Slurm, #%d: %s", ids[name], number, " ".join(filter_overrides(overrides))
        )
    return ids


def _executor(launcher: SlurmLauncher, code: Path) -> Any:
    """submitit's, told to import from `code` and from nothing that lies where the job starts."""
    import submitit
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf  # type: ignore

    asked = dict(launcher.params)
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
    of_every_cluster = {field.name for field in fields(BaseQueueConf)}
    executor.update_parameters(
        **{
            name if name in of_every_cluster else f"slurm_{name}": value
            for name, value in asked.items()
        }
    )
    return executor


def _link_outputs(folder: Path, paths: Any) -> None:
    """Let a job's folder lead to what it prints, which Slurm keeps by number."""
    for name, link in OUTPUTS.items():
        with contextlib.suppress(OSError):
            files.point_to(folder / link, os.path.relpath(getattr(paths, name), folder))


def _wait(launcher: SlurmLauncher, ids: set[str]) -> None:
    """Come back when Slurm holds none of these jobs any more."""
    began = time.monotonic()
    told = False
    while True:
        queue = _queue(launcher)
        if queue is None and not told:
            log.warning("squeue does not answer: waiting until it does")
        told = queue is None
        if queue is not None and not ids & queue:
            return
        time.sleep(min(30.0, max(1.0, (time.monotonic() - began) / 20)))


def _queue(launcher: SlurmLauncher) -> set[str] | None:
    """The numbers of the jobs in the queue, also running ones, that this sweep's folder submitted.

    Numbers begin anew when a cluster is set up anew, so they alone would not do. None where Slurm
    does not answer.
    """
    from submitit.core.utils import JobPaths

    answer = _ask("squeue", "--noheader", "--array", "--me", "--format=%i %o")
    if answer is None:
        return None
    scripts = JobPaths.get_first_id_independent_folder(launcher.params["submitit_folder"])
    rows = [line.split(maxsplit=1) for line in answer.splitlines()]
    return {
        row[0]
        for row in rows
        if len(row) == 2 and os.path.realpath(row[1]).startswith(f"{os.path.realpath(scripts)}/")
    }


def _ask(*command: str) -> str | None:
    """What a command of Slurm's prints; None where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _ended(folder: Path, number: str, until: float) -> JobReturn:
    """How a job ended that Slurm no longer holds. Waits for a record `until` then at most."""
    job = JobReturn(status=JobStatus.COMPLETED)
    job.return_value = None
    while (record := _record(folder)) is None and time.monotonic() < until:
        time.sleep(0.5)
    if record is None:
        mark_lost(folder, "Slurm ended it without a record")
        log.error("job %s of Slurm ended without a record: see %s", number, folder / "slurm.err")
        return job
    amend_record(folder, RunState.preempted, RunState.interrupted, "Slurm no longer holds it")
    job.return_value = record.objective
    return job


def _record(folder: Path) -> RunRecord | None:
    with contextlib.suppress(OSError, ValueError):
        os.listdir(folder)  # makes a network file system look again
        return read_record(folder)
    return None


def _sweep_folder(launcher: SlurmLauncher) -> Path:
    assert launcher.config is not None
    return Path(str(launcher.config.hydra.sweep.dir)).absolute()


def _read_ids(sweep: Path) -> dict[str, str]:
    try:
        return json.loads((sweep / SUBMITTED / IDS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _look(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino
