"""A search by Optuna: its trials are jobs like those of any sweep.

The study lies in the sweep's folder, which is named by what is searched: so the same command finds
it again, takes up the trials that were stopped, and goes on to the number that is asked for. What
the trials have in common is in `sweep.json`. A trial whose settings cannot work is a failed one.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from proglayer import files
from proglayer.config import BPE, OnError, Settings
from proglayer.console import console, counted
from proglayer.errors import ConfigError, first_line, install_command
from proglayer.files import FolderKind
from proglayer.launch.ask import Space, read_space, short_hash
from proglayer.launch.job import Command, Job, identity, record_of
from proglayer.launch.planned import Planned
from proglayer.launch.sweep import (
    Sweep,
    checked,
    job_folder,
    params_as_overrides,
    run_design,
)
from proglayer.run.record import RunRecord, RunState, now, write_record

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)

JOURNAL = "optuna.journal"
# So many points are tried before a search counts as one that cannot work.
POINTS = 10


class SearchSettings(Settings):
    """The settings of conf/hydra/sweeper/optuna.yaml."""

    direction: Literal["minimize", "maximize"]
    n_trials: int = Field(ge=1)
    n_jobs: int = Field(ge=1)
    params: dict[str, Any] | None = None
    seed: int | None = None
    sampler: str
    sampler_settings: dict[str, Any]
    pruner: str
    pruner_settings: dict[str, Any]


def run(command: Command) -> int:
    """Bring a study to `n_trials` trials that ended, and print the command line of the best.

    Returns the exit status: 1 where all trials failed. Raises ConfigError for settings that no
    trial can work with.
    """
    if command.master.plan:
        raise ConfigError("plan=true shows jobs before they run: a search chooses them as it goes")
    try:
        import optuna
    except ImportError:
        missing = install_command("optuna")
        raise ConfigError(f"hydra/sweeper=optuna is not installed: {missing}") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings = checked(SearchSettings, command.sweeper, "sweeper")
    given = [*params_as_overrides(settings.params), *command.arguments]
    space = read_space(given, command.loader)
    if not space.distributions:
        raise ConfigError(
            "hydra/sweeper=optuna has nothing to search: give a setting several values, "
            "such as 'lr.base=tag(log,interval(1e-4,1e-2))'"
        )
    sweep = Sweep.of(command, f"search_{short_hash(' '.join(sorted(space.given)))}")
    search = Search(sweep, space, settings)
    run_design(sweep, search)
    return 0  # failed trials are trials


class Search:
    """The design: a study of Optuna's, asked for trials and told what came of them."""

    def __init__(self, sweep: Sweep, space: Space, settings: SearchSettings) -> None:
        self.sweep = sweep
        self.space = space
        self.settings = settings
        self.trials: dict[Path, optuna.trial.Trial] = {}
        more: dict[str, Any] = {} if settings.seed is None else {"seed": settings.seed}
        if settings.sampler == "grid":
            more["search_space"] = space.grid()
        self.sampler = made("sampler", settings.sampler, settings.sampler_settings | more)
        made("pruner", settings.pruner, settings.pruner_settings)
        self.most = settings.n_trials
        if settings.sampler == "grid":
            self.most = min(self.most, math.prod(map(len, space.grid().values())))
        first = self._first_that_works()
        _check_objective(space, first.job)
        searched = [o.input_line for o in space.overrides if o.is_sweep_override()]
        config = first.job.config
        self.about: Mapping[str, Any] = {
            "searched": " ".join(sorted(map(str, searched))),
            "direction": settings.direction,
            "by": config.objective.value,
            "first": identity(config.model_dump(mode="json")),
        }

    def _first_that_works(self) -> Planned:
        """Return a job of this search. Raises ConfigError where none of several points can work."""
        problem: ConfigError | None = None
        for number in range(POINTS):
            try:
                return self.sweep.job(0, self.space.drawn(_point(self.space, number)))
            except ConfigError as error:
                problem = problem or error
        assert problem is not None
        raise problem

    def batch(self) -> Sequence[Planned]:
        """Return the jobs of the next trials. Those that cannot work are failed ones at once."""
        jobs: list[Planned] = []
        self.trials = {}
        while len(jobs) < self.settings.n_jobs and self._ended + len(jobs) < self.most:
            trial = (
                self.stopped.pop(0)
                if self.stopped
                else self.study.ask(dict(self.space.distributions))
            )
            overrides = self.space.drawn(trial.params)
            folder = self.sweep.folder / job_folder(trial.number, overrides)
            self.trials[folder] = trial
            try:
                planned = self.sweep.job(trial.number, overrides)
            except ConfigError as error:
                self.sweep.listed[folder.name] = overrides
                files.claim_folder(folder, FolderKind.run)
                failed = {"state": RunState.failed, "reason": str(error), "ended": now()}
                write_record(folder, RunRecord(**failed, overrides=list(overrides)))
                self._tell(trial, folder)
            else:
                jobs.append(replace(planned, job=replace(planned.job, prune=self._prune(trial))))
        return jobs

    @functools.cached_property
    def study(self) -> optuna.Study:
        """The study of the sweep's folder, which no other command is at work in."""
        import optuna

        settings = self.settings
        study = optuna.create_study(
            storage=storage_of(self.sweep.folder),
            study_name="search",
            sampler=self.sampler,
            direction=settings.direction,
            load_if_exists=True,
        )
        # A grid that is complete stops its study, by a method that refuses outside of `optimize`.
        study.stop = lambda: None
        trials = study.get_trials(deepcopy=False)
        if trials:
            # The same seed would begin the same row of draws again.
            self.sampler.reseed_rng()
        running = optuna.trial.TrialState.RUNNING
        self.stopped = [
            optuna.trial.Trial(study, trial._trial_id) for trial in trials if trial.state is running
        ]
        goes_on = f", {len(self.stopped)} to go on with" if self.stopped else ""
        before = f"{len(trials) - len(self.stopped)} of {self.most} trials ended before{goes_on}"
        console().print(before, markup=False)
        return study

    @property
    def _ended(self) -> int:
        return sum(trial.state.is_finished() for trial in self.study.get_trials(deepcopy=False))

    def _prune(self, trial: optuna.trial.Trial) -> Report | None:
        settings = self.settings
        about = settings.pruner, settings.pruner_settings, settings.direction
        return Report(self.sweep.folder, trial.number, *about) if settings.pruner != "nop" else None

    def tell(self, jobs: Sequence[Planned]) -> None:
        """Tell the study how its trials ended. One that was stopped goes on with the command.

        Raises ConfigError where one failed and on_error=stop.
        """
        states = [self._tell(self.trials[each.job.folder], each.job.folder) for each in jobs]
        if RunState.failed in states and jobs[0].job.config.on_error is OnError.stop:
            raise ConfigError("a trial failed, and on_error=stop: the same command goes on")

    def _tell(self, trial: optuna.trial.Trial, folder: Path) -> RunState | None:
        from optuna.trial import TrialState

        record = record_of(folder)
        state = record.state if record else None
        if record and state is RunState.completed and record.objective is not None:
            self.study.tell(trial, record.objective)
        elif state in (RunState.pruned, RunState.completed, RunState.failed, RunState.lost):
            pruned = state is RunState.pruned
            self.study.tell(trial, state=TrialState.PRUNED if pruned else TrialState.FAIL)
        return state

    def outcome(self) -> list[str]:
        """Return the best trial with the command of its run. Raises ConfigError without one."""
        with contextlib.suppress(ValueError):
            best = self.study.best_trial
            return [
                f"best of the study, {best.value:.6g} in trial {best.number}:",
                best_command(self.space, best.params, self.sweep.engine.threads),
            ]
        raise ConfigError("every trial failed, for the reasons above")


