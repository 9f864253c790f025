"""A sweep: every job checked first, what is distinct launched first, and a table at the end.

Jobs of a sweep share phases. They meet in the store, so any order is right; this order keeps
workers from waiting for each other: one job for each distinct first phase comes first, then one
for each distinct second phase that builds on them, and so on (breadth first over the tree that
the jobs' plans form), and the jobs that only read what those have trained come last.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from proglayer import files
from proglayer.config import (
    Config,
    ConfigError,
    DataConfig,
    short_hash,
    stages_dir,
    to_config,
    to_plain,
)
from proglayer.console import console
from proglayer.data.corpus import Corpus, open_corpus
from proglayer.errors import StoreError
from proglayer.launch.common import jobs_at_once, threads_per_job
from proglayer.launch.composing import COMPOSING_ERRORS, in_one_line
from proglayer.launch.job import DEFERRED, MAY_DEFER, leave_report
from proglayer.run.code import git_difference, git_state
from proglayer.run.progress import plan_table
from proglayer.store.record import (
    SWEEP,
    Heartbeat,
    ListedJob,
    RecordError,
    RunState,
    read_record,
    read_submission,
    write_jobs,
    write_submissions,
)
from proglayer.training.plan import Phase, StoppingRule, plan, training_flops
from proglayer.versions import warn_of_unknown

log = logging.getLogger(__name__)


class HydraSweeper(Protocol):
    """What a sweeper of Hydra's has once it is set up."""

    @property
    def config(self) -> DictConfig | None: ...

    @property
    def hydra_context(self) -> HydraContext | None: ...

    @property
    def launcher(self) -> Launcher | None: ...


class ProductSweeper(HydraSweeper, Protocol):
    """With its settings. `pairs` are keys whose values go together."""

    max_batch_size: int | None
    params: dict[str, str]
    pairs: list[list[str]]


# How Hydra's settings of a sweep begin.
is_multirun = files.begins_with(b"hydra:")
ANY_STOP = StoppingRule(max_epochs=1, patience=1, min_delta=0.0)


class ComposedOnce:
    """Hydra's loader of configurations, which keeps what `compose` made for the launcher.

    Hydra's basic launcher would compose every job a second time, at 0.1 s each; to unpickle one
    takes a hundredth of that, and 22 kB until then. A launcher that hands its jobs to other
    processes gets the loader alone.
    """

    def __init__(self, loader: ConfigLoader) -> None:
        self._loader = loader
        self._kept: dict[tuple[str, ...], bytes] = {}

    def keep(self, overrides: Sequence[str], config: DictConfig) -> None:
        """Have `config` ready for when the launcher asks for these overrides, once."""
        self._kept[tuple(overrides)] = pickle.dumps(config)

    def load_sweep_config(self, master: DictConfig, overrides: list[str]) -> DictConfig:
        """The configuration of one job."""
        kept = self._kept.pop(tuple(overrides), None)
        if kept is None:
            return self._loader.load_sweep_config(master, overrides)
        config = pickle.loads(kept)
        # What was resolved since, such as the sweep's folder with its time, holds for the job.
        OmegaConf.copy_cache(from_config=master, to_config=config)
        return config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __reduce__(self) -> Any:
        return _itself, (self._loader,)


def _itself(loader: ConfigLoader) -> ConfigLoader:
    return loader


