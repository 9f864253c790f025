"""A sweep: batches of jobs, each checked before it starts, and what came out told at the end.

A product of values, a study that adds seeds (`settle`) and a search (`search`) are designs: they
say which jobs come next, and are told when these have ended.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import Override
from pydantic import Field, ValidationError

from proglayer import files
from proglayer.config import OnError, Settings, problem_lines
from proglayer.console import console
from proglayer.errors import FAILED, ConfigError
from proglayer.files import FolderKind
from proglayer.launch.ask import MOST_JOBS, is_kept, parse, plain, short_hash, values_of
from proglayer.launch.engines import Engine, Joblib, Ray
from proglayer.launch.job import (
    Command,
    Job,
    differing,
    leave_report,
    record_of,
    same_settings,
    submit,
)
from proglayer.launch.planned import Planned, Planner, describe_work, in_launch_order, print_plan
from proglayer.launch.slurm import Slurm
from proglayer.run.environment import git_state
from proglayer.run.record import (
    RecordError,
    RunState,
    SweepJob,
    SweepRecord,
    read_sweep,
    sign_of_life,
    write_record,
)
from proglayer.run.signals import interrupt, on_signals

ENGINES = {"basic": Engine, "joblib": Joblib, "ray": Ray, "slurm": Slurm}


class Design(Protocol):
    """What a sweep does: which jobs come next, until there are none.

    about: what has to be the same where a command goes on in a folder; empty where anything may.
    """

    about: Mapping[str, Any]

    def batch(self) -> Sequence[Planned]:
        """Return the jobs that come next, none where all is done."""
        ...

    def tell(self, jobs: Sequence[Planned]) -> None:
        """Take in what came of the jobs of a batch."""
        ...

    def outcome(self) -> Iterable[str]:
        """Say what came of it all, in lines under the table of jobs."""
        ...


class ProductSettings(Settings):
    """Hydra's grammar, and what a product of all values does not say.

    max_batch_size: how many jobs the engine gets at a time.
    params: overrides as on the command line, in a file.
    pairs: keys whose values go together.
    blocks: several sweeps in one, each with settings of its own, written as `params` are.
    filter: an expression; combinations for which it does not hold are left out.
    """

    max_batch_size: int | None = Field(None, ge=1)
    params: dict[str, Any] | None = None
    pairs: tuple[tuple[str, ...], ...] = ()
    blocks: tuple[dict[str, Any], ...] = ()
    filter: str | None = None


S = TypeVar("S", bound=Settings)


def checked(schema: type[S], plain: Mapping[str, Any], part: str) -> S:
    """Return the settings of `hydra.sweeper` or `hydra.launcher`. Raises ConfigError."""
    try:
        return schema.model_validate(plain)
    except ValidationError as error:
        raise ConfigError("\n".join(problem_lines(error, f"hydra.{part}."))) from error


def engine_of(settings: Mapping[str, Any]) -> Engine:
    """Return the engine that the settings of `hydra.launcher` describe. Raises ConfigError."""
    name = str(settings.get("engine"))
    if name not in ENGINES:
        raise ConfigError(f"hydra/launcher: no engine {name}: take one of {', '.join(ENGINES)}")
    engine = checked(ENGINES[name], settings, "launcher")
    engine.check()
    return engine


@dataclass(eq=False)
class Sweep:
    """The sweep of a command: its folder, its engine, and the jobs that it has so far."""

    command: Command
    folder: Path
    engine: Engine
    planner: Planner = field(default_factory=Planner)
    listed: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, command: Command, name: str | None = None) -> Sweep:
        """Raises ConfigError for an engine that cannot work here."""
        engine = engine_of(command.launcher)
        command.threads, command.git = engine.threads, git_state()
        return cls(command, command.folder("sweep", name), engine)

    def job(self, number: int, overrides: tuple[str, ...]) -> Planned:
        """Compose and plan a job. Raises ConfigError."""
        folder = self.folder / job_folder(number, overrides)
        return self.planner.plan(self.command.job(folder, overrides, number))

    def jobs(self, numbered: Iterable[tuple[int, tuple[str, ...]]]) -> list[Planned]:
        """Compose and plan jobs. Raises ConfigError with the problems of all."""
        jobs: list[Planned] = []
        problems: dict[str, str] = {}
        for number, overrides in numbered:
            try:
                jobs.append(self.job(number, overrides))
            except ConfigError as error:
                for line in str(error).splitlines():
                    problems.setdefault(line, " ".join(overrides))
        if problems:
            raise ConfigError("\n".join(f"{line}  [{text}]" for line, text in problems.items()))
        return jobs

    def show_plans(self, jobs: Sequence[Planned]) -> None:
        """Print the plan of each job, and how long what is left of all may take."""
        for planned in jobs:
            title = f"{planned.job.name}: {' '.join(planned.job.overrides)}"
            print_plan(planned, title, self.engine.elsewhere)
        with contextlib.suppress(ConfigError):  # the device is another machine's
            self._say_work(jobs)

    def _say_work(self, jobs: Sequence[Planned]) -> None:
        text = describe_work(jobs, self.engine.at_once, self.engine.elsewhere)
        console().print(text, markup=False)

    @contextlib.contextmanager
    def opened(self, about: Mapping[str, Any]) -> Iterator[None]:
        """Claim the sweep's folder for the time of the block.

        Raises ConfigError where it is another's, or holds a sweep about something else.
        """
        files.claim_folder(self.folder, FolderKind.sweep)
        with files.sole_writer(self.folder, FolderKind.sweep.setting):
            self._go_on(about)
            self._about = dict(about)
            self._write()
            with sign_of_life(self.folder / FolderKind.sweep.mark):
                yield

    def _go_on(self, about: Mapping[str, Any]) -> None:
        """Take over the jobs of the folder's sweep. Raises ConfigError where it is another."""
        if not (self.folder / FolderKind.sweep.mark).exists():
            return
        try:
            before = read_sweep(self.folder)
        except RecordError as error:
            raise ConfigError(f"hydra.sweep.dir={self.folder}: {error}") from error
        if others := differing(before.about, about):
            raise ConfigError(
                f"hydra.sweep.dir={self.folder} holds a study with {'; '.join(others[:3])}: its "
                "results follow from that, so run another one in another folder"
            )
        self.listed = {job.folder: tuple(job.overrides) for job in before.jobs}

    def _write(self) -> None:
        jobs = [SweepJob(folder=name, overrides=list(o)) for name, o in self.listed.items()]
        write_record(
            self.folder,
            SweepRecord(
                jobs=jobs,
                command=["python", *sys.argv],
                git=self.command.git,
                about=self._about,
            ),
        )

    def launch(self, batch: Sequence[Planned]) -> None:
        """Run what did not complete of a batch, in the order of launching.

        Raises ConfigError where it cannot be run, or does not come to its end.
        """
        waiting = [each.job for each in in_launch_order(batch) if not each.completed]
        before = len(batch) - len(waiting)
        said = f"{len(batch)} jobs in {_short(self.folder)}, {before} finished before"
        console().print(said, markup=False)
        # With nothing to run, torch, which knows the machine's part in the keys, is not needed.
        if waiting:
            self._say_work(batch)
        held = self.engine.held(self.folder)
        for job in waiting:
            if job.name in held:
                _check_same(job, held[job.name])
        self.listed |= {each.job.name: each.job.overrides for each in batch}
        self._write()
        for job in waiting:
            if job.name not in held:
                submit(job)
        with (
            on_signals(interrupt, once=False),
            contextlib.closing(self.engine.run(waiting, self.folder)) as ended,
        ):
            for job in ended:
                record = record_of(job.folder)
                failed = record is not None and record.state is RunState.failed
                if failed and job.config.on_error is OnError.stop:
                    return