@dataclass
class Report:
    """Reports each epoch of a trial to its study, from wherever it runs, and asks the pruner.

    Steps are the epochs of all phases so far. The validation loss is what is compared. A study that
    cannot be reached prunes nothing.
    """

    folder: Path
    number: int
    pruner: str
    pruner_settings: Mapping[str, Any]
    direction: str
    step: int = 0
    trial: Any = field(default=None, repr=False)

    def __call__(self, row: Mapping[str, Any]) -> str | None:
        """Return why the trial is to end, None for it to go on."""
        self.step += 1
        loss = row["validation_loss"]
        try:
            trial = self.trial = self.trial or self._found()
            reported = trial.study.get_trials(deepcopy=False)[self.number].intermediate_values
            # A trial that is gone on with begins by reporting what it reported before.
            if self.step not in reported:
                trial.report(-loss if self.direction == "maximize" else loss, self.step)
            if self.step < max(reported, default=0) or not trial.should_prune():
                return None
        except Exception as error:
            log.warning("an epoch is not reported to the study (%s)", first_line(error))
            return None
        epochs = counted(self.step, "epoch")
        return f"pruned by {self.pruner} after {epochs}, with a validation loss of {loss:.6g}"

    def _found(self) -> optuna.trial.Trial:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.load_study(
            study_name="search",
            storage=storage_of(self.folder),
            sampler=optuna.samplers.RandomSampler(),  # it is asked for nothing here
            pruner=made("pruner", self.pruner, self.pruner_settings),
        )
        known = study.get_trials(deepcopy=False)[self.number]
        return optuna.trial.Trial(study, known._trial_id)


