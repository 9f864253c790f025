"""A search by Optuna: its trials are jobs like those of any sweep.

Asking the study, launching, and telling it what came out are done here, so that a trial is checked
and submitted as a sweep's job is, one that cannot work is a failed trial, and one that was stopped
goes on when the command is given again.
"""

from __future__ import annotations

import contextlib
import functools
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from pydantic import Field

from proglayer import files
from proglayer.config import BPE, OnError
from proglayer.console import console
from proglayer.errors import ConfigError, first_line
from proglayer.files import SWEEP_FILE
from proglayer.launch.ask import Space, read_space, short_hash
from proglayer.launch.common import (
    Job,
    check_settings,
    params_as_overrides,
    record_of,
    threads_per_job,
    unread,
    without_hydra,
)
from proglayer.launch.job import record_unstarted
from proglayer.launch.study import (
    absolute,
    alone,
    keep_shared,
    made,
    open_storage,
    shared_settings,
    write_study,
)
from proglayer.launch.sweep import (
    Checks,
    Sweeper,
    SweepError,
    check_launcher,
    job_folder,
    jobs_run_elsewhere,
    launch,
    open_folder,
    sum_up,
)
from proglayer.run.record import (
    RecordError,
    RunRecord,
    RunState,
    SweepJob,
    read_sweep,
    write_sweep,
)

if TYPE_CHECKING:
    import optuna

# The attribute of a study that lists the folders its trials are in.
FOLDERS = "proglayer:folders"


class OptunaSweeper(Sweeper, Protocol):
    """A sweeper of Hydra's with the settings of a search: see conf/hydra/sweeper/optuna.yaml."""

    sampler: DictConfig
    pruner: DictConfig
    direction: Literal["minimize", "maximize"]
    storage: str | None
    study_name: str | None
    n_trials: Annotated[int, Field(ge=1)]
    n_jobs: Annotated[int, Field(ge=1)]
    max_failure_rate: Annotated[float, Field(ge=0, le=1)]
    params: Any
    custom_search_space: str | None


def search(sweeper: OptunaSweeper, arguments: Sequence[str]) -> None:
    """Bring a study to `n_trials` trials that ended, and print the command line of the best.

    Raises ConfigError for settings that no trial can work with, and where all trials failed.
    """
    master = sweeper.config
    if master.plan:
        raise ConfigError("plan=true shows jobs before they run: a search chooses them as it goes")
    check_settings(sweeper, OptunaSweeper)
    if sweeper.direction not in ("minimize", "maximize"):
        raise ConfigError(f"hydra.sweeper.direction={sweeper.direction}: minimize or maximize")
    given = [*params_as_overrides(sweeper.params), *arguments]
    space = read_space(given, sweeper.hydra_context.config_loader)
    if not space.distributions and not sweeper.custom_search_space:
        raise ConfigError(
            "hydra/sweeper=optuna has nothing to search: give a setting several values, "
            "such as 'lr.base=tag(log,interval(1e-4,1e-2))'"
        )
    check_launcher(sweeper)
    _check_objective(space, master)
    name = sweeper.study_name or f"proglayer_{short_hash(without_hydra(sorted(space.given)))}"
    with unread(master), alone(sweeper.storage or "", name) as by_itself:
        trials = Trials(sweeper, space, name, by_itself)
        folders = trials.folders()
        try:
            while trials.to_go > 0:
                trials.run(min(trials.to_go, sweeper.n_jobs))
        finally:
            for folder in folders:
                list_what_began(folder)
            if folders:
                trials.write(folders[-1])
                sum_up(folders, master.report)
            best = trials.best
            if best is not None:
                threads = threads_per_job(master.hydra.launcher)
                print(f"best of the study, {best.value:.6g} in trial {best.number}:")
                print(best_command(space, best.params, threads))
    if best is None:
        raise ConfigError("every trial failed, for the reasons above")
    if folders:
        found = {"name": "optuna", "best_params": best.params, "best_value": best.value}
        text = OmegaConf.to_yaml(OmegaConf.create(found)).encode()
        best_file = folders[-1] / "optimization_results.yaml"
        files.write_atomically(best_file, text)


# Figures per token, and the settings that say what a token is (of bpe, its size does, too).
PER_TOKEN = ("loss", "perplexity", "accuracy_percent")
OF_TOKENS = ("data.tokenizer", "data.tokenizer_revision")


