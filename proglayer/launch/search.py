"""A search by Optuna: its trials are jobs like those of any sweep.

Hydra's plugin reads the settings and what is to be searched. What is asked of the study, launched
and told to it is done here, so that a trial is checked and submitted as a sweep's job is, one that
cannot work is a failed trial, and one that was stopped goes on when the command is given again.
"""

from __future__ import annotations

import contextlib
import functools
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import ValidationError

from proglayer import files
from proglayer.config import OnError, short_hash
from proglayer.console import console
from proglayer.errors import ConfigError, first_line
from proglayer.launch.common import threads_per_job
from proglayer.launch.composing import in_one_line
from proglayer.launch.job import leave_report, record_unstarted
from proglayer.launch.sweep import (
    Checks,
    Job,
    job_folder,
    launch,
    list_jobs,
    open_folder,
    summarize,
    without_held,
    without_hydra,
)
from proglayer.store.record import (
    JOBS,
    SWEEP,
    Heartbeat,
    ListedJob,
    RunState,
    read_heartbeat,
    read_jobs,
    read_record,
    write_jobs,
)

if TYPE_CHECKING:
    import optuna
    from hydra_plugins.hydra_optuna_sweeper._impl import OptunaSweeperImpl

SQLITE = "sqlite:///"
# The attribute of a study that lists the folders its trials are in.
FOLDERS = "proglayer:folders"


def search(sweeper: OptunaSweeperImpl, arguments: Sequence[str]) -> None:
    """Bring a study to `n_trials` trials that ended, and print the command line of the best.

    Raises ConfigError for settings that no trial can work with, and where all trials failed.
    """
    from proglayer.versions import warn_of_unknown

    warn_of_unknown()
    master = sweeper.config
    assert master is not None
    if master.plan:
        raise ConfigError("plan=true shows jobs before they run: a search chooses them as it goes")
    given = _with_params(sweeper._parse_sweeper_params_config(), arguments)
    name = sweeper.study_name or f"proglayer_{short_hash(without_hydra(sorted(given)))}"
    storage = str(sweeper.storage or "")
    with _alone(storage, name) as alone:
        trials = Trials(sweeper, given, name, alone)
        folders = trials.folders()
        stopped = False
        try:
            if trials.to_go > 0:
                with Heartbeat(folders[-1]):
                    while trials.to_go > 0:
                        trials.run(min(trials.to_go, sweeper.n_jobs))
        except KeyboardInterrupt:
            stopped = True
            raise
        finally:
            for folder in folders:
                list_what_began(folder)
            if folders:
                summarize(*folders)
            if folders and master.report and not stopped:
                leave_report(folders[-1], *folders[:-1])
            best = trials.best
            if best is not None:
                threads = threads_per_job(master.hydra.launcher)
                print(f"best of the study, {best.value:.6g} in trial {best.number}:")
                print(best_command(given, best.params, threads))
    if best is None:
        raise ConfigError("every trial failed, for the reasons above")
    if folders:
        found = {"name": "optuna", "best_params": best.params, "best_value": best.value}
        text = OmegaConf.to_yaml(OmegaConf.create(found)).encode()
        best_file = folders[-1] / "optimization_results.yaml"
        files.write_over(best_file, text, files.begins_with(b"name: optuna"), SWEEP)