class ShortReturns(Callback):
    """Takes out of what a job gives back the settings that its folder holds: 0.4 MB a job, which a
    sweep would keep to its end.
    """

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Called by Hydra, where the job ran."""
        job_return.cfg = job_return.hydra_cfg = None


# Compared by identity: the corpus holds arrays.
@dataclass(frozen=True, eq=False)
class Job:
    """One job of a sweep.

    folder: its name in the sweep's: its number and a short hash.
    launched: its overrides with those that a launcher gets on top, as they were checked.
    completed: whether its folder holds the record of a completed run with these settings.
    """

    folder: str
    overrides: tuple[str, ...]
    launched: tuple[str, ...]
    config: Config
    corpus: Corpus
    phases: tuple[Phase, ...]
    completed: bool

    @property
    def title(self) -> str:
        return f"{self.folder}: {without_hydra(self.overrides)}"


def sweep(sweeper: ProductSweeper, arguments: list[str]) -> list[Any]:
    """Check, plan, launch and sum up the jobs that `arguments` span.

    Raises ConfigError with every problem of every job before anything is launched. Ends the
    process with status 1 if a job failed, after the table of all jobs.
    """
    assert sweeper.config is not None
    assert sweeper.hydra_context is not None
    assert sweeper.launcher is not None
    warn_of_unknown()
    jobs = check(sweeper, expand(sweeper, arguments))
    if jobs[0].config.plan:
        for job in jobs:
            windows = len(job.corpus.train), len(job.corpus.validation)
            table = plan_table(job.phases, job.config.data.seq_len, *windows, job.title)
            console().print(table)
        return []

    waiting = [job for job in in_launch_order(jobs) if not job.completed]
    # With nothing to run, torch, which knows the machine's part in the keys, is not needed at all.
    ahead = describe_ahead(sweeper, jobs) if waiting else None
    folder = open_folder(sweeper.config)
    not_held = without_held(sweeper, waiting)
    announce(folder, {job.folder: job.overrides for job in jobs}, not_held)
    say = console().print
    say(f"{len(jobs)} jobs in {folder}, {len(jobs) - len(waiting)} finished before", markup=False)
    if ahead:
        say(ahead, markup=False)
    returns = []
    stopped = False
    try:
        with Heartbeat(folder):
            returns = launch(sweeper, waiting, sweeper.max_batch_size)
    except KeyboardInterrupt:
        stopped = True
        raise
    finally:
        failed = summarize(folder)
        # Also where a launcher failed. After Ctrl-C the table is enough, as in a search: the same
        # command goes on, and reports at its end.
        if jobs[0].config.report and not stopped:
            leave_report(folder)
    for job_return in returns:
        _ = job_return.return_value  # raises what a job could not record
    if failed:
        sys.exit(1)
    return returns


def launch(
    sweeper: HydraSweeper, jobs: Sequence[Job], at_once: int | None = None, first: int = 0
) -> list[JobReturn]:
    """Run the jobs. Gives how each ended, in the order in which they did.

    The launcher gets `at_once` of them at a time (None: all), numbered from `first` on.

    A job that finds another process at its next phase, of another sweep say, makes room for the
    jobs that do not, and comes again after them; it waits only when all that are left would. Where
    jobs outlive this process it waits at once, as nobody might be there to launch it again.
    """
    assert sweeper.config is not None
    assert sweeper.launcher is not None
    left = [(job, list(job.launched)) for job in jobs]
    ended = []
    while left:
        size = at_once or len(left)
        deferred = []
        for start in range(0, len(left), size):
            batch = left[start : start + size]
            number = first + len(ended) + len(deferred)
            returns = sweeper.launcher.launch([given for _, given in batch], initial_job_idx=number)
            for (job, _), job_return in zip(batch, returns, strict=True):
                done = job_return.status is JobStatus.COMPLETED
                if done and job_return.return_value == DEFERRED:
                    deferred.append(job)
                else:
                    ended.append(job_return)
        may_defer = 1 < len(deferred) < len(left)
        left = [(job, _launched_with(job.overrides, job.folder, may_defer)) for job in deferred]
    return ended


def _launched_with(overrides: Sequence[str], folder: str, may_defer: bool) -> list[str]:
    own = [f"hydra.sweep.subdir='{folder}'"]
    if may_defer:
        own.append(f"hydra.job.env_set.{MAY_DEFER}=yes")
    return [*overrides, *own]


def expand(sweeper: ProductSweeper, arguments: list[str]) -> list[tuple[str, ...]]:
    """The overrides of each job: the product of all swept values, paired keys moving together.

    Raises ConfigError for pairs of unequal length, of keys that have no values, or named twice.
    """
    assert sweeper.hydra_context is not None
    parser = OverridesParser.create(config_loader=sweeper.hydra_context.config_loader)
    given = [f"{key}={value}" for key, value in sweeper.params.items()] + list(arguments)
    axes: dict[str, list[str]] = {}
    for override in parser.parse_overrides(given):
        key = override.get_key_element()
        if override.is_sweep_override():
            if not override.is_discrete_sweep():
                raise ConfigError(
                    f"{override.input_line}: this sweeper takes lists, range and glob"
                )
            axes[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            axes[key] = [f"{key}={override.get_value_element_as_str()}"]
    products: list[list[tuple[str, ...]]] = []
    paired: dict[str, list[str]] = {}
    for group in sweeper.pairs:
        for key in group:
            if key not in axes:
                raise ConfigError(f"hydra.sweeper.pairs names {key}, which has no values here")
            if key in paired:
                raise ConfigError(
                    f"hydra.sweeper.pairs names {key} twice: put what moves together into one group"
                )
            paired[key] = group
        lengths = {key: len(axes[key]) for key in group}
        if len(set(lengths.values())) > 1:
            text = ", ".join(f"{key} has {length}" for key, length in lengths.items())
            raise ConfigError(f"hydra.sweeper.pairs need as many values each: {text}")
    for key, values in axes.items():
        group = paired.get(key)
        if group is None:
            products.append([(value,) for value in values])
        elif key == group[0]:
            products.append(list(zip(*(axes[name] for name in group), strict=True)))
    return [tuple(itertools.chain(*choice)) for choice in itertools.product(*products)]


class Checks:
    """Composes and plans jobs one by one, opening each corpus once."""

    def __init__(self, sweeper: HydraSweeper) -> None:
        assert sweeper.hydra_context is not None
        assert sweeper.config is not None
        self._master = sweeper.config
        self._launcher = sweeper.launcher
        self._loader = ComposedOnce(sweeper.hydra_context.config_loader)
        self._corpora: dict[DataConfig, Corpus] = {}
        sweeper.hydra_context.config_loader = cast(ConfigLoader, self._loader)
        sweeper.hydra_context.callbacks.callbacks.append(ShortReturns())

    def job(self, number: int, overrides: tuple[str, ...], among: int) -> Job:
        """Job `number`, one of `among` that are launched together. Raises ConfigError."""
        folder = job_folder(number, overrides)
        outlives = getattr(self._launcher, "jobs_outlive_command", False)
        launched = _launched_with(overrides, folder, may_defer=among > 1 and not outlives)
        composed = self._loader.load_sweep_config(self._master, launched)
        config = to_config(composed)
        if config.data not in self._corpora:
            # In a sweep Hydra has the log on the console, too.
            self._corpora[config.data] = open_corpus(config.data, log.info)
        corpus = self._corpora[config.data]
        phases = plan(config, corpus.vocab_size)
        for phase in phases:
            phase.windows(len(corpus.train))
        there = Path(self._master.hydra.sweep.dir) / folder
        threads = config.threads or threads_per_job(self._master.hydra.launcher)
        completed = _completed(there, replace(config, threads=threads))
        if in_this_process(self._master.hydra.launcher) and not completed:
            self._loader.keep(launched, composed)
        return Job(folder, overrides, tuple(launched), config, corpus, phases, completed)


def in_this_process(launcher: DictConfig) -> bool:
    """Whether a launcher with these settings runs its jobs in the process of the command."""
    # Not by its class: Hydra loads the modules of its own plugins a second time.
    return str(launcher.get("_target_")).endswith(".BasicLauncher")


def check(sweeper: HydraSweeper, all_overrides: Sequence[tuple[str, ...]]) -> list[Job]:
    """Every job of a sweep. Raises ConfigError with the problems of all of them."""
    checks = Checks(sweeper)
    jobs: list[Job] = []
    problems: dict[str, str] = {}
    for number, overrides in enumerate(all_overrides):
        try:
            jobs.append(checks.job(number, overrides, len(all_overrides)))
        except (ConfigError, *COMPOSING_ERRORS) as error:
            told = str(error) if isinstance(error, ConfigError) else in_one_line(error)
            for line in told.splitlines():
                problems.setdefault(line, without_hydra(overrides))
    if problems:
        raise ConfigError("\n".join(f"{line}  [{text}]" for line, text in problems.items()))
    return jobs


def job_folder(number: int, overrides: Sequence[str]) -> str:
    """The name of a job's folder in that of its sweep: its number and a short hash."""
    return f"{number}_{short_hash(without_hydra(overrides))}"