def _check_objective(space: Space, master: DictConfig) -> None:
    """Raise ConfigError where trials of different tokenizers would be told apart by a loss."""
    own = (*OF_TOKENS, "data.max_vocab") if master.data.tokenizer == BPE else OF_TOKENS
    searched = [name for name in own if name in space.distributions]
    if searched and master.objective.endswith(PER_TOKEN):
        raise ConfigError(
            f"objective={master.objective} is per token, so it does not compare what "
            f"{searched[0]} makes: take objective=validation_bits_per_byte"
        )


class Trials:
    """The trials of a study: those that there are, and those that are still to be run.

    by_itself: whether no other command can be at work on it, so that a trial that has not ended is
        one that was stopped.
    """

    def __init__(self, sweeper: OptunaSweeper, space: Space, name: str, by_itself: bool) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._sweeper = sweeper
        self._space = space
        self._master = sweeper.config
        self._folder = Path(sweeper.config.hydra.sweep.dir)
        self._checks = Checks(sweeper)
        self._custom = _custom_search_space(sweeper.custom_search_space)
        self._most = sweeper.n_trials
        sampler = made("sampler", sweeper.sampler)
        pruner = made("pruner", sweeper.pruner)
        if isinstance(sampler, functools.partial):  # of a grid, which has to know its points
            grid = space.grid()
            sampler = sampler(grid)
            self._most = min(self._most, math.prod(map(len, grid.values())))
        if not isinstance(pruner, optuna.pruners.NopPruner):
            self._let_trials_report(name)
        loader = sweeper.hydra_context.config_loader
        composed = loader.load_sweep_config(self._master, space.fixed)
        shared = shared_settings(composed, space.distributions, sweeper.direction)
        self._check_any()
        self._study = optuna.create_study(
            storage=open_storage(sweeper.storage or ""),
            study_name=name,
            sampler=sampler,
            pruner=pruner,
            direction=sweeper.direction,
            load_if_exists=True,
        )
        trials = self._study.get_trials(deepcopy=False)
        keep_shared(self._study, shared)
        # A grid that is complete stops its study, by a method that refuses outside of `optimize`.
        self._study.stop = lambda: None
        if trials:
            # The same seed would begin the same row of draws again.
            sampler.reseed_rng()
        running = optuna.trial.TrialState.RUNNING
        self._stopped = [trial for trial in trials if by_itself and trial.state is running]
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
    def best(self) -> optuna.trial.FrozenTrial | None:
        """The best trial, None where none completed."""
        with contextlib.suppress(ValueError):
            return self._study.best_trial
        return None

    @property
    def _ended(self) -> int:
        return sum(trial.state.is_finished() for trial in self._study.get_trials(deepcopy=False))

    def folders(self) -> list[Path]:
        """The folders that hold trials; where some are to be run, the last is for these."""
        known = self._study.user_attrs.get(FOLDERS, [])
        if self.to_go > 0:
            open_folder(self._master)
            own = str(self._folder.resolve())
            known = [*(folder for folder in known if folder != own), own]
            self._study.set_user_attr(FOLDERS, known)
        return [Path(folder) for folder in known if Path(folder).is_dir()]

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
        except ConfigError:
            for trial in asked:
                self._study.tell(trial, state=fail)
            raise
        # Whoever follows the search is to know that more will come.
        begun = len(self._study.get_trials(deepcopy=False))
        numbers = [*(trial.number for trial in self._stopped), *range(begun, begun + self.to_go)]
        to_come = {str(number): () for number in numbers[: self.to_go - count]}
        try:
            launch(self._sweeper, self._listed | to_come, [job for job in jobs if job])
        except ConfigError:
            # A trial whose process was killed would be killed again by the next command, for ever.
            # Those that did not come to an end go on then.
            for trial, job in zip(asked, jobs, strict=True):
                if job is None or _has_ended(self._folder / job.folder):
                    self._tell(trial, job)
            raise
        states = [self._tell(trial, job) for trial, job in zip(asked, jobs, strict=True)]
        failed = states.count(fail)
        rate = self._sweeper.max_failure_rate
        if failed / count > rate:
            allowed = f"hydra.sweeper.max_failure_rate={rate}"
            raise ConfigError(f"{failed} of {count} trials failed, more than {allowed} lets pass")
        if failed and self._master.on_error is OnError.stop:
            raise ConfigError("a trial failed, and on_error=stop: the same command goes on")

    def write(self, folder: Path) -> None:
        """Keep the trials in `study.json`, for the report."""
        write_study(folder, self._study, self._master.objective)

    def _tell(self, trial: optuna.trial.Trial, job: Job | None) -> optuna.trial.TrialState:
        """Tell the study what a trial came to."""
        import optuna

        record = record_of(self._folder / job.folder) if job else RunRecord(state=RunState.failed)
        if record.state is RunState.completed and record.objective is not None:
            return self._study.tell(trial, record.objective).state
        pruned = record.state is RunState.pruned
        state = optuna.trial.TrialState.PRUNED if pruned else optuna.trial.TrialState.FAIL
        return self._study.tell(trial, state=state).state

    def _next(self) -> optuna.trial.Trial:
        """A trial that was stopped, with the values that it has, or else a new one."""
        import optuna

        if not self._stopped:
            return self._study.ask()
        return optuna.trial.Trial(self._study, self._stopped.pop(0)._trial_id)

    def _jobs(self, asked: Sequence[optuna.trial.Trial]) -> list[Job | None]:
        """The jobs of trials, checked; None for one whose settings cannot work, recorded as failed.

        Raises ConfigError where no trial of this search could.
        """
        jobs: list[Job | None] = []
        for trial in asked:
            overrides = self._overrides(trial)
            folder = job_folder(trial.number, overrides)
            self._listed[folder] = overrides
            try:
                jobs.append(self._checks.job(trial.number, overrides))
                continue
            except ConfigError as error:
                reason = str(error)
            record_unstarted(self._folder / folder, RunState.failed, reason)
            jobs.append(None)
        return jobs

    def _overrides(self, trial: optuna.trial.Trial) -> tuple[str, ...]:
        """Draw the values of a trial that has none yet. Raises ConfigError."""
        try:
            for key, distribution in self._space.distributions.items():
                trial._suggest(key, distribution)
            if self._custom is not None:
                self._custom(self._master, trial)
        except ValueError as error:
            name = self._study.study_name
            raise ConfigError(f"hydra.sweeper.study_name={name}: {error}") from error
        return self._space.drawn(trial.params)

    def _let_trials_report(self, study: str) -> None:
        """Give the study's place to the trials, which are to ask its pruner.

        Raises ConfigError for a storage that they cannot reach.
        """
        storage = self._sweeper.storage or ""
        if not storage:
            raise ConfigError("hydra/sweeper/pruner needs a hydra.sweeper.storage for its study")
        if jobs_run_elsewhere(self._sweeper) and storage.startswith("sqlite"):
            raise ConfigError(
                f"hydra.sweeper.storage={storage}: trials on several machines cannot share this "
                "file, as hydra/sweeper/pruner needs it; one that they can is "
                "hydra.sweeper.storage=journal:///multirun/optuna.journal"
            )
        with read_write(self._master), open_dict(self._master):
            where = {"storage": absolute(storage), "study_name": study}
            self._master.hydra.sweeper.update(where)
            self._master.hydra.overrides.hydra += [
                f"hydra.sweeper.{key}='{value}'" for key, value in where.items()
            ]

    def _check_any(self) -> None:
        """Raises ConfigError for what is wrong with every trial."""
        try:
            self._checks.job(0, self._space.first())
        except SweepError:
            raise
        except ConfigError:
            return  # with other values it may be right


