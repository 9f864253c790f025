"""A job: one run to be made, as plain data that any process can be given. Here Hydra ends."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from proglayer import files
from proglayer.config import Config, Precision, flat_settings, to_config
from proglayer.console import console, tell
from proglayer.errors import ConfigError, StoreError, UserError, with_type
from proglayer.files import FolderInUse, FolderKind
from proglayer.launch.ask import in_one_line
from proglayer.run.record import (
    GitState,
    RecordError,
    RunRecord,
    RunState,
    change_state,
    read_record,
    write_record,
)

log = logging.getLogger(__name__)

# A worker whose parent was killed needs so long at most to store its state.
LOCK_WAIT_S = 20.0
LOG = "train.log"


@dataclass(frozen=True)
class Job:
    """One run to be made. Everything here can be pickled, and means the same in any process.

    folder: absolute, as `cwd` is, the folder that relative paths of the settings count from.
    overrides, choices: the command line and the group options that it was composed from.
    source: the package that it was submitted with, and a digest of its files then.
    prune: called with each row of `metrics.csv` by a search; returns why the run is to end.
    worker: the number of the process that runs it among those at work at once on its machine.
    """

    config: Config
    folder: Path
    overrides: tuple[str, ...]
    choices: Mapping[str, str]
    cwd: Path
    git: GitState | None = None
    source: tuple[Path, str] | None = None
    prune: Callable[[dict[str, Any]], str | None] | None = None
    worker: int = 0

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.name

    @property
    def waiting(self) -> RunRecord:
        """The record of the job before it starts."""
        return RunRecord(
            state=RunState.waiting,
            overrides=list(self.overrides),
            choices=dict(self.choices),
            config=self.config.model_dump(mode="json"),
            git=self.git,
        )


def run_job(job: Job) -> RunRecord:
    """Run a job in this process, or go on with it, and return its record.

    What goes wrong is in the record. One that another process is at work on is left to it.
    """
    try:
        with files.sole_writer(job.folder, FolderKind.run.setting, LOCK_WAIT_S):
            return run_locked(job)
    except UserError as error:
        log.error("%s", error)
        if not isinstance(error, FolderInUse):
            fail(job, error)
        return record_of(job.folder) or job.waiting


def fail(job: Job, error: UserError) -> None:
    """Record that a job failed without having begun, if that can be written."""
    with contextlib.suppress(StoreError):
        change_state(job.folder, RunState.failed, str(error))


def run_locked(job: Job) -> RunRecord:
    """Run a job whose folder this process has locked, and return its record.

    Raises ConfigError where it cannot run here, and StoreError where it cannot be recorded.
    """
    from proglayer.launch.snapshot import digest
    from proglayer.run.machine import with_precision
    from proglayer.run.run import run

    with contextlib.chdir(job.cwd), log_of(job.folder):
        _write_hydra(job)
        if job.source is not None and digest(job.source[0]) != job.source[1]:
            log.warning(
                "the code in %s changed since this job was submitted, which runs as it was "
                "submitted",
                job.source[0],
            )
        config, picked = with_precision(job.config)
        if picked:
            tell(picked)
        given = list(job.overrides), dict(job.choices)
        return run(config, job.folder, *given, job.prune, job.git, job.worker)


def submit(job: Job) -> None:
    """Write the record of a job that waits, with what fixes what it runs.

    Raises ConfigError for a folder that is not ours, and StoreError.
    """
    files.claim_folder(job.folder, FolderKind.run)
    write_record(job.folder, job.waiting)


def record_of(folder: Path) -> RunRecord | None:
    """Return the record of a job, None if it has none that can be read."""
    with contextlib.suppress(RecordError):
        return read_record(folder)
    return None


def same_settings(record: RunRecord, config: Config) -> bool:
    """Whether a record is of these settings: of `precision=auto`, whatever that picked."""
    asked = config.model_dump(mode="json")
    then = dict(record.config or {})
    if config.precision is Precision.auto:
        then["precision"] = asked["precision"]
    return then == asked


def log_to_console(level: int = logging.INFO) -> None:
    """Show warnings on standard error. Progress is shown otherwise; a run's log has everything."""
    shown = logging.StreamHandler(sys.stderr)
    shown.setLevel(logging.WARNING)
    form = "%(levelname)s: %(message)s"
    logging.basicConfig(level=level, format=form, handlers=[shown], force=True)


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