def open_folder(master: DictConfig) -> Path:
    """Make the sweep's folder and keep in it what was asked. Raises ConfigError."""
    folder = Path(master.hydra.sweep.dir)
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        text = OmegaConf.to_yaml(master)
        files.write_over(folder / "multirun.yaml", text.encode(), is_multirun, SWEEP)
    return folder


def announce(folder: Path, listed: Mapping[str, Sequence[str]], waiting: Sequence[Job]) -> None:
    """Say in the sweep's folder which jobs there are, and keep what the waiting ones go by.

    That is the settings of each and the state of the code: where a job waits in a queue, Hydra
    composes its settings anew when it starts, and what was edited meanwhile would change it.
    `listed` has the overrides of each job. Raises ConfigError.
    """
    listing = [ListedJob(job, tuple(given)) for job, given in listed.items()]
    settings = {job.folder: to_plain(job.config) for job in waiting}
    with _writing(folder):
        write_jobs(folder, listing)
        if settings:
            write_submissions(folder, settings, git_state(), git_difference())


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise ConfigError(
            f"hydra.sweep.dir={folder} cannot be written ({error.strerror}): choose another"
        ) from error


def without_held(sweeper: HydraSweeper, jobs: Sequence[Job]) -> list[Job]:
    """The jobs that the launcher's scheduler does not hold since an earlier submission.

    Those that it holds stay as they were submitted, and `launch` waits for them. Raises ConfigError
    for one that has other settings now.
    """
    assert sweeper.config is not None
    folder = Path(sweeper.config.hydra.sweep.dir)
    ask = getattr(sweeper.launcher, "in_queue", None)
    held: dict[str, str] = ask() if ask is not None else {}
    for job in jobs:
        before = read_submission(folder / job.folder) if job.folder in held else None
        if before is not None and before.config != to_plain(job.config):
            raise ConfigError(
                f"hydra.sweep.dir={folder}: its job {job.folder} is in the queue with other "
                f"settings: choose another folder, or end that job ({held[job.folder]}) first"
            )
    return [job for job in jobs if job.folder not in held]


