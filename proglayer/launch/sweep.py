"""A sweep: every job checked first, what is distinct launched first, and a table at the end.

Jobs of a sweep share phases. They meet in the store, so any order is right; this order keeps
workers from waiting for each other: one job for each distinct first phase comes first, then one
for each distinct second phase that builds on them, and so on (breadth first over the tree that
the jobs' plans form), and the jobs that only read what those have trained come last.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import logging
import math
import pickle
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from proglayer import files
from proglayer.config import Config, DataConfig, short_hash, to_config, to_plain
from proglayer.console import console
from proglayer.data.corpus import Corpus, open_corpus
from proglayer.errors import ConfigError, StoreError, first_line, with_type
from proglayer.launch.common import (
    jobs_at_once,
    params_as_overrides,
    sole_writer,
    threads_per_job,
    unread,
)
from proglayer.launch.composing import COMPOSING_ERRORS, in_one_line
from proglayer.launch.filter import SETTING as FILTER
from proglayer.launch.filter import Filter
from proglayer.launch.job import leave_report, record_unstarted
from proglayer.launch.overrides import no_match, parse, plain
from proglayer.launch.stored import StoredPlans, follow_store
from proglayer.run.code import git_difference, git_state
from proglayer.run.estimate import PhaseProgress, estimate
from proglayer.run.progress import plan_table
from proglayer.run.signals import interrupt, on_signals
from proglayer.store.record import (
    SUBMITTED,
    SWEEP,
    Heartbeat,
    ListedJob,
    RecordError,
    RunState,
    has_whole_weights,
    note_failed_job,
    read_record,
    read_submission,
    write_jobs,
    write_submissions,
)
from proglayer.training.plan import Phase, StoppingRule, check_checkpoint, plan, training_flops
from proglayer.training.unused import unused_settings

if TYPE_CHECKING:
    from proglayer.store.trajectory import StoredEpochs

log = logging.getLogger(__name__)


class Sweeper(Protocol):
    """What a sweeper of Hydra's has once it is set up."""

    config: DictConfig
    hydra_context: HydraContext
    launcher: Launcher


class ProductSweeper(Sweeper, Protocol):
    """With its settings: see `ProglayerSweeperConf`."""

    max_batch_size: int | None
    params: dict[str, Any]
    pairs: list[list[str]]
    blocks: list[dict[str, Any]]
    filter: str | None


# How Hydra's settings of a sweep begin.
is_multirun = files.begins_with(b"hydra:")
# That of conf/config.yaml, which every record has.
OBJECTIVE = "phases.-1.best.validation_loss"
# Checked in a quarter of an hour.
MOST_JOBS = 10_000
ANY_STOP = StoppingRule(max_epochs=1, patience=1, min_delta=0.0)


class SweepError(ConfigError):
    """What is wrong with every job of a sweep, whatever its values are."""


class Composed:
    """Hydra's loader of configurations, with those of the jobs that were checked.

    Without it a job's settings would be composed again when it is launched, 0.1 s each, from files
    that were edited meanwhile. What is pickled for another process is the loader alone.
    """

    def __init__(self, loader: ConfigLoader) -> None:
        self._loader = loader
        self._kept: dict[tuple[str, ...], bytes] = {}

    def keep(self, overrides: Sequence[str], config: DictConfig) -> None:
        """Have `config` ready for when a launcher asks for these overrides."""
        self._kept[tuple(overrides)] = pickle.dumps(config)  # 22 kB in place of 0.4 MB

    def load_sweep_config(self, master: DictConfig, overrides: list[str]) -> DictConfig:
        """The configuration of one job."""
        if kept := self._kept.get(tuple(overrides)):
            return pickle.loads(kept)
        return self._loader.load_sweep_config(master, overrides)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __reduce__(self) -> Any:
        return _itself, (self._loader,)


def _itself(loader: ConfigLoader) -> ConfigLoader:
    return loader


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
    with contextlib.nullcontext() if sweeper.config.plan else unread(sweeper.config):
        return _sweep(sweeper, arguments)