def storage_of(sweep: Path) -> Any:
    """Open the journal of a search. Raises ConfigError where it is none."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = sweep / JOURNAL
    try:
        return JournalStorage(JournalFileBackend(str(path)))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} cannot be read: {first_line(error)}") from error


def made(what: str, name: str, settings: Mapping[str, Any]) -> Any:
    """Return Optuna's sampler or pruner of a name such as `tpe`. Raises ConfigError."""
    import optuna

    module: Any = getattr(optuna, f"{what}s")
    plain = name.replace("_", "").lower().removesuffix(what)
    kinds = {kind.lower().removesuffix(what): kind for kind in module.__all__}
    if plain not in kinds or plain == "base":
        raise ConfigError(f"hydra.sweeper.{what}={name}: Optuna has {', '.join(sorted(kinds))}")
    try:
        return getattr(module, kinds[plain])(**settings)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"hydra.sweeper.{what}={name}: {first_line(error)}") from error


# Figures per token, and the settings that say what a token is (of bpe, its size does, too).
OF_TOKENS = ("data.tokenizer", "data.tokenizer_revision")


def _check_objective(space: Space, first: Job) -> None:
    """Raise ConfigError where trials of different tokenizers would be told apart by a loss."""
    config = first.config
    by = (*OF_TOKENS, "data.max_vocab") if config.data.tokenizer == BPE else OF_TOKENS
    searched = [name for name in by if name in space.distributions]
    if searched and not config.objective.value.endswith("per_byte"):
        raise ConfigError(
            f"objective={config.objective.value} is per token, so it does not compare what "
            f"{searched[0]} makes: take objective=validation_bits_per_byte"
        )


def _point(space: Space, number: int) -> dict[str, Any]:
    """Return one value for each setting that is searched."""
    point = {
        key: distribution.low
        for key, distribution in space.distributions.items()
        if key not in space.values
    }
    return point | {key: values[number % len(values)] for key, values in space.values.items()}


def best_command(space: Space, best: Mapping[str, Any], threads: int | None = None) -> str:
    """Return the command line of one run with the values that a search found best.

    What the search was given stays. So do the `threads` that its engine gave each trial, as other
    ones give other bits.
    """
    overrides = list(space.drawn(best))
    if threads is not None and not any(o.startswith("threads=") for o in overrides):
        overrides.append(f"threads={threads}")
    return shlex.join(["python", "train.py", *overrides])