def _with_params(params: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """The overrides in hydra.sweeper.params that the command line does not replace, then its own.

    A choice that is named twice would be refused in the command of the best trial.
    """
    parse = OverridesParser.create().parse_overrides
    named = {override.get_key_element() for override in parse(list(arguments))}
    kept = [o.input_line or "" for o in parse(list(params)) if o.get_key_element() not in named]
    return [*kept, *arguments]


class Trials:
    """The trials of a study: those that there are, and those that are still to be run.

    given: the overrides of the search; what is said last of a setting holds.
    alone: whether no other command can be at work on it, so that a trial that has not ended is one
        that was stopped.
    """

    def __init__(
        self, sweeper: OptunaSweeperImpl, given: Sequence[str], name: str, alone: bool
    ) -> None:
        import optuna
        from hydra_plugins.hydra_optuna_sweeper._impl import create_params_from_overrides
        from sqlalchemy.exc import SQLAlchemyError

        sweeper._process_searchspace_config()
        self._searched = dict(sweeper.search_space_distributions or {})
        self._fixed: dict[str, Any] = {}
        for override in given:
            # One at a time, since what is said last of a setting holds.
            for key, values in (parsed := create_params_from_overrides([override]))[0].items():
                self._fixed.pop(key, None)
                self._searched[key] = values
            for key, value in parsed[1].items():
                self._searched.pop(key, None)
                self._fixed[key] = value
        if not self._searched and not sweeper.custom_search_space_extender:
            raise ConfigError(
                "hydra/sweeper=optuna has nothing to search: give a setting several values, "
                "such as 'lr.base=tag(log,interval(1e-4,1e-2))'"
            )
        sampler, self._most = sweeper.sampler, sweeper.n_trials
        if isinstance(sampler, functools.partial):  # of a grid, which has to know its points
            try:
                grid = {k: sweeper._to_grid_sampler_choices(v) for k, v in self._searched.items()}
                sampler = sampler(grid)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"hydra/sweeper/sampler=grid: {error}") from error
            self._most = min(self._most, math.prod(len(values) for values in grid.values()))
        directions = sweeper._get_directions()
        if len(directions) != 1:
            raise ConfigError(f"hydra.sweeper.direction={directions}: `objective` is one number")
        try:
            self._study = optuna.create_study(
                storage=sweeper.storage,
                study_name=name,
                sampler=sampler,
                direction=directions[0],
                load_if_exists=True,
            )
        except (SQLAlchemyError, ImportError) as error:
            place = f"hydra.sweeper.storage={sweeper.storage}"
            raise ConfigError(f"{place}: {first_line(error)}") from error
        # A grid that is complete stops its study, by a method that refuses outside of `optimize`.
        self._study.stop = lambda: None
        if trials := self._study.get_trials(deepcopy=False):
            # The same seed would begin the same row of draws again.
            sampler.reseed_rng()
        running = optuna.trial.TrialState.RUNNING
        self._stopped = [trial for trial in trials if alone and trial.state is running]
        assert sweeper.config is not None
        self._master = sweeper.config
        self._folder = Path(sweeper.config.hydra.sweep.dir)
        self._sweeper = sweeper
        self._checks = Checks(sweeper)
        # Of an earlier command with the same folder too: of a trial that failed before it began,
        # nothing else says what it was.
        self._listed: dict[str, Sequence[str]] = {
            job.folder: job.overrides for job in listed_and_begun(self._folder)
        }
        console().print(
            f"study {name} in {sweeper.storage or 'memory'}: {self._ended} of {self._most} trials "
            f"ended before{f', {len(self._stopped)} to go on with' if self._stopped else ''}",
            markup=False,
        )

    @property
    def to_go(self) -> int:
        """How many trials are to be run, so that there are as many as the settings say."""
        return self._most - self._ended

    @property
    def best(self) -> Any:
        """The best trial of Optuna's, None where none completed."""
        completed = self._study.get_trials(deepcopy=False)
        if not any(trial.state.name == "COMPLETE" for trial in completed):
            return None
        return self._study.best_trial

    @property
    def _ended(self) -> int:
        return sum(trial.state.is_finished() for trial in self._study.get_trials(deepcopy=False))

    def folders(self) -> list[Path]:
        """The folders that hold trials; where some are to be run, the last is for these."""
        known = self._study.user_attrs.get(FOLDERS, [])
        if self.to_go > 0:
            open_folder(self._master)
            known = [*known, str(self._folder.resolve())]
            self._study.set_user_attr(FOLDERS, list(dict.fromkeys(known)))
        folders = [Path(folder) for folder in dict.fromkeys(known)]
        return [folder for folder in folders if folder.is_dir()]

    def run(self, count: int) -> None:
        """Run `count` trials at once and tell the study how each ended.

        Raises ConfigError where too many failed, none can be composed, or the launcher gave up.
        What ends this from outside leaves those that did not end running in the study: the next
        command takes them up.
        """
        import optuna

        fail = optuna.trial.TrialState.FAIL
        asked = [self._next() for _ in range(count)]
        try:
            jobs = self._jobs(asked)
        except (ConfigError, HydraException):
            for trial in asked:
                self._study.tell(trial, state=fail)
            raise
        try:
            launch(self._sweeper, [job for job in jobs if job])
        except ConfigError:
            # A trial whose process was killed would be killed again by the next command, for ever.
            # Those that did not come to an end go on then.
            for trial, job in zip(asked, jobs, strict=True):
                if job is None or _has_ended(self._folder / job.folder):
                    self._tell(trial, job)
            raise
        failed = sum(self._tell(trial, job) is None for trial, job in zip(asked, jobs, strict=True))
        rate = self._sweeper.max_failure_rate
        if failed / count > rate:
            allowed = f"hydra.sweeper.max_failure_rate={rate}"
            raise ConfigError(f"{failed} of {count} trials failed, more than {allowed} lets pass")
        if failed and self._master.on_error is OnError.stop:
            raise ConfigError("a trial failed, and on_error=stop: the same command goes on")

    def _tell(self, trial: optuna.trial.Trial, job: Job | None) -> float | None:
        """Tell the study what a trial came to, and give it; None for a failed one."""
        import optuna

        value = _objective(self._folder / job.folder) if job else None
        if value is None:
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(trial, value)
        return value

    def _next(self) -> optuna.trial.Trial:
        """A trial that was stopped, with the values that it has, or else a new one."""
        import optuna

        if not self._stopped:
            return self._study.ask()
        frozen = self._stopped.pop(0)
        sampler = self._study.sampler
        if self._searched.keys() <= frozen.params.keys():
            # A trial asks its sampler for values when it is made, and a grid would move on.
            self._study.sampler = optuna.samplers.RandomSampler()
        try:
            return optuna.trial.Trial(self._study, frozen._trial_id)
        finally:
            self._study.sampler = sampler

    def _jobs(self, asked: Sequence[optuna.trial.Trial]) -> list[Job | None]:
        """The jobs of trials, checked and announced; None for one whose settings cannot work.

        Raises ConfigError or HydraException where no trial of this search could.
        """
        try:
            given = self._sweeper._configure_trials(list(asked), self._searched, self._fixed)
        except ValueError as error:
            name = self._study.study_name
            raise ConfigError(f"hydra.sweeper.study_name={name}: {error}") from error
        jobs: list[Job | None] = []
        refused: dict[str, str] = {}
        for trial, overrides in zip(asked, map(tuple, given), strict=True):
            folder = job_folder(trial.number, overrides)
            self._listed[folder] = overrides
            try:
                jobs.append(self._checks.job(trial.number, overrides))
                continue
            except ConfigError as error:
                refused[folder] = str(error)
            except HydraException as error:
                # A setting or a choice that does not exist is the same for every trial.
                if not isinstance(error.__cause__, ValidationError):
                    raise
                refused[folder] = in_one_line(error)
            jobs.append(None)
        able = [job for job in jobs if job]
        # Whoever follows the search is to know that more will come.
        begun = len(self._study.get_trials(deepcopy=False))
        numbers = [*(trial.number for trial in self._stopped), *range(begun, begun + self.to_go)]
        to_come = {str(number): () for number in numbers[: self.to_go - len(asked)]}
        list_jobs(self._folder, self._listed | to_come, without_held(self._sweeper, able))
        for folder, reason in refused.items():
            record_unstarted(self._folder / folder, RunState.failed, reason)
        return jobs