def _sweep(sweeper: ProductSweeper, arguments: list[str]) -> list[Any]:
    jobs = check(Checks(sweeper), enumerate(expand(sweeper, arguments)))
    if jobs[0].config.plan:
        print_plans(sweeper, jobs)
        return []

    waiting = [job for job in in_launch_order(jobs) if not job.completed]
    # With nothing to run, torch, which knows the machine's part in the keys, is not needed at all.
    work = describe_work(sweeper, jobs) if waiting else None
    if waiting:
        check_launcher(sweeper)
    folder = open_folder(sweeper.config)
    with sole_writer(folder, "hydra.sweep.dir"):
        return _run(sweeper, folder, jobs, waiting, work)


def given_to_hydra(sweeper: Sweeper, setting: str) -> str | None:
    """The override on the command line that begins with a setting of Hydra's."""
    given: Any = OmegaConf.to_container(sweeper.config.hydra.overrides.hydra, resolve=False)
    return next((text for text in map(str, given) if text.startswith(setting)), None)


def print_plans(sweeper: Sweeper, jobs: Sequence[Job]) -> None:
    """Print the phases of each job, what they cost, what of them is stored here, and how long the
    rest may take.
    """
    here = not getattr(sweeper.launcher, "jobs_run_elsewhere", False)
    threads = threads_per_job(sweeper.config.hydra.launcher)
    look = StoredPlans()
    followed = []
    for job in jobs:
        windows = len(job.corpus.train), len(job.corpus.validation)
        config = replace(job.config, threads=job.config.threads or threads)
        stored = look.follow(config, job.corpus, job.phases) if here else None
        followed.append(stored or [])
        said = look.said(config, stored)
        table = plan_table(job.phases, config.data.seq_len, *windows, job.title, said)
        console().print(table)
        if unused := unused_settings(config, job.phases, job.corpus.vocab_size):
            console().print(unused, markup=False)
    if all(followed) or not here:  # not for another machine's device
        console().print(describe_work(sweeper, jobs, followed), markup=False)


def _run(
    sweeper: ProductSweeper, folder: Path, jobs: list[Job], waiting: list[Job], work: str | None
) -> list[JobReturn]:
    """Launch the jobs that wait, in their order, and sum all up."""
    for part in folder, folder / SUBMITTED:
        files.delete_left_over(part)
    not_held = without_held(sweeper, waiting)
    list_jobs(folder, {job.folder: job.overrides for job in jobs}, not_held)
    say = console().print
    say(f"{len(jobs)} jobs in {folder}, {len(jobs) - len(waiting)} finished before", markup=False)
    if work:
        say(work, markup=False)
    with SummedUp(folder, jobs[0].config.report) as ending, Heartbeat(folder):
        returns = launch(sweeper, waiting, sweeper.max_batch_size)
    if ending.failed:
        sys.exit(1)
    return returns


class SummedUp(contextlib.AbstractContextManager["SummedUp"]):
    """Ends the jobs of a block with their table and, if `report` says so, their report.

    Also where a launcher failed. After Ctrl-C the table is enough, as in a search: the same command
    goes on, and reports at its end. After the block `failed` says whether any job did.
    """

    def __init__(self, folder: Path, report: bool) -> None:
        self.folder, self.report = folder, report
        self.failed = False

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        from proglayer.results.summary import print_summary

        self.failed = print_summary(self.folder)
        if self.report and (kind is None or not issubclass(kind, KeyboardInterrupt)):
            leave_report(self.folder)


def launch(sweeper: Sweeper, jobs: Sequence[Job], at_once: int | None = None) -> list[JobReturn]:
    """Run the jobs, `at_once` of them at a time (None: all). Returns how each ended."""
    folder = Path(sweeper.config.hydra.sweep.dir)
    ended: list[JobReturn] = []
    while len(ended) < len(jobs):
        batch = jobs[len(ended) :][:at_once]
        with on_signals(interrupt, once=False):
            returns = sweeper.launcher.launch([job.launched for job in batch], len(ended))
        for job, job_return in zip(batch, returns, strict=True):
            if job_return.status is JobStatus.FAILED:  # by an error that it could not record itself
                reason = with_type(job_return._return_value)
                record_unstarted(folder / job.folder, RunState.failed, reason)
                note_failed_job(folder / job.folder)
        ended += returns
    return ended


