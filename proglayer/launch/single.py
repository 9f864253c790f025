"""A command without -m: one run. Nothing is written before it is checked."""

from __future__ import annotations

from proglayer import files
from proglayer.errors import FAILED, ConfigError
from proglayer.files import FolderKind
from proglayer.launch.compose import Command
from proglayer.launch.job import (
    LOCK_WAIT_S,
    Job,
    differing,
    follow_job,
    leave_report,
    log_of,
    run_locked,
    submit,
)
from proglayer.launch.planned import planned, print_plan
from proglayer.run.environment import place
from proglayer.run.record import RunState, record_of, same_settings


def run(command: Command) -> int:
    """Run or plan one job and return the exit status.

    Raises ConfigError and StoreError, and KeyboardInterrupt where the run was interrupted.
    """
    from proglayer.results import load
    from proglayer.run import machine

    job = command.job(command.folder("run"))
    if job.config.plan:
        print_plan(planned(job, {}))
        return 0
    if place().rank:
        follow_job(job)
        return 0
    machine.pick_device(job.config.device, job.config.precision)
    # Several processes of a command that was killed need a moment to store their state.
    wait_s = LOCK_WAIT_S if machine.processes_of(job.config) > 1 else 0.0
    check_other_run(job)
    planned(job, {})
    with files.sole_writer(job.folder, FolderKind.run, wait_s):
        submit(job)
        state = run_locked(job)
        if state is RunState.interrupted:
            raise KeyboardInterrupt
        if job.config.report:
            with log_of(job.folder):
                leave_report(job.folder, load(job.folder))
    return 0 if state is RunState.completed else FAILED


def check_other_run(job: Job) -> None:
    """Raise ConfigError where a folder holds a completed run with other settings."""
    record = record_of(job.folder)
    if record is None or record.state is not RunState.completed:
        return
    others = differing(record.config or {}, job.config.model_dump(mode="json"))
    if others and not same_settings(record, job.config):
        raise ConfigError(
            f"hydra.run.dir={job.folder} holds a completed run with {others}: choose another folder"
        )
