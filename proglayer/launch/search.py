"""A search by Optuna: its trials are jobs like those of any sweep.

The study lies in the sweep's folder, which is named by what is searched: so the same command finds
it again, takes up the trials that were stopped, and goes on to the number that is asked for. What
the trials have in common is in `sweep.json`. A trial whose settings cannot work is a failed one.
"""

from __future__ import annotations

import functools
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, Transformer
from pydantic import Field

from proglayer import files
from proglayer.config import BPE, Settings
from proglayer.console import say
from proglayer.errors import ConfigError, check_installed, raised_as
from proglayer.files import FolderKind
from proglayer.launch.ask import keyed, short_hash
from proglayer.launch.compose import Command
from proglayer.launch.engines import Engine
from proglayer.launch.planned import Planned
from proglayer.launch.product import params_as_overrides, values_of
from proglayer.launch.study import made, open_study, report_epoch, trial_of
from proglayer.launch.sweep import Sweep
from proglayer.results.variants import identity
from proglayer.run.record import RunRecord, RunState, now, record_of, write_record

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

# So many points are tried before a search counts as one that cannot work.
POINTS = 10
# Settings that say what a token is: a loss per token does not compare what they make.
OF_TOKENS = {"data.tokenizer", "data.tokenizer_revision"}


class SearchSettings(Settings):
    """The settings of conf/hydra/sweeper/optuna.yaml."""

    design: str
    direction: Literal["minimize", "maximize"]
    n_trials: int = Field(ge=1)
    n_jobs: int = Field(ge=1)
    params: dict[str, Any] | None = None
    sampler: dict[str, Any]
    pruner: dict[str, Any]


def run(command: Command) -> int:
    """Bring a study to `n_trials` trials that ended, and print the command line of the best.

    Returns the exit status: 0, as failed trials are trials. Raises ConfigError for settings that no
    trial can work with, and where all failed.
    """
    if command.master.plan:
        raise ConfigError("plan=true shows jobs before they run: a search chooses them as it goes")
    check_installed("hydra/sweeper=optuna", "optuna")
    settings = command.settings("sweeper", SearchSettings)
    given = [*params_as_overrides(settings.params), *command.arguments]
    space = read_space(given, command.loader)
    written = sorted(str(override.input_line) for override in space.overrides.values())
    sweep = Sweep(command, f"search_{short_hash(' '.join(written))}")
    search = Search(sweep, space, settings)
    sweep.run(search.batches())
    try:
        best = search.study.best_trial
    except ValueError:
        raise ConfigError("every trial failed, for the reasons above") from None
    overrides = [*space.drawn(best.params)]
    # Those that its engine gave each trial, as other ones give other bits.
    threads = sweep.job(best.number, tuple(overrides)).job.config.threads
    if threads is not None and "threads" not in space.overrides:
        overrides.append(f"threads={threads}")
    command_line = shlex.join(["python", "train.py", *overrides])
    say(f"best of the study, {best.value:.6g} in trial {best.number}:\n{command_line}")
    return 0