def expand(sweeper: ProductSweeper, arguments: list[str]) -> list[tuple[str, ...]]:
    """The overrides of each job: the product of all swept values, paired keys moving together.

    With blocks it is the union of a product for each, which have the other overrides in common.
    What the filter does not hold for is left out.

    Raises ConfigError for pairs, blocks or a filter that do not fit what is given.
    """
    common = _keyed(params_as_overrides(sweeper.params))
    asked = _keyed(arguments)
    blocks = [_keyed(params_as_overrides(block)) for block in sweeper.blocks or ()]
    for block in blocks:
        if twice := sorted(asked.keys() & block.keys()):
            raise ConfigError(
                f"hydra.sweeper.blocks gives {twice[0]}, and so does the command line: keep one"
            )
    all_axes = [_axes(sweeper, common | block | asked) for block in blocks or [{}]]
    pairs = sweeper.pairs or []
    for key in (key for group in pairs for key in group):
        if not any(key in axes for axes in all_axes):
            raise ConfigError(f"hydra.sweeper.pairs names {key}, which has no values here")
    products = [_paired(axes, pairs) for axes in all_axes]
    if sum(math.prod(map(len, product)) for product in products) > MOST_JOBS:
        raise ConfigError(f"these are more than {MOST_JOBS:,} jobs: give them as several sweeps")
    jobs: dict[frozenset[str], tuple[str, ...]] = {}
    for choice in itertools.chain.from_iterable(itertools.product(*each) for each in products):
        overrides = tuple(itertools.chain(*choice))
        jobs.setdefault(frozenset(overrides), overrides)
    if sweeper.filter is None:
        return list(jobs.values())
    return _kept(Filter(str(sweeper.filter)), list(jobs.values()))


def _keyed(overrides: Sequence[str]) -> dict[str, str]:
    """Overrides by the setting that they give."""
    return dict(zip((o.get_key_element() for o in parse(overrides)), overrides, strict=True))


def _axes(sweeper: ProductSweeper, overrides: dict[str, str]) -> dict[str, list[str]]:
    """The override for each value of each setting. Raises ConfigError for one without any."""
    loader = sweeper.hydra_context.config_loader
    parser = OverridesParser.create(config_loader=loader)
    axes: dict[str, list[str]] = {}
    for override in parser.parse_overrides(list(overrides.values())):
        key = override.get_key_element()
        if not override.is_sweep_override():
            axes[key] = [f"{key}={override.get_value_element_as_str()}"]
            continue
        if not override.is_discrete_sweep():
            raise ConfigError(
                f"{override.input_line}: it takes hydra/sweeper=optuna to search an interval; this "
                "sweeper takes lists, range and glob"
            )
        values = itertools.islice(override.sweep_string_iterator(), MOST_JOBS + 1)
        axes[key] = [f"{key}={value}" for value in values]
        if not axes[key]:
            choices = loader.get_group_options(override.key_or_group)
            raise ConfigError(no_match(override.input_line or key, choices))
    return axes


def _paired(
    axes: dict[str, list[str]], pairs: Sequence[Sequence[str]]
) -> list[list[tuple[str, ...]]]:
    """What the product is of: the values of each setting, or of several that move together.

    Raises ConfigError for pairs of unequal length, of keys that have no values, or named twice.
    """
    factors: list[list[tuple[str, ...]]] = []
    paired: dict[str, Sequence[str]] = {}
    for group in pairs:
        if not any(key in axes for key in group):
            continue  # another block has them
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
            factors.append([(value,) for value in values])
        elif key == group[0]:
            factors.append(list(zip(*(axes[name] for name in group), strict=True)))
    return factors