def run_design(sweep: Sweep, design: Design) -> int:
    """Run a design to its end, and return the exit status: 1 if a job failed.

    Raises ConfigError and KeyboardInterrupt, after the table of all jobs.
    """
    with sweep.opened(design.about):
        try:
            while batch := design.batch():
                sweep.launch(batch)
                design.tell(batch)
        finally:
            failed = _sum_up(sweep)
        for line in design.outcome():
            console().print(line, markup=False)
    return FAILED if failed else 0


def _sum_up(sweep: Sweep) -> bool:
    """Print the table of the jobs, and leave the report. Returns whether a job failed.

    After Ctrl-C the table is enough: the same command goes on, and reports at its end.
    """
    from proglayer.results.show import print_summary

    failed = print_summary(sweep.folder)
    if sweep.command.master.report and not isinstance(sys.exception(), KeyboardInterrupt):
        leave_report(sweep.folder)
    return failed


def _check_same(job: Job, number: str) -> None:
    """Raise ConfigError where a job waits in a queue with other settings than it has now."""
    record = record_of(job.folder)
    if record is not None and not same_settings(record, job.config):
        raise ConfigError(
            f"hydra.sweep.dir={job.folder.parent}: its job {job.name} is in the queue with other "
            f"settings: choose another folder, or end that job ({number}) first"
        )


def job_folder(number: int, overrides: Sequence[str]) -> str:
    """Return the name of a job's folder in that of its sweep: its number and a short hash."""
    return f"{number}_{short_hash(' '.join(overrides))}"


def _short(folder: Path) -> str:
    """Return a folder as a user would write it."""
    here = Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


# --- a product of values --------------------------------------------------------------------------


def run(command: Command) -> int:
    """Run the product of all values, or plan it, and return the exit status.

    Raises ConfigError with every problem of every job before anything is launched.
    """
    settings = checked(ProductSettings, command.sweeper, "sweeper")
    sweep = Sweep.of(command)
    jobs = sweep.jobs(enumerate(expand(settings, command.arguments, command.loader)))
    if jobs[0].job.config.plan:
        sweep.show_plans(jobs)
        return 0
    return run_design(sweep, Product(jobs, settings.max_batch_size))