def leave_report(folder: Path) -> None:
    """Write the report of a run or a sweep into its folder, and say where it is.

    Whatever goes wrong with the report is a line of the log: it changes nothing about the runs.
    """
    try:
        from proglayer.report.page import write_report

        page = write_report([folder], folder / "report")
        console().print(f"report: {page}", markup=False)
    except Exception as error:
        log.warning("no report could be written (%s)", with_type(error))


class Command:
    """What Hydra made of a command line. Composes its jobs, the only place that does.

    master: the settings without those that are swept over.
    arguments: the overrides, those of Hydra itself left out.
    """

    def __init__(self, master: DictConfig, loader: ConfigLoader, arguments: Sequence[str]) -> None:
        self.master = master
        self.loader = loader
        # A study says what is swept over; its jobs are none of it.
        self.arguments = tuple(text for text in arguments if not text.startswith("study="))
        self.cwd = Path.cwd()
        # `${hydra:...}` looks there; set_config would forbid later changes of it.
        HydraConfig.instance().cfg = master  # pyright: ignore[reportAttributeAccessIssue]
        self.sweeper = self._plain("sweeper")
        self.launcher = self._plain("launcher")
        self.git: GitState | None = None
        self.threads: int | None = None  # of a job that does not say

    def folder(self, of: str, name: str | None = None) -> Path:
        """Return the folder of the `run` or the `sweep`, absolute.

        name: what it is called where the command line does not say, so that the same command finds
            it again.
        """
        folder = Path(self.master.hydra[of].dir).absolute()
        return folder if name is None or self.given(f"hydra.{of}.dir=") else folder.with_name(name)

    def given(self, beginning: str) -> bool:
        """Whether an override of Hydra's begins so."""
        return any(str(text).startswith(beginning) for text in self.master.hydra.overrides.hydra)

    def _plain(self, part: str) -> dict[str, Any]:
        plain: Any = OmegaConf.to_container(self.master.hydra[part], resolve=True)
        return {name: value for name, value in plain.items() if not name.startswith("_")}

    def job(
        self, folder: Path, overrides: tuple[str, ...] | None = None, number: int | None = None
    ) -> Job:
        """Compose the job of these overrides; without them, that of the command itself.

        Raises ConfigError.
        """
        try:
            composed = self.master
            if overrides is not None:
                launched = [*overrides, f"hydra.job.num={number}"]
                composed = self.loader.load_sweep_config(self.master, launched)
            with read_write(composed), open_dict(composed):
                composed.hydra.runtime.output_dir = str(folder)
            config = to_config(composed)
        except Exception as error:
            raise ConfigError(in_one_line(error)) from error
        if config.threads is None and self.threads is not None:
            config = config.model_copy(update={"threads": self.threads})
        return Job(
            config=config,
            folder=folder,
            overrides=self.arguments if overrides is None else overrides,
            choices={
                group: str(choice)
                for group, choice in composed.hydra.runtime.choices.items()
                if choice is not None
                and not group.startswith(("hydra", "local", "logger", "study"))
            },
            cwd=self.cwd,
            git=self.git,
        )


def identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that make an experiment, by dotted names: where and how is left out."""
    from proglayer.results import NOT_THE_EXPERIMENT

    return {name: v for name, v in flat_settings(settings) if name not in NOT_THE_EXPERIMENT}


def differing(then: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[str]:
    """Name the settings of an experiment that are not the same, with both values."""
    before, after = identity(then or {}), identity(now)
    return [
        f"{name}={before.get(name)}, not {after.get(name)}"
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    ]