def _kept(keeps: Filter, jobs: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The jobs that a filter keeps. Raises ConfigError where it names what no job is given."""
    distinct = dict.fromkeys(itertools.chain.from_iterable(jobs))
    read = {o.input_line: (o.key_or_group, plain(o.value())) for o in parse(list(distinct))}
    settings = [dict(read[override] for override in job) for job in jobs]
    known = {name for each in settings for name in each}
    for name in sorted(keeps.names - known):
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"{FILTER} names {name}, which has no value here{hint} (text is written in quotes)"
        )
    kept = [job for job, given in zip(jobs, settings, strict=True) if keeps.keeps(given)]
    if not kept:
        raise ConfigError(f"{FILTER} keeps none of {len(jobs)} jobs")
    return kept


class Checks:
    """Composes and plans jobs one by one, opening each corpus once."""

    def __init__(self, sweeper: Sweeper) -> None:
        if named := given_to_hydra(sweeper, "hydra.sweep.subdir"):
            raise ConfigError(
                f"{named}: folders of jobs are named by number and overrides: leave it out"
            )
        self._master = sweeper.config
        self._folder = Path(sweeper.config.hydra.sweep.dir)
        self._loader = Composed(sweeper.hydra_context.config_loader)
        self._corpora: dict[DataConfig, Corpus] = {}
        sweeper.hydra_context.config_loader = cast(ConfigLoader, self._loader)

    def job(self, number: int, overrides: tuple[str, ...]) -> Job:
        """Job `number`. Raises ConfigError."""
        folder = job_folder(number, overrides)
        launched = [*overrides, f"hydra.sweep.subdir='{folder}'", f"hydra.job.num={number}"]
        composed = self._loader.load_sweep_config(self._master, launched)
        config = to_config(composed)
        self._check_hydra(composed, self._folder / folder)
        if config.data not in self._corpora:
            check_checkpoint(config.model)
            # In a sweep Hydra has the log on the console, too.
            self._corpora[config.data] = open_corpus(config.data, log.info)
        corpus = self._corpora[config.data]
        phases = plan(config, corpus.vocab_size)
        for phase in phases:
            phase.windows(len(corpus.train))
        if config.objective != OBJECTIVE:
            _check_objective(config, corpus, phases)
        threads = config.threads or threads_per_job(self._master.hydra.launcher)
        completed = _completed(self._folder / folder, replace(config, threads=threads))
        if not completed:
            self._loader.keep(launched, composed)
        return Job(folder, overrides, tuple(launched), config, corpus, phases, completed)

    def _check_hydra(self, composed: DictConfig, folder: Path) -> None:
        """Raise SweepError for settings of Hydra that would end or change a sweep half-way."""
        if Path(composed.hydra.sweep.dir) != self._folder:
            raise SweepError(
                f"hydra.sweep.dir={composed.hydra.sweep.dir} is another folder than "
                f"{self._folder}: a sweep has one, so its name can depend on no setting"
            )
        for part in ("launcher", "sweeper"):
            if OmegaConf.to_yaml(composed.hydra[part]) != OmegaConf.to_yaml(
                self._master.hydra[part]
            ):
                raise SweepError(
                    f"hydra.{part}: one job has other settings of it than the sweep: give them on "
                    "the command line, not in an experiment that is swept over"
                )
        before = HydraConfig.instance().cfg
        try:
            with read_write(composed), open_dict(composed):
                composed.hydra.runtime.output_dir = str(folder.absolute())
            HydraConfig.instance().set_config(composed)
            for part in (composed.hydra.job.env_set, composed.hydra.job_logging):
                OmegaConf.to_container(part, resolve=True)
        except OmegaConfBaseException as error:
            raise SweepError(f"{error.full_key or 'hydra.job'}: {first_line(error)}") from error
        finally:
            HydraConfig.instance().cfg = before
            OmegaConf.set_readonly(composed.hydra, None)  # Hydra sets it with its configuration


def _check_objective(config: Config, corpus: Corpus, phases: tuple[Phase, ...]) -> None:
    """Raise SweepError where `objective` names no number of the record that comes."""
    from proglayer.run.experiment import check_objective, corpus_record
    from proglayer.store.record import PeakMemory, RunRecord

    record = RunRecord(seed=config.seed, corpus=corpus_record(config, corpus))
    try:
        check_objective(config, record, phases, PeakMemory(process=1.0, device=1.0))
    except ConfigError as error:
        raise SweepError(str(error)) from error


def check(checks: Checks, numbered: Iterable[tuple[int, tuple[str, ...]]]) -> list[Job]:
    """The jobs with these numbers and overrides. Raises ConfigError with the problems of all."""
    jobs: list[Job] = []
    problems: dict[str, str] = {}
    for number, overrides in numbered:
        try:
            jobs.append(checks.job(number, overrides))
        except (ConfigError, *COMPOSING_ERRORS) as error:
            refusal = str(error) if isinstance(error, ConfigError) else in_one_line(error)
            for line in refusal.splitlines():
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


def list_jobs(folder: Path, listed: Mapping[str, Sequence[str]], waiting: Sequence[Job]) -> None:
    """Say in the sweep's folder which jobs there are, and keep what the waiting ones go by.

    That is the settings of each and the state of the code. `listed` has the overrides of each job.
    Raises ConfigError.
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


def check_launcher(sweeper: Sweeper) -> None:
    """Raise ConfigError where the launcher can start nothing here, before anything is left."""
    if (own := getattr(sweeper.launcher, "check", None)) is not None:
        own()


def without_held(sweeper: Sweeper, jobs: Sequence[Job]) -> list[Job]:
    """The jobs that the launcher's scheduler does not hold since an earlier submission.

    Those that it holds stay as they were submitted, and `launch` waits for them. Raises ConfigError
    for one that has other settings now.
    """
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


def describe_work(
    sweeper: Sweeper,
    jobs: Sequence[Job],
    followed: Sequence[Sequence[StoredEpochs | None]] | None = None,
) -> str:
    """In one line, how many phases the jobs have, how many they share, and what is left to do.

    followed: what `follow_store` gave for each job, where that is known.

    Raises ConfigError for a device that is not here, where here is where the jobs run.
    """
    planned = sum(len(job.phases) for job in jobs)
    runs = [[prefix_of(job, d) for d in range(1, 1 + len(job.phases))] for job in jobs]
    distinct = {prefix for run in runs for prefix in run}
    text = f"{planned} phases planned: {len(distinct)} distinct phases"
    launcher = sweeper.config.hydra.launcher
    if getattr(sweeper.launcher, "jobs_run_elsewhere", False):
        # What is stored is stored for a kind of machine, which may not be this one's.
        return f"{text}; what is stored for the machines that run them is not known here"
    if followed is None:
        threads = threads_per_job(launcher)
        followed = [
            follow_store(
                replace(job.config, threads=job.config.threads or threads), job.corpus, job.phases
            )
            for job in jobs
        ]
    phases: dict[Any, PhaseProgress] = {}
    for job, run, stored in zip(jobs, runs, followed, strict=True):
        for prefix, phase, found in zip(run, job.phases, stored, strict=True):
            flops = training_flops(phase, job.config.data.seq_len, len(job.corpus.train))
            progress = PhaseProgress(flops.head + flops.body, phase.stop.max_epochs)
            if found is not None:
                progress = replace(
                    progress,
                    epochs=sum(each.epoch > 0 for each in found.epochs),
                    seconds=sum(e.train_seconds + e.evaluation_seconds for e in found.epochs),
                    complete=found.selected is not None,
                )
            # Jobs that share a phase may stop it differently: it is complete when all would.
            before = phases.setdefault(prefix, progress)
            if before.complete and not progress.complete:
                phases[prefix] = progress
    complete = sum(phase.complete for phase in phases.values())
    text = f"{text}, {complete} of them stored"
    if complete == len(phases):
        return f"{text}: nothing to train"
    left = estimate(phases, runs, jobs_at_once(launcher))
    if left is None:
        return f"{text}; no throughput is known yet to estimate the time from"
    return (
        f"{text}; about {left.seconds / 60:.0f} min for the rest, if it goes as fast as what is "
        f"stored and takes {left.epochs_per_phase:.1f} epochs a phase as that did"
    )


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
        and has_whole_weights(folder, record)
    )