class Product:
    """All jobs at once, or `at_once` at a time."""

    about: Mapping[str, Any] = {}

    def __init__(self, jobs: Sequence[Planned], at_once: int | None) -> None:
        self._left = list(jobs)
        self._at_once = at_once

    def batch(self) -> Sequence[Planned]:
        batch = self._left[: self._at_once]
        del self._left[: self._at_once]
        return batch

    def tell(self, jobs: Sequence[Planned]) -> None:
        del jobs

    def outcome(self) -> Iterable[str]:
        return ()


def params_as_overrides(params: Mapping[str, Any] | None) -> list[str]:
    """Return `hydra.sweeper.params` as overrides. Raises ConfigError for a list."""
    overrides = []
    for key, value in (params or {}).items():
        if isinstance(value, list):
            several = ",".join(map(str, value))
            raise ConfigError(
                f"hydra.sweeper.params: {key} is a list: several values are written as "
                f"'{several}' (one value that is a list: '[{several}]'), in quotes"
            )
        overrides.append(f"{key}={'null' if value is None else value}")
    return overrides


def expand(
    settings: ProductSettings, arguments: Sequence[str], loader: ConfigLoader | None
) -> list[tuple[str, ...]]:
    """Return the overrides of each job: the product of all values, paired keys moving together.

    With blocks it is the union of a product for each, which have the other overrides in common.
    What the filter does not hold for is left out.

    Raises ConfigError for pairs, blocks or a filter that do not fit what is given.
    """

    def keyed(overrides: Sequence[str]) -> dict[str, Override]:
        return {each.get_key_element(): each for each in parse(overrides, loader)}

    common = keyed(params_as_overrides(settings.params))
    asked = keyed(arguments)
    blocks = [keyed(params_as_overrides(block)) for block in settings.blocks]
    for block in blocks:
        if twice := sorted(asked.keys() & block.keys()):
            raise ConfigError(
                f"hydra.sweeper.blocks gives {twice[0]}, and so does the command line: keep one"
            )
    all_axes = [
        {
            key: [f"{key}={value}" for value in values_of(each, loader)]
            for key, each in (common | block | asked).items()
        }
        for block in blocks or [{}]
    ]
    for key in itertools.chain.from_iterable(settings.pairs):
        if not any(key in axes for axes in all_axes):
            raise ConfigError(f"hydra.sweeper.pairs names {key}, which has no values here")
    products = [_paired(axes, settings.pairs) for axes in all_axes]
    if sum(math.prod(map(len, product)) for product in products) > MOST_JOBS:
        raise ConfigError(f"these are more than {MOST_JOBS:,} jobs: give them as several sweeps")
    distinct: dict[frozenset[str], tuple[str, ...]] = {}
    for choice in itertools.chain.from_iterable(itertools.product(*each) for each in products):
        overrides = tuple(itertools.chain(*choice))
        distinct.setdefault(frozenset(overrides), overrides)
    jobs = list(distinct.values())
    if settings.filter is None:
        return jobs
    texts = list(dict.fromkeys(itertools.chain.from_iterable(jobs)))
    values = {
        text: (each.key_or_group, plain(each.value()))
        for text, each in zip(texts, parse(texts), strict=True)
    }
    given = [dict(values[text] for text in job) for job in jobs]
    return list(itertools.compress(jobs, is_kept(settings.filter, given)))


def _paired(
    axes: Mapping[str, Sequence[str]], pairs: Sequence[Sequence[str]]
) -> list[list[tuple[str, ...]]]:
    """Return what the product is of: the values of each setting, or of several that go together.

    Raises ConfigError for pairs of unequal length, of keys that have no values, or named twice.
    """
    product = {key: [(value,) for value in values] for key, values in axes.items()}
    for group in pairs:
        if not any(key in axes for key in group):
            continue  # another block has them
        if not 1 < len(group) == len({*group}):
            raise ConfigError(f"hydra.sweeper.pairs: {list(group)} is no pair of settings")
        if wrong := [key for key in group if len(product.get(key, [()])[0]) != 1]:
            raise ConfigError(
                f"hydra.sweeper.pairs: {wrong[0]} has no values here, or stands in two pairs"
            )
        sizes = {key: len(product[key]) for key in group}
        if len({*sizes.values()}) > 1:
            text = ", ".join(f"{key} has {size}" for key, size in sizes.items())
            raise ConfigError(f"hydra.sweeper.pairs need as many values each: {text}")
        together = zip(*(product.pop(key) for key in group[1:]), strict=True)
        first = product[group[0]]
        product[group[0]] = [
            (*one, *itertools.chain(*others)) for one, others in zip(first, together, strict=True)
        ]
    return list(product.values())
