"""Between Hydra and a run: what train.py does with a job, and with errors on the way to one."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from proglayer import files
from proglayer.config import Config, OnError, from_plain, to_config
from proglayer.errors import DISK_FULL, ConfigError, StoreError, with_type
from proglayer.launch import snapshot
from proglayer.launch.common import threads_per_job
from proglayer.launch.composing import COMPOSING_ERRORS, FILE_ERRORS, file_problem, in_one_line
from proglayer.run.code import PACKAGE, git_state
from proglayer.store.record import (
    GitState,
    RunRecord,
    RunState,
    failed_job,
    note_failed_job,
    read_submission,
    write_record,
)

log = logging.getLogger(__name__)

FAILED = 1
INTERRUPTED = 130


# What a job of a sweep gives back that did no more than find another job at its next phase, and the
# variable that lets it.
DEFERRED = "deferred"
MAY_DEFER = "PROGLAYER_MAY_DEFER"
# Of files that changed while a job was waiting, so many are named.
MOST_NAMED = 8
# What lies in the folder `hydra.output_subdir` of a run.
WRITTEN_BY_HYDRA = r"(config|hydra|overrides)\.yaml"
# What was not there before the run that starts, of what Hydra makes for it.
_made: set[Path] = set()


class Beforehand(Callback):
    """Looks at what is there before Hydra makes anything for a run."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Called by Hydra."""
        HydraConfig.instance().set_config(config)  # the folder's name may ask for parts of it
        folder = Path(config.hydra.run.dir).absolute()
        names = f"{config.hydra.job.name}.log", config.hydra.output_subdir
        paths = [folder, *(folder / name for name in names if name)]
        _made.clear()
        _made.update(path for path in paths if not path.exists())


def run_job(settings: DictConfig) -> float | str | None:
    """Run or plan one job of Hydra's. Gives its objective, None where there is none, or DEFERRED.

    A single run that fails ends the process with status 1, an interrupted one with 130. In a
    sweep a failed job is in its record, and the sweep goes on.
    """
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    single = hydra.mode is not RunMode.MULTIRUN
    if single:
        from proglayer.versions import warn_of_unknown

        warn_of_unknown()
    try:
        config = to_config(settings) if single else _as_submitted(settings, folder)
        _tell_changes()
        if config.plan:
            print_plan(config)
            _leave_nothing(folder)
            return None
        if not single and config.on_error is OnError.stop and (name := failed_job(folder.parent)):
            record_unstarted(folder, RunState.interrupted, f"not started: job {name} failed")
            return None
        from proglayer.run.experiment import Deferred, run

        threads = config.threads or (None if single else threads_per_job(hydra.launcher))
        config = replace(config, threads=threads)
        choices = {
            group: str(choice)
            for group, choice in hydra.runtime.choices.items()
            if choice is not None and not group.startswith(("hydra", "local", "logger"))
        }
        overrides = list(hydra.overrides.task)
        may_wait = os.environ.get(MAY_DEFER) != "yes"
        try:
            outcome = run(config, folder, overrides, choices, may_wait=may_wait)
        except Deferred:
            return DEFERRED
    except (ConfigError, StoreError) as error:
        # A store that could not be written comes after the start: what the run left stays.
        if single and isinstance(error, ConfigError):
            _leave_nothing(folder)
        if single:
            fail(str(error).splitlines())
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


def leave_report(folder: Path, *before: Path) -> None:
    """Write the report of a run or a sweep into its folder, and say where it is.

    `before` are folders of what belongs to it. Whatever goes wrong with the report is told in a
    line of the log: it changes nothing about the runs.
    """
    try:
        from proglayer.console import console
        from proglayer.report.write import write_report

        folders = [*before, folder]
        page = write_report(folders, folder / "report", png=False, overwrite=False)
        console().print(f"report: {page}", markup=False)
    except Exception as error:
        log.warning("no report could be written (%s)", with_type(error))