# --- what is drawn from ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Space:
    """What a search draws from.

    overrides: of its command, what is said last of a setting.
    distributions: of each that has several values, what Optuna draws its value from.
    """

    overrides: Mapping[str, Override]
    distributions: Mapping[str, Any]

    def drawn(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the overrides with `values` in the place of what they were drawn from."""
        return tuple(
            f"{each.get_key_element()}={values[key]}" if key in values else str(each.input_line)
            for key, each in self.overrides.items()
        )

    def grid(self) -> dict[str, list[Any]]:
        """Return all values of each. Raises ConfigError for one whose values cannot be counted."""
        values = {key: _values(each) for key, each in self.distributions.items()}
        for key, each in values.items():
            if not each:
                raise ConfigError(
                    f"hydra/sweeper/sampler=grid: {key} has no end of values: give it a choice or "
                    "a range"
                )
        return values

    def point(self, number: int) -> tuple[str, ...]:
        """Return the overrides of one of its points."""
        values = {key: _values(each) or [each.low] for key, each in self.distributions.items()}
        return self.drawn({key: each[number % len(each)] for key, each in values.items()})


def read_space(given: Sequence[str], loader: ConfigLoader | None) -> Space:
    """Read overrides by Hydra's grammar.

    `interval` is drawn from as real numbers, `int(interval(...))` and a `range` of whole numbers as
    whole ones, within `tag(log, ...)` on a logarithmic scale; everything else as categories.

    Raises ConfigError for values that cannot be drawn from, and where there are none.
    """
    overrides = keyed(given, loader)
    distributions: dict[str, BaseDistribution] = {}
    for key, override in overrides.items():
        if override.is_discrete_sweep():
            values_of(override)  # refuses what cannot be drawn from
        if override.is_sweep_override():
            with raised_as(ConfigError, str(override.input_line), ValueError):
                distributions[key] = _distribution(override)
    if not distributions:
        raise ConfigError(
            "hydra/sweeper=optuna has nothing to search: give a setting several values, such as "
            "'lr.base=tag(log,interval(1e-4,1e-2))'"
        )
    return Space(overrides, distributions)


def _distribution(override: Override) -> BaseDistribution:
    """Return what Optuna is to draw from."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value: Any = override.value()
    if isinstance(value, IntervalSweep):
        whole = isinstance(value.start, int) and isinstance(value.end, int)
        kind: Any = IntDistribution if whole else FloatDistribution
        return kind(value.start, value.end, log="log" in value.tags)
    elements: list[Any] = list(override.sweep_iterator(transformer=_element))
    whole = all(isinstance(element, int) for element in elements)
    if whole and isinstance(value, RangeSweep) and not value.shuffle:
        step, log_scale = int(abs(value.step or 1)), "log" in value.tags
        return IntDistribution(min(elements), max(elements), log=log_scale, step=step)
    return CategoricalDistribution(elements)


def _element(value: Any) -> Any:
    """Return a number as it is, anything else as Hydra's grammar reads it back."""
    return value if isinstance(value, (int, float)) else Transformer.str(value)


def _values(distribution: Any) -> list[Any]:
    """Return all values of a distribution; none of one of real numbers."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if isinstance(distribution, IntDistribution):
        return [*range(distribution.low, distribution.high + 1, distribution.step)]
    return [*distribution.choices] if isinstance(distribution, CategoricalDistribution) else []


# --- the study ------------------------------------------------------------------------------------


class Search:
    """A study of Optuna's, asked for trials and told what came of them.

    Raises ConfigError for a sampler, a pruner or values that cannot work.
    """

    def __init__(self, sweep: Sweep, space: Space, settings: SearchSettings) -> None:
        if settings.n_jobs > 1 and type(sweep.engine) is Engine:
            raise ConfigError("hydra.sweeper.n_jobs takes a launcher, as hydra/launcher=joblib")
        self.sweep = sweep
        self.space = space
        self.settings = settings
        self.most = settings.n_trials
        more: dict[str, Any] = {}
        if settings.sampler["_target_"].endswith("GridSampler"):
            more["search_space"] = space.grid()
            self.most = min(self.most, math.prod(map(len, space.grid().values())))
        self.sampler = made("sampler", settings.sampler, **more)
        made("pruner", settings.pruner)
        config = self._first_that_works().job.config
        by = OF_TOKENS | ({"data.max_vocab"} if config.data.tokenizer == BPE else set())
        if by & space.distributions.keys() and not config.objective.endswith("per_byte"):
            raise ConfigError(
                f"objective={config.objective} is per token, so it does not compare "
                "tokenizers: take objective=validation_bits_per_byte"
            )
        searched = [str(space.overrides[key].input_line) for key in space.distributions]
        sweep.about = {
            "searched": " ".join(sorted(searched)),
            "direction": settings.direction,
            "by": config.objective,
            "first": identity(config.model_dump(mode="json")),
        }

    def _first_that_works(self) -> Planned:
        """Return a job of this search. Raises ConfigError where none of several points can work."""
        problems: list[ConfigError] = []
        for number in range(POINTS):
            try:
                return self.sweep.job(0, self.space.point(number))
            except ConfigError as error:
                problems.append(error)
        raise problems[0]

    def batches(self) -> Iterator[Sequence[Planned]]:
        """Give the jobs of the next trials, and tell the study how those ended.

        Trials that were stopped come first. One that cannot work is a failed one at once.
        """
        trials = self.study.get_trials(deepcopy=False)
        stopped = [trial_of(self.study, each) for each in trials if not each.state.is_finished()]
        ended = len(trials) - len(stopped)
        goes_on = f", {len(stopped)} to go on with" if stopped else ""
        say(f"{ended} of {self.most} trials ended before{goes_on}")
        while ended < self.most:
            trials = [
                stopped.pop(0) if stopped else self.study.ask({**self.space.distributions})
                for _ in range(min(self.settings.n_jobs, self.most - ended))
            ]
            batch = [(trial, *self._job(trial)) for trial in trials]
            if jobs := [job for *_, job in batch if job is not None]:
                yield jobs
            ended += sum(self._tell(trial, folder) for trial, folder, _ in batch)

    @functools.cached_property
    def study(self) -> optuna.Study:
        """The study of the sweep's folder, which no other command is at work in."""
        study = open_study(self.sweep.folder, self.settings.direction, self.sampler)
        # A grid that is complete stops its study, by a method that refuses outside of `optimize`.
        study.stop = lambda: None
        if study.get_trials(deepcopy=False):
            # The same seed would begin the same row of draws again.
            self.sampler.reseed_rng()
        return study

    def _job(self, trial: optuna.trial.Trial) -> tuple[Path, Planned | None]:
        """Return a trial's folder and its job; None for one that cannot work, which is recorded."""
        overrides = self.space.drawn(trial.params)
        folder = self.sweep.folder_of(trial.number, overrides)
        try:
            job = self.sweep.job(trial.number, overrides)
        except ConfigError as error:
            self.sweep.listed[folder.name] = list(overrides)
            files.claim_folder(folder, FolderKind.run)
            failed = {"state": RunState.failed, "reason": str(error), "ended": now()}
            write_record(folder, RunRecord(**failed, overrides=list(overrides)))
            if self.sweep.command.master.on_error == "stop":
                raise ConfigError(f"{error}\n{folder.name} failed, and on_error=stop") from error
            return folder, None
        if not self.settings.pruner["_target_"].endswith("NopPruner"):
            about = self.settings.pruner, self.settings.direction
            prune = functools.partial(report_epoch, self.sweep.folder, trial.number, *about)
            job = replace(job, job=replace(job.job, prune=prune))
        return folder, job

    def _tell(self, trial: optuna.trial.Trial, folder: Path) -> bool:
        """Tell the study how a trial ended. One that was stopped goes on with the command."""
        from optuna.trial import TrialState

        record = record_of(folder)
        state = record.state if record else None
        if record and state is RunState.completed and record.objective is not None:
            self.study.tell(trial, record.objective)
        elif state is RunState.pruned:
            self.study.tell(trial, state=TrialState.PRUNED)
        elif state in (RunState.completed, RunState.failed, RunState.lost):
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            return False
        return True
