"""Between Hydra and a run: what train.py does with a job, and with errors on the way to one."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict, read_write

from proglayer import files
from proglayer.config import Config, OnError, to_config, to_plain
from proglayer.errors import (
    FAILED,
    ConfigError,
    StoreError,
    UserError,
    file_problem,
    print_error,
    run_command,
    with_type,
)
from proglayer.launch.common import FolderInUse, sole_writer, threads_per_job
from proglayer.launch.composing import COMPOSING_ERRORS, FILE_ERRORS, in_one_line
from proglayer.launch.composing import file_problem as settings_file_problem
from proglayer.launch.overrides import check_arguments
from proglayer.launch.snapshot import changed_files
from proglayer.store.record import (
    METRICS,
    RESULT,
    RecordError,
    RunRecord,
    RunState,
    failed_job,
    note_failed_job,
    read_record,
    write_record,
)

log = logging.getLogger(__name__)

# Settings that leave a run what it is.
NO_OTHER_RUN = (
    "threads",
    "device",
    "jobs_per_gpu",
    "on_error",
    "objective",
    "reuse",
    "report",
    "checkpoint_every_s",
    "logger",
    "stages",
)
# A worker whose parent was killed needs so long at most to store its state.
LOCK_WAIT_S = 20.0
# Functions of Hydra's in which settings are composed.
# Those that refuse options which do not go together.
RUNNERS = ("_run_hydra", "shell_completion")
COMPOSERS = ("compose_config", "load_sweep_config")
# Of files that changed while a job was waiting, so many are named.
MOST_NAMED = 8
# What lies in the folder `hydra.output_subdir` of a run.
WRITTEN_BY_HYDRA = r"(config|hydra|overrides)\.yaml"
# What is printed where there is no log: for a plan, and for a run that does not start.
NO_LOG = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"console": {"format": "%(levelname)s: %(message)s"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "console"}},
    "root": {"level": "WARNING", "handlers": ["console"]},
}


class Beforehand(Callback):
    """Decides whether a single run starts before Hydra makes anything for it.

    Hydra would write over the settings and go on with the log that another command keeps in the
    same folder; and a plan would need a folder that can be written.
    """

    # What was not there before, of what Hydra makes for the run.
    made: ClassVar[set[Path]] = set()
    refusal: ClassVar[ConfigError | None] = None
    # Held until the run has ended.
    lock: ClassVar[contextlib.ExitStack] = contextlib.ExitStack()

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Called by Hydra."""
        HydraConfig.instance().set_config(config)  # the folder's name may ask for parts of it
        folder = Path(config.hydra.run.dir).absolute()
        names = f"{config.hydra.job.name}.log", config.hydra.output_subdir
        paths = [folder, *(folder / name for name in names if name)]
        self.lock.close()
        self.made.clear()
        Beforehand.refusal = None
        try:
            new = [path for path in paths if not path.exists()]
            settings = to_config(config)
            if not settings.plan:
                folder.mkdir(parents=True, exist_ok=True)
                self.lock.enter_context(sole_writer(folder, "hydra.run.dir"))
                _check_other_run(folder, settings)
                self.made.update(new)
                return
        except ConfigError as error:
            Beforehand.refusal = error
        except OSError:  # Hydra comes upon the same
            return
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra.run.dir = "."
            config.hydra.output_subdir = None
            config.hydra.job_logging = NO_LOG


def run_job(settings: DictConfig) -> float | None:
    """Run or plan one job of Hydra's. Returns its objective, None where there is none.

    A single run that fails ends the process with status 1, an interrupted one with 130. In a
    sweep a failed job is in its record, and the sweep goes on.
    """
    hydra = HydraConfig.get()
    single = hydra.mode is not RunMode.MULTIRUN
    # A relative path means the folder of the command, also with hydra.job.chdir=true.
    with contextlib.chdir(hydra.runtime.cwd), Beforehand.lock:
        try:
            return _run_job(settings)
        except BaseException:
            folder = Path(hydra.runtime.output_dir)
            if single and not any((folder / name).exists() for name in (RESULT, METRICS)):
                _leave_nothing(folder)
            raise


def _run_job(settings: DictConfig) -> float | None:
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    single = hydra.mode is not RunMode.MULTIRUN
    if single and Beforehand.refusal is not None:
        print_error(str(Beforehand.refusal))
        sys.exit(FAILED)
    try:
        from proglayer.console import going_on_unread, tell
        from proglayer.run.machine import with_precision

        config, picked = with_precision(to_config(settings))
        if picked:
            tell(picked)
        _warn_of_changes()
        if config.plan:
            print_plan(config)
            return None
        if not single and config.on_error is OnError.stop and (name := failed_job(folder.parent)):
            record_unstarted(folder, RunState.interrupted, f"not started: job {name} failed")
            return None
        from proglayer.run.experiment import run

        threads = config.threads or (None if single else threads_per_job(hydra.launcher))
        config = replace(config, threads=threads)
        choices = {
            group: str(choice)
            for group, choice in hydra.runtime.choices.items()
            if choice is not None and not group.startswith(("hydra", "local", "logger"))
        }
        overrides = list(hydra.overrides.task)
        prune = None if single else _pruning(hydra.sweeper, config.objective, folder)
        # The folder of a single run is locked already.
        lock = (
            contextlib.nullcontext()
            if single
            else sole_writer(folder, "hydra.sweep.dir", LOCK_WAIT_S)
        )
        try:
            with lock, going_on_unread():
                outcome = run(config, folder, overrides, choices, prune)
        except FolderInUse as error:
            log.error("%s", error)  # whoever works there writes the record
            return None
    except (ConfigError, StoreError) as error:
        if single:
            print_error(str(error))
            sys.exit(FAILED)
        with contextlib.suppress(StoreError):
            record_unstarted(folder, RunState.failed, str(error))
        note_failed_job(folder)
        return None
    if outcome.status is RunState.interrupted:
        raise KeyboardInterrupt
    if single and config.report:
        leave_report(folder)
    if outcome.status is RunState.failed and single:
        sys.exit(FAILED)
    if outcome.status is RunState.failed:
        note_failed_job(folder)
    return outcome.objective