def _custom_search_space(name: str | None) -> Callable[..., None] | None:
    """The function of the user's that draws values itself, given the settings and the trial."""
    try:
        return get_method(name) if name else None
    except Exception as error:
        raise ConfigError(
            f"hydra.sweeper.custom_search_space={name}: {first_line(error)}"
        ) from None


def list_what_began(sweep: Path) -> None:
    """Take from the list of a sweep's jobs those that have not begun, if it can be written."""
    if (sweep / SWEEP_FILE).exists():
        with contextlib.suppress(OSError, RecordError):
            kept = {"jobs": listed_and_begun(sweep)}
            write_sweep(sweep, read_sweep(sweep).model_copy(update=kept))


def listed_and_begun(sweep: Path) -> list[SweepJob]:
    """The jobs in a sweep's list that have begun."""
    with contextlib.suppress(RecordError):
        return [job for job in read_sweep(sweep).jobs if (sweep / job.folder).is_dir()]
    return []


def _has_ended(folder: Path) -> bool:
    """Whether a trial completed, failed, was pruned or lost: not one stopped or not begun."""
    return record_of(folder).state in (
        RunState.completed,
        RunState.failed,
        RunState.pruned,
        RunState.lost,
    )


def best_command(space: Space, best: Mapping[str, Any], threads: int | None = None) -> str:
    """The command line of one run with the values that a search found best.

    What the search was given stays. So do the `threads` that its launcher gave each trial, as other
    ones give other bits.
    """
    overrides = [o for o in space.drawn(best) if not o.lstrip("+~").startswith("hydra")]
    if threads is not None and not any(o.startswith("threads=") for o in overrides):
        overrides.append(f"threads={threads}")
    return shlex.join(["python", "train.py", *overrides])
