"""What the launchers of a sweep have in common, wherever their jobs run.

How many jobs there are at once, how many threads each has, and what a worker gets of a job: its
settings as they were composed when the sweep was checked. So no later edit of `conf/` reaches a job
that waits.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, cast, get_origin, get_type_hints

from hydra.core.singleton import Singleton
from hydra.core.utils import (
    JobReturn,
    JobStatus,
    configure_log,
    run_job,
    setup_globals,
)
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from pydantic import TypeAdapter, ValidationError

from proglayer.config import shortened
from proglayer.console import going_on_unread
from proglayer.errors import ConfigError, with_type
from proglayer.run.record import RecordError, RunRecord, RunState, read_record

if TYPE_CHECKING:
    from proglayer.config import Config
    from proglayer.data.corpus import Corpus
    from proglayer.training.plan import Phase

log = logging.getLogger(__name__)


def params_as_overrides(params: Mapping[str, Any] | None) -> list[str]:
    """`hydra.sweeper.params` as overrides. Raises ConfigError for a list, which is one value."""
    overrides = []
    for key, value in (params or {}).items():
        if OmegaConf.is_list(value):
            several = ",".join(map(str, value))
            raise ConfigError(
                f"hydra.sweeper.params: {key} is a list: several values are written as "
                f"'{several}' (one value that is a list: '[{several}]'), in quotes"
            )
        overrides.append(f"{key}={'null' if value is None else value}")
    return overrides


def check_settings(sweeper: object, schema: type) -> None:
    """Raise ConfigError for a setting that is not of the type and within the bounds that `schema`
    annotates it with.
    """
    for name, hint in get_type_hints(schema, include_extras=True).items():
        if get_origin(hint) is not Annotated:
            continue
        value = getattr(sweeper, name)
        try:
            TypeAdapter(hint).validate_python(value, strict=True)
        except ValidationError as error:
            said = error.errors()[0]["msg"].removeprefix("Input ")
            raise ConfigError(f"hydra.sweeper.{name}={shortened(value)} {said}") from None


# Compared by identity: the corpus holds arrays.
@dataclass(frozen=True, eq=False)
class Job:
    """One job of a sweep.

    folder: its name in the sweep's: its number and a short hash.
    launched: its overrides with those that a launcher gets on top, as they were checked.
    composed: its settings, pickled: 22 kB in place of 0.4 MB. So no later edit of `conf/` reaches
        a job that waits. Empty for a completed one.
    completed: whether its folder holds the record of a completed run with these settings.
    """

    number: int
    folder: str
    overrides: tuple[str, ...]
    launched: tuple[str, ...]
    composed: bytes
    config: Config
    corpus: Corpus
    phases: tuple[Phase, ...]
    completed: bool


def without_hydra(overrides: Sequence[str]) -> str:
    """The overrides that say what a job is, in one line."""
    return " ".join(o for o in overrides if not o.lstrip("+~").startswith("hydra"))


class Launcher(Protocol):
    """What a launcher of ours has once it is set up; `settings` are those of `hydra.launcher`."""

    settings: dict[str, Any]
    config: DictConfig
    hydra_context: HydraContext
    task_function: TaskFunction
    jobs: Sequence[Job]


@dataclass
class SweepJob:
    """A job of a sweep as a launcher hands it to a worker, pickled where that is a process of its
    own.

    config: its composed settings, pickled.
    singletons: Hydra's state in the process that launched it.
    """

    name: str
    number: int
    folder: Path
    config: bytes
    function: TaskFunction
    context: HydraContext
    singletons: Any

    def run(self, scheduler_id: str | None = None) -> JobReturn:
        """Run the job in this process.

        Returns how it ended, without its settings: 0.4 MB, which its folder holds. Raises
        KeyboardInterrupt where the job was stopped.
        """
        config = pickle.loads(self.config)
        with open_dict(config.hydra.job):
            config.hydra.job.id = scheduler_id or f"{config.hydra.job.name}_{self.number}"
        try:
            job = run_job(
                hydra_context=self.context,
                task_function=self.function,
                config=config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
        except Exception as error:  # of Hydra's, before or after the job itself
            job = JobReturn(status=JobStatus.FAILED)
            job.return_value = ConfigError(f"job {self.name}: {with_type(error)}")
        configure_log(config.hydra.hydra_logging, config.hydra.verbose)  # the job had its own
        job.cfg = job.hydra_cfg = None
        return job

    def run_elsewhere(self, scheduler_id: str | None = None) -> JobReturn:
        """As `run`, in a process that has not seen Hydra yet."""
        setup_globals()
        Singleton.set_state(self.singletons)
        return self.run(scheduler_id)


def folder_of(launcher: Launcher) -> Path:
    """The folder of the sweep, absolute."""
    return Path(launcher.config.hydra.sweep.dir).absolute()


def jobs_of(launcher: Launcher) -> Iterator[SweepJob]:
    """The jobs that a launcher is to run, one by one, each announced in the log."""
    # All that a job needs of it: the loader would compose settings from files as they are then.
    context = HydraContext(cast(Any, None), launcher.hydra_context.callbacks)
    common = launcher.task_function, context, Singleton.get_state()
    for job in launcher.jobs:
        log.info("#%d: %s", job.number, without_hydra(job.overrides))
        folder = folder_of(launcher) / job.folder
        yield SweepJob(job.folder, job.number, folder, job.composed, *common)


def launch(launcher: Launcher) -> list[JobReturn]:
    """Run the jobs one after another in this process."""
    return [job.run() for job in jobs_of(launcher)]


@contextlib.contextmanager
def unread(master: DictConfig) -> Iterator[None]:
    """Let a sweep, and Hydra's log of it, go on where nobody reads its output any more. A plan does
    not: nothing else comes of it.
    """
    if master.plan:
        yield
        return
    with going_on_unread():
        configure_log(master.hydra.hydra_logging, master.hydra.verbose)
        yield


def record_of(folder: Path) -> RunRecord:
    """Return the record of a job; that of one that waits if there is none that can be read."""
    with contextlib.suppress(RecordError):
        return read_record(folder)
    return RunRecord(state=RunState.waiting)


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def jobs_at_once(launcher: Mapping[str, Any]) -> int:
    """How many jobs a launcher with these settings runs at once on one machine, as far as it says.

    joblib's `n_jobs` counts back from the number of cores when it is negative. Raises ConfigError
    for 0.
    """
    given = launcher.get("n_jobs")
    jobs = 1 if given is None else given
    if not isinstance(jobs, int) or isinstance(jobs, bool) or jobs == 0:
        raise ConfigError(
            f"hydra.launcher.n_jobs={jobs} runs nothing: give a whole number from 1, or -1 for all "
            "cores"
        )
    return jobs if jobs > 0 else max(1, cores() + 1 + jobs)


def threads_per_job(launcher: Mapping[str, Any]) -> int | None:
    """The cores that a launcher with these settings gives to a job; None where it does not say.

    joblib's jobs share this machine's; Slurm and Ray are asked for a number of them.
    """
    of_ray = (launcher.get("ray") or {}).get("remote") or {}
    asked = launcher.get("cpus_per_task") or of_ray.get("num_cpus")
    if asked:
        try:
            return max(1, int(asked))
        except (TypeError, ValueError):
            raise ConfigError(
                f"hydra.launcher: a job cannot have {asked} cores: give a number (cpus_per_task, "
                "or ray.remote.num_cpus)"
            ) from None
    at_once = jobs_at_once(launcher)
    return max(1, cores() // at_once) if at_once > 1 else None