def _check_other_run(folder: Path, config: Config) -> None:
    """Raise ConfigError where a folder holds what a run with other settings came to."""
    with contextlib.suppress(RecordError):
        record = read_record(folder)
        if record is None or record.status is not RunState.completed or not record.config:
            return
        from proglayer.run.machine import with_precision

        plain = to_plain(with_precision(config)[0])
        compared = [name for name in plain if name not in NO_OTHER_RUN]
        if other := [name for name in compared if record.config.get(name) != plain[name]]:
            raise ConfigError(
                f"hydra.run.dir={folder} holds a completed run with other settings "
                f"({', '.join(other)}): choose another folder"
            )


def _pruning(sweeper: DictConfig, objective: str, folder: Path) -> Callable[..., str | None] | None:
    """What ends a trial of a search early; None for any other job."""
    number = folder.name.partition("_")[0]
    if not sweeper.get("pruner") or not number.isdecimal():
        return None
    from proglayer.launch.study import pruning

    return pruning(sweeper, objective, int(number))


def leave_report(folder: Path, *before: Path) -> None:
    """Write the report of a run or a sweep into its folder, and say where it is.

    `before` are folders of what belongs to it. Whatever goes wrong with the report is a
    line of the log: it changes nothing about the runs.
    """
    try:
        from proglayer.console import console
        from proglayer.report.write import write_report

        page = write_report([*before, folder], folder / "report", png=False)
        console().print(f"report: {page}", markup=False)
    except Exception as error:
        log.warning("no report could be written (%s)", with_type(error))


def print_plan(config: Config) -> None:
    """Print a run's phases and what they cost."""
    from proglayer.console import console, tell
    from proglayer.data.corpus import open_corpus
    from proglayer.launch.stored import StoredPlans
    from proglayer.run.progress import plan_table
    from proglayer.training.plan import check_checkpoint, plan
    from proglayer.training.unused import unused_settings

    check_checkpoint(config.model)
    corpus = open_corpus(config.data, tell)
    windows = len(corpus.train), len(corpus.validation)
    phases = plan(config, corpus.vocab_size)
    look = StoredPlans()
    stored = look.said(config, look.follow(config, corpus, phases))
    console().print(plan_table(phases, config.data.seq_len, *windows, "plan", stored))
    if unused := unused_settings(config, phases, corpus.vocab_size):
        tell(unused)


def train(main: Callable[[], Any]) -> int:
    """Run what Hydra made of train.py's `main` and return its exit status.

    With HYDRA_FULL_ERROR=1 in the environment every error is raised as it is.
    """

    def checked() -> int | None:
        try:
            os.getcwd()
        except FileNotFoundError:
            raise ConfigError("the folder of this command was deleted: change to another") from None
        sys.argv[1:] = check_arguments(sys.argv[1:])
        return main()

    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        return checked() or 0
    # Hydra prints errors its own way unless it is asked to raise them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        return run_command(checked, explain)
    finally:
        del os.environ["HYDRA_FULL_ERROR"]


def explain(error: Exception) -> str | None:
    """The lines for an error of composing, or of a file of the results; None for another."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, FILE_ERRORS):
        # Where no file of settings is to blame, it is a fault of ours.
        return in_one_line(error) if settings_file_problem(error) else None
    if isinstance(error, COMPOSING_ERRORS):
        return in_one_line(error)
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, ValueError) and names[-1] in RUNNERS:
        return str(error)
    if any(name in COMPOSERS for name in names):
        return f"the settings cannot be composed ({with_type(error)})"
    if isinstance(error, OSError):
        advice = "if results go there, choose hydra.run.dir, or hydra.sweep.dir in a sweep"
        return file_problem(error, advice)
    return None


def record_unstarted(folder: Path, status: RunState, reason: str) -> None:
    """Leave the record of a job that ended before its first phase, or that never said how."""
    log.error("%s", reason)
    ended = datetime.now(UTC).isoformat(timespec="seconds")
    write_record(folder, RunRecord(status=status, reason=reason, ended=ended))


def _warn_of_changes() -> None:
    """Name in a job's log the files of the code that were changed since it was submitted."""
    if changed := changed_files():
        more = f" and {len(changed) - MOST_NAMED} more files" if len(changed) > MOST_NAMED else ""
        log.warning(
            "changed since this job was submitted, which runs as it was submitted: %s%s",
            ", ".join(changed[:MOST_NAMED]),
            more,
        )


def _leave_nothing(folder: Path) -> None:
    """Take away what Hydra made for a run that was not started. What was there before stays."""
    for path in Beforehand.made - {folder}:
        if not files.delete_folder(path, files.named(WRITTEN_BY_HYDRA)):
            with contextlib.suppress(OSError):
                files.delete(path, files.named(r".*\.log"))
    if folder in Beforehand.made:
        files.delete_if_empty(folder)
