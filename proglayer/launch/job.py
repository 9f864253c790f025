"""Between Hydra and a run: what train.py does with a job, and with errors on the way to one."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict, read_write

from proglayer.config import Config, OnError, flat_settings, to_config
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
from proglayer.files import LOCK, RUN_FILE, FolderInUse, sole_writer
from proglayer.launch.ask import check_arguments, in_one_line
from proglayer.launch.common import record_of, threads_per_job
from proglayer.launch.snapshot import changed_files
from proglayer.run.record import RunRecord, RunState, now, write_record

if TYPE_CHECKING:
    from proglayer.run.session import Prune

log = logging.getLogger(__name__)

# A worker whose parent was killed needs so long at most to store its state.
LOCK_WAIT_S = 20.0
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
    folder = Path(hydra.runtime.output_dir)
    # A relative path means the folder of the command, also with hydra.job.chdir=true.
    with contextlib.chdir(hydra.runtime.cwd):
        if hydra.mode is RunMode.MULTIRUN:
            return _run_in_sweep(settings, hydra, folder)
        with Beforehand.lock:
            try:
                return _run_alone(settings, hydra, folder)
            except (ConfigError, StoreError) as error:
                print_error(str(error))
                sys.exit(FAILED)
            finally:
                if not (folder / RUN_FILE).exists():
                    _leave_nothing(folder)


def _run_alone(settings: DictConfig, hydra: HydraConf, folder: Path) -> float | None:
    if Beforehand.refusal is not None:
        raise Beforehand.refusal
    config = _config(settings)
    if config.plan:
        _print_plan(config)
        return None
    record = _run(config, hydra, folder)
    if config.report:
        leave_report(folder)
    if record.state is RunState.failed:
        sys.exit(FAILED)
    return record.objective


def _run_in_sweep(settings: DictConfig, hydra: HydraConf, folder: Path) -> float | None:
    try:
        config = _config(settings)
        if config.on_error is OnError.stop and (name := failed_job(folder.parent)):
            record_unstarted(folder, RunState.interrupted, f"not started: job {name} failed")
            return None
        threads = config.threads or threads_per_job(hydra.launcher)
        config = config.model_copy(update={"threads": threads})
        prune = None
        if hydra.sweeper.get("pruner"):
            from proglayer.launch.study import pruning

            prune = pruning(hydra.sweeper, config.objective, hydra.job.num)
        with sole_writer(folder, "hydra.sweep.dir", LOCK_WAIT_S):
            record = _run(config, hydra, folder, prune)
    except FolderInUse as error:
        log.error("%s", error)  # whoever works there writes the record
        return None
    except (ConfigError, StoreError) as error:
        with contextlib.suppress(StoreError):
            record_unstarted(folder, RunState.failed, str(error))
        return None
    return record.objective


def _config(settings: DictConfig) -> Config:
    """The settings of a job, with the precision that `auto` is here. Raises ConfigError."""
    from proglayer.console import tell
    from proglayer.run.machine import with_precision

    config, picked = with_precision(to_config(settings))
    if picked:
        tell(picked)
    if changed := changed_files():
        log.warning(
            "changed since this job was submitted, which runs as it was submitted: %s",
            textwrap.shorten(", ".join(changed), 400, placeholder=" ..."),
        )
    return config


def _run(config: Config, hydra: HydraConf, folder: Path, prune: Prune | None = None) -> RunRecord:
    """Run a job. Raises KeyboardInterrupt where it was stopped; ConfigError or StoreError."""
    from proglayer.console import going_on_unread
    from proglayer.run.run import run

    choices = {
        group: str(choice)
        for group, choice in hydra.runtime.choices.items()
        if choice is not None and not group.startswith(("hydra", "local", "logger"))
    }
    with going_on_unread():
        record = run(config, folder, list(hydra.overrides.task), choices, prune)
    if record.state is RunState.interrupted:
        raise KeyboardInterrupt
    return record


def _check_other_run(folder: Path, config: Config) -> None:
    """Raise ConfigError where a folder holds what a run with other settings came to."""
    record = record_of(folder)
    if record.state is not RunState.completed or not record.config:
        return
    from proglayer.results import NOT_THE_EXPERIMENT
    from proglayer.run.machine import with_precision

    then = dict(flat_settings(record.config))
    now = dict(flat_settings(with_precision(config)[0].model_dump(mode="json")))
    compared = [name for name in now if name not in NOT_THE_EXPERIMENT]
    if other := [name for name in compared if then.get(name) != now[name]]:
        raise ConfigError(
            f"hydra.run.dir={folder} holds a completed run with other settings "
            f"({', '.join(other)}): choose another folder"
        )


def leave_report(folder: Path, *before: Path) -> None:
    """Write the report of a run or a sweep into its folder, and say where it is.

    `before` are folders of what belongs to it. Whatever goes wrong with the report is a
    line of the log: it changes nothing about the runs.
    """
    try:
        from proglayer.console import console
        from proglayer.report.page import write_report

        page = write_report([*before, folder], folder / "report")
        console().print(f"report: {page}", markup=False)
    except Exception as error:
        log.warning("no report could be written (%s)", with_type(error))


def _print_plan(config: Config) -> None:
    """Print a run's phases and what they cost."""
    from proglayer.console import tell
    from proglayer.data.corpus import open_corpus
    from proglayer.launch import stored
    from proglayer.training.plan import open_checkpoint, plan

    checkpoint = open_checkpoint(config)
    corpus = open_corpus(config.data, tell)
    phases = plan(config, corpus.vocab_size, checkpoint)
    stored.print_plan(config, corpus, phases, stored=stored.stored_here(config, corpus, phases))


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
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    if not {"run_job", "sweep"} & set(names):  # Hydra has not come to us yet
        return in_one_line(error)
    if isinstance(error, OSError):
        advice = "if results go there, choose hydra.run.dir, or hydra.sweep.dir in a sweep"
        return file_problem(error, advice)
    return None


def record_unstarted(folder: Path, status: RunState, reason: str) -> None:
    """Leave the record of a job that ended before its first phase, or that never said how."""
    log.error("%s", reason)
    ended = {"state": status, "reason": reason, "ended": now()}
    write_record(folder, record_of(folder).model_copy(update=ended))


def failed_job(sweep: Path) -> str | None:
    """Return the name of a job that failed since the sweep began, if one did."""
    jobs = (path.parent for path in sorted(sweep.glob(f"*/{RUN_FILE}")))
    return next((job.name for job in jobs if record_of(job).state is RunState.failed), None)


def _leave_nothing(folder: Path) -> None:
    """Take away what Hydra made for a run that was not started. What was there before stays."""
    for path in Beforehand.made - {folder}:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    if folder in Beforehand.made:
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()
            folder.rmdir()