def list_what_began(sweep: Path) -> None:
    """Take from the list of a sweep's jobs those that have not begun, if it can be written."""
    if (sweep / JOBS).exists():
        with contextlib.suppress(OSError):
            write_jobs(sweep, listed_and_begun(sweep))


def listed_and_begun(sweep: Path) -> list[ListedJob]:
    """The jobs in a sweep's list that have begun."""
    with contextlib.suppress(OSError, ValueError):
        return [job for job in read_jobs(sweep) if (sweep / job.folder).is_dir()]
    return []


def _objective(folder: Path) -> float | None:
    """What a trial came to; None if it did not complete, or left no record."""
    with contextlib.suppress(ValueError):
        record = read_record(folder)
        if record is not None and record.status is RunState.completed:
            return record.objective
    return None


def _has_ended(folder: Path) -> bool:
    """Whether a trial completed, failed or was lost: not one that was stopped or not begun."""
    with contextlib.suppress(ValueError):
        record = read_record(folder)
        if record is not None:
            return record.status in (RunState.completed, RunState.failed)
    return read_heartbeat(folder).sign is RunState.lost


@contextlib.contextmanager
def _alone(storage: str, study: str) -> Iterator[bool]:
    """Keep other commands off a study that is in a file; whether that can be had.

    Raises ConfigError where one is at work on it.
    """
    if not storage.startswith(SQLITE):
        yield False
        return
    file = Path(storage.removeprefix(SQLITE))
    lock = FileLock(file.with_name(f".{file.name}-{short_hash(study)}.lock"))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"study {study} is being searched by another command: wait for it, or give this one "
            "a hydra.sweeper.study_name of its own"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"hydra.sweeper.storage={storage} cannot be written ({error.strerror})"
        ) from error
    try:
        yield True
    finally:
        lock.release()


def best_command(given: Sequence[str], best: Mapping[str, Any], threads: int | None = None) -> str:
    """The command line of one run with the values that a search found best.

    `given` are the overrides of the search: what it searched gives way, what it was told stays. So
    do the `threads` that its launcher gave each trial, as other ones give other bits.
    """
    fixed = []
    for override in OverridesParser.create().parse_overrides(list(given)):
        key = override.get_key_element()
        if not override.is_sweep_override() and not key.startswith("hydra") and key not in best:
            fixed.append(override.input_line or "")
    found = [f"{key}={value}" for key, value in best.items()]
    if threads is not None and not any(given.startswith("threads=") for given in fixed + found):
        found.append(f"threads={threads}")
    return shlex.join(["python", "train.py", *fixed, *found])