def print_plan(config: Config) -> None:
    """Print a run's phases and what they cost."""
    from proglayer.console import console, tell
    from proglayer.data.corpus import open_corpus
    from proglayer.run.progress import plan_table
    from proglayer.training.plan import plan

    corpus = open_corpus(config.data, tell)
    windows = len(corpus.train), len(corpus.validation)
    phases = plan(config, corpus.vocab_size)
    console().print(plan_table(phases, config.data.seq_len, *windows, "plan"))


@contextlib.contextmanager
def explain_errors() -> Iterator[None]:
    """Turn errors that a user can cure into plain lines on stderr and an exit status of 1.

    With HYDRA_FULL_ERROR=1 in the environment everything is raised as it is.
    """
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        yield
        return
    # Hydra prints errors its own way unless it is asked to raise them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    except ConfigError as error:
        fail(str(error).splitlines())
    except COMPOSING_ERRORS as error:
        if isinstance(error, FILE_ERRORS) and file_problem(error) is None:
            raise  # no file of settings is to blame: it is a fault of ours
        fail([in_one_line(error)])
    except OSError as error:
        place = "choose another folder with hydra.run.dir, or hydra.sweep.dir in a sweep"
        if error.errno in DISK_FULL:
            where = error.filename or "the folder of results"
            fail([f"no space left to write {where}: make room, or {place}"])
        if error.filename is None:
            raise
        fail(
            [
                f"cannot read or write {error.filename} ({error.strerror}): if results go there, "
                f"{place}"
            ]
        )
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    finally:
        del os.environ["HYDRA_FULL_ERROR"]


def fail(lines: list[str]) -> NoReturn:
    """Print each line as an error and end the process."""
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    sys.exit(FAILED)


def record_unstarted(folder: Path, status: RunState, reason: str) -> None:
    """Leave the record of a job that ended before its first phase, or that never told how."""
    log.error("%s", reason)
    ended = datetime.now(UTC).isoformat(timespec="seconds")
    write_record(folder, RunRecord(status=status, reason=reason, ended=ended))


def _as_submitted(settings: DictConfig, folder: Path) -> Config:
    """The settings of a sweep's job: those that it was submitted with, where they were kept."""
    try:
        submission = read_submission(folder)
    except ValueError as error:
        raise ConfigError(f"what was submitted for {folder.name} cannot be read: {error}") from None
    if submission is None:
        return to_config(settings)
    try:
        config = from_plain(submission.config)
    except KeyError as error:
        raise ConfigError(
            f"{folder.name} was submitted without the setting {error}, by another version of the "
            "code: submit it again"
        ) from None
    if _composed(settings) != config:
        log.warning("conf/ was changed since this job was submitted: it runs as submitted")
    before, now = submission.git, git_state()
    if before and now and before != now:
        log.warning(
            "the code was changed since this job was submitted: %s then, %s now",
            _code(before),
            _code(now),
        )
    return config


def _tell_changes() -> None:
    """Say in the log of a job what became of the files that it has as copies: the code and the
    settings, or, in a worker of this machine, the settings alone.
    """
    changed = snapshot.changes()
    if not changed:
        sources = HydraConfig.get().runtime.config_sources
        folders = {Path(each.path).parent for each in sources if each.schema == "file"}
        copies = [folder / PACKAGE.name for folder in sorted(folders)]
        changed = [name for copy in copies for name in snapshot.changes(copy, code=False)]
    if changed:
        more = f" and {len(changed) - MOST_NAMED} more files" if len(changed) > MOST_NAMED else ""
        log.warning(
            "changed since this job was submitted, which runs as it was submitted: %s%s",
            ", ".join(changed[:MOST_NAMED]),
            more,
        )


def _composed(settings: DictConfig) -> Config | None:
    with contextlib.suppress(ConfigError):
        return to_config(settings)
    return None


def _code(git: GitState) -> str:
    return (git.commit or "")[:12] + (f" with changes {git.difference}" if git.changed else "")


def _leave_nothing(folder: Path) -> None:
    """Take away what Hydra made for a run that was not started. What was there before stays."""
    for path in _made - {folder}:
        if not files.delete_folder(path, files.named(WRITTEN_BY_HYDRA)):
            with contextlib.suppress(OSError):
                files.delete(path, files.named(r".*\.log"))
    if folder in _made:
        files.delete_if_empty(folder)