def in_launch_order(jobs: Sequence[Job]) -> list[Job]:
    """Jobs so that what is distinct starts first: see the module's beginning."""
    order: dict[str, Job] = {}
    covered: set[tuple[Any, ...]] = set()
    for depth in range(1, 1 + max(len(job.phases) for job in jobs)):
        for job in jobs:
            if len(job.phases) >= depth and prefix_of(job, depth) not in covered:
                order.setdefault(job.folder, job)
                covered |= {prefix_of(job, d) for d in range(1, len(job.phases) + 1)}
    return list((order | {job.folder: job for job in jobs}).values())


@dataclass(frozen=True)
class Outlook:
    """What a sweep has before it. Phases are counted once, however many jobs share them.

    `flops_known` and `seconds_known` are of the stored epochs; `flops_an_epoch` of one epoch of
    every phase that is still to be trained, to its end or at all.
    """

    phases: int
    stored: int
    epochs_stored: int
    flops_known: int
    seconds_known: float
    flops_an_epoch: int
    workers: int

    def describe(self) -> str:
        """In one line."""
        text = f"{self.stored} of them stored"
        if self.stored == self.phases:
            return f"{text}: nothing to train"
        if not self.seconds_known or not self.stored:
            return f"{text}: no throughput is known yet to estimate the time from"
        epochs = self.epochs_stored / self.stored
        seconds = self.flops_an_epoch * epochs * self.seconds_known / self.flops_known
        seconds /= self.workers
        return (
            f"{text}; about {seconds / 60:.0f} min for the rest, if it goes as fast as what is "
            f"stored and takes {epochs:.1f} epochs a phase as that did"
        )


