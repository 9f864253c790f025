"""A job: one run to be made, as plain data that any process can be given."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from proglayer import files
from proglayer.config import Config
from proglayer.console import say
from proglayer.errors import FAILED, StoreError, UserError, run_command, with_type
from proglayer.files import FolderKind
from proglayer.run import record as records
from proglayer.run import signals
from proglayer.run.environment import place
from proglayer.run.record import GitState, RunRecord, RunState

if TYPE_CHECKING:
    from proglayer.results import Results

log = logging.getLogger(__name__)

# A worker whose parent was killed needs so long at most to store its state.
LOCK_WAIT_S = 20.0
LOG = "train.log"
# What a record says until its job ends.
GOING = RunState.waiting, RunState.pending, RunState.running


@dataclass(frozen=True)
class Job:
    """One run to be made. Everything here can be pickled, and means the same in any process.

    folder: absolute, as `cwd` is, the folder that relative paths of the settings count from.
    overrides, choices: the command line and the group options that it was composed from.
    git: the state of the code that it was submitted with.
    prune: called with the record after each epoch by a search; returns why the run is to end.
    worker: the number of the process that runs it among those at work at once on its machine.
    """

    config: Config
    folder: Path
    overrides: tuple[str, ...]
    choices: Mapping[str, str]
    cwd: Path
    git: GitState | None = None
    prune: Callable[[RunRecord], str | None] | None = None
    worker: int = 0

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.name

    @property
    def asked(self) -> dict[str, Any]:
        """What its record says of its command."""
        overrides, choices = list(self.overrides), dict(self.choices)
        return {"overrides": overrides, "choices": choices, "git": self.git}


def submit(job: Job) -> None:
    """Write the record of a job that waits, with what fixes what it runs.

    Raises ConfigError for a folder that is not ours, and StoreError.
    """
    files.claim_folder(job.folder, FolderKind.run)
    settings = job.config.model_dump(mode="json")
    record = RunRecord(state=RunState.waiting, config=settings, **job.asked)
    records.write_record(job.folder, record)


def run_job(job: Job) -> RunState | None:
    """Run a job that was submitted in this process, or go on with it, and return how it stands.

    What goes wrong is in the record. One that another process is at work on is left to it.
    """
    try:
        if place().rank:
            return follow_job(job)
        with files.sole_writer(job.folder, FolderKind.run, LOCK_WAIT_S):
            return run_locked(job)
    except UserError as error:
        log.error("%s", error)
        return recorded_state(job)


def run_locked(job: Job) -> RunState:
    """Run a job whose folder this process has locked, and return how it ended.

    A run on several devices gets processes of its own, unless this is one of those already.

    Raises ConfigError where it cannot run here, and StoreError where it cannot be recorded.
    """
    from proglayer.run.machine import processes_of
    from proglayer.run.run import run

    try:
        with contextlib.chdir(job.cwd), log_of(job.folder):
            if (processes := processes_of(job.config)) > 1 and place().size == 1:
                return _run_apart(job, processes)
            _write_hydra(job)
            return run(job.config, job.folder, job.asked, job.prune, job.worker).state
    except UserError as error:
        with contextlib.suppress(StoreError):
            records.change_state(job.folder, RunState.failed, str(error))
        raise


def follow_job(job: Job) -> None:
    """Take part in a job of which this process is not the first, which alone shows and writes.

    Raises ConfigError where it cannot take part.
    """
    from proglayer.run.run import follow_run

    with contextlib.chdir(job.cwd), contextlib.redirect_stdout(io.StringIO()):
        follow_run(job.config, job.worker)


def _run_apart(job: Job, processes: int) -> RunState:
    """Run a job in so many processes, the death of one of which ends all; returns how it ended."""
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    stop = signals.Stop()

    def pass_on(number: int, frame: object, before: Any) -> None:
        stop.note(number, frame, before)
        # Python prints a traceback where SIGINT meets a process that is still at its imports.
        signals.signal_children(signal.SIGTERM)

    with signals.on_signals(pass_on):
        started = spawn(_run_member, (job, processes, port, os.getpid()), processes, join=False)
        assert started is not None, "it is not waited for"
        try:
            while not started.join():
                pass
        except (ProcessExitedException, ProcessRaisedException) as error:
            how = str(error).strip().splitlines()[-1]
            reason = f"a process of {processes} ended, and the others with it: {how}"
            ended = RunState.interrupted if stop.signal else RunState.lost
            # The first may have taken its end for the user's wish.
            stopped = () if stop.signal else (RunState.interrupted,)
            records.change_state(job.folder, ended, reason, (*GOING, *stopped))
            if stop.signal is None and getattr(error, "exit_code", None) != FAILED:
                log.error("%s; the same command goes on", reason)
        except KeyboardInterrupt:  # a second one
            signals.signal_children(signal.SIGKILL)
            raise
    state = recorded_state(job) or RunState.lost
    if stop.requeue is not None and state is RunState.interrupted:
        records.change_state(job.folder, RunState.preempted, None)
        stop.requeue()
    return state


def _run_member(rank: int, job: Job, processes: int, port: int, parent: int) -> None:
    """Be one of the processes of a job."""
    os.setsid()  # a terminal's Ctrl-C comes from the parent, once
    signals.follow_parent(parent)
    for number in signals.stop_signals():
        signal.signal(number, signals.end_unless_at_work)
    where = {"RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    where |= {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": processes}
    os.environ |= {name: str(value) for name, value in where.items()}
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # of a `torchrun` that started the command
    log_to_console()

    def work() -> None:
        follow_job(job) if rank else run_locked(job)

    status = run_command(work)
    signals.stopped.append(signal.SIGTERM)
    sys.exit(status)


def recorded_state(job: Job) -> RunState | None:
    """Return what the record of a job says where it stands, None if it has none."""
    record = records.record_of(job.folder)
    return record and record.state


def differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Name the first settings of an experiment that are not the same, with both values."""
    from proglayer.results.variants import identity

    before, after = identity(then), identity(now)
    others = (
        f"{name}={before.get(name)}, not {after.get(name)}"
        for name in before | after
        if before.get(name) != after.get(name)
    )
    return "; ".join([*others][:3])


def log_to_console() -> None:
    """Show warnings on standard error. Progress is shown otherwise; a run's log has everything."""
    shown = logging.StreamHandler(sys.stderr)
    shown.setLevel(logging.WARNING)
    shown.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[shown], force=True)


@contextlib.contextmanager
def log_of(folder: Path) -> Iterator[None]:
    """Keep the log of a run in its folder."""
    handler = logging.FileHandler(folder / LOG)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def _write_hydra(job: Job) -> None:
    """Leave what users of Hydra look for: the settings as they can be composed from again."""
    about = {
        "overrides": {"task": list(job.overrides)},
        "runtime": {"choices": dict(job.choices), "cwd": str(job.cwd)},
    }
    for name, content in {
        "config": job.config.model_dump(mode="json"),
        "overrides": list(job.overrides),
        "hydra": {"hydra": about},
    }.items():
        text = yaml.dump(content, Dumper=yaml.CSafeDumper, sort_keys=False, allow_unicode=True)
        files.write_atomically(job.folder / ".hydra" / f"{name}.yaml", text.encode())


def leave_report(folder: Path, results: Results) -> None:
    """Write the report of a run or a sweep into its folder, and say where it is.

    Whatever goes wrong with the report is a line of the log: it changes nothing about the runs.
    """
    try:
        from proglayer.report.page import report_of

        say(f"report: {report_of(results, folder / 'report')}")
    except Exception as error:
        log.warning("no report could be written (%s)", with_type(error))