def describe_ahead(sweeper: HydraSweeper, jobs: Sequence[Job]) -> str:
    """In one line, how many phases the jobs have, how many they share, and what is left to do.

    Raises ConfigError for a device that is not here, where here is where the jobs run.
    """
    assert sweeper.config is not None
    planned = sum(len(job.phases) for job in jobs)
    distinct = {prefix_of(job, d) for job in jobs for d in range(1, len(job.phases) + 1)}
    text = f"{planned} phases planned: {len(distinct)} distinct phases"
    if getattr(sweeper.launcher, "jobs_run_elsewhere", False):
        # What is stored is stored for a kind of machine, which may not be this one's.
        return f"{text}; what is stored for the machines that run them is not known here"
    return f"{text}, {outlook(jobs, sweeper.config.hydra.launcher).describe()}"


def outlook(jobs: Sequence[Job], launcher: DictConfig) -> Outlook:
    """Follow every job's plan through the store as far as it is trained.

    Raises ConfigError for a device that is not here.
    """
    from proglayer.run import machine
    from proglayer.store.trajectory import stored_epochs

    complete: set[Any] = set()
    unfinished: dict[Any, int] = {}
    read: dict[Any, tuple[int, int, float]] = {}
    for job in jobs:
        config = job.config
        device = machine.pick_device(config.device, config.precision)
        threads = config.threads or threads_per_job(launcher)
        with machine.switches(threads, config.precision):
            here = machine.describe_machine(device)
        parent: tuple[str, int] | None = None
        reachable = config.reuse
        for depth, phase in enumerate(job.phases, start=1):
            prefix = prefix_of(job, depth)
            flops = training_flops(phase, config.data.seq_len, len(job.corpus.train))
            cost = flops.head + flops.body
            if not reachable:
                unfinished[prefix] = cost
                continue
            found = stored_epochs(
                Path(stages_dir(config)), parent, phase, job.corpus.fingerprint, here
            )
            read[found.key] = (
                len(found.epochs) * cost,
                len(found.epochs),
                sum(epoch.train_seconds + epoch.evaluation_seconds for epoch in found.epochs),
            )
            if found.selected is None:
                reachable = False
                unfinished[prefix] = cost
            else:
                complete.add(prefix)
                parent = found.key, found.selected
    complete -= unfinished.keys()
    return Outlook(
        phases=len(complete) + len(unfinished),
        stored=len(complete),
        epochs_stored=sum(epochs for _, epochs, _ in read.values()),
        flops_known=sum(flops for flops, _, _ in read.values()),
        seconds_known=sum(seconds for _, _, seconds in read.values()),
        flops_an_epoch=sum(unfinished.values()),
        workers=jobs_at_once(launcher),
    )


def summarize(*folders: Path) -> bool:
    """Print the table of the jobs of sweeps; True if any of them failed."""
    from proglayer.results.summary import print_summary

    return print_summary(*folders)


def without_hydra(overrides: Sequence[str]) -> str:
    """The overrides that say what a job is, in one line."""
    return " ".join(o for o in overrides if not o.lstrip("+~").startswith("hydra"))


def prefix_of(job: Job, depth: int) -> tuple[Any, ...]:
    """What the first `depth` phases of a job are, for comparing jobs.

    The last one's stopping rule is left out, since it only reads its trajectory. What reuses
    nothing is shared with nobody.
    """
    config = job.config
    *before, last = job.phases[:depth]
    where = config.data, config.device, config.threads, None if config.reuse else job.folder
    return (*where, *before, replace(last, stop=ANY_STOP))


def _completed(folder: Path, config: Config) -> bool:
    """Whether the folder holds a completed run with these settings, its threads among them."""
    try:
        record = read_record(folder)
    except RecordError:
        return False
    return (
        record is not None
        and record.status is RunState.completed
        and record.config == to_plain(config)
    )
