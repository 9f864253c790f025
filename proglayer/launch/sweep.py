"""A sweep: every job checked first, what is distinct launched first, and a table at the end.

Jobs of a sweep share phases. They meet in the store, so any order is right; this order keeps
workers from waiting for each other: one job for each distinct first phase comes first, then one
for each distinct second phase that builds on them, and so on (breadth first over the tree that
the jobs' plans form), and the jobs that only read what those have trained come last.
"""

from __future__ import annotations

import itertools
import logging
import math
import pickle
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from proglayer import files
from proglayer.config import Config, DataConfig, to_config
from proglayer.console import console
from proglayer.data.corpus import Corpus, open_corpus
from proglayer.errors import ConfigError, first_line, with_type
from proglayer.files import SWEEP_FILE, sole_writer
from proglayer.launch.ask import (
    MOST_JOBS,
    in_one_line,
    is_kept,
    parse,
    plain,
    short_hash,
    values_of,
)
from proglayer.launch.common import (
    Job,
    jobs_at_once,
    params_as_overrides,
    record_of,
    threads_per_job,
    unread,
    without_hydra,
)
from proglayer.launch.job import leave_report, record_unstarted
from proglayer.launch.stored import follow_store, print_plan, stored_here
from proglayer.run.code import git_difference, git_state
from proglayer.run.estimate import PhaseProgress, estimate
from proglayer.run.record import (
    Heartbeat,
    RunState,
    SweepJob,
    SweepRecord,
    check_objective,
    corpus_record,
    has_whole_weights,
    now,
    submit,
    write_sweep,
)
from proglayer.run.signals import interrupt, on_signals
from proglayer.training.cost import training_flops
from proglayer.training.plan import open_checkpoint, plan

if TYPE_CHECKING:
    from proglayer.store.trajectory import StoredEpochs

log = logging.getLogger(__name__)


class Sweeper(Protocol):
    """What a sweeper of Hydra's has once it is set up."""

    config: DictConfig
    hydra_context: HydraContext
    launcher: Any


class ProductSweeper(Sweeper, Protocol):
    """With its settings: see `ProglayerSweeperConf`."""

    max_batch_size: int | None
    params: dict[str, Any]
    pairs: list[list[str]]
    blocks: list[dict[str, Any]]
    filter: str | None


DIFFERENCE = "code.diff"


class SweepError(ConfigError):
    """What is wrong with every job of a sweep, whatever its values are."""


def sweep(sweeper: ProductSweeper, arguments: list[str]) -> list[JobReturn]:
    """Check, plan, launch and sum up the jobs that `arguments` span.

    Raises ConfigError with every problem of every job before anything is launched. Ends the
    process with status 1 if a job failed, after the table of all jobs.
    """
    with unread(sweeper.config):
        jobs = check(Checks(sweeper), enumerate(expand(sweeper, arguments)))
        if jobs[0].config.plan:
            print_plans(sweeper, jobs)
            return []
        waiting = announce(sweeper, jobs)
        folder = open_folder(sweeper.config)
        with sole_writer(folder, "hydra.sweep.dir"):
            try:
                listed = {job.folder: job.overrides for job in jobs}
                returns = launch(sweeper, listed, waiting, sweeper.max_batch_size)
            finally:
                failed = sum_up([folder], jobs[0].config.report)
    if failed:
        sys.exit(1)
    return returns


def given_to_hydra(sweeper: Sweeper, setting: str) -> str | None:
    """The override on the command line that begins with a setting of Hydra's."""
    given: Any = OmegaConf.to_container(sweeper.config.hydra.overrides.hydra, resolve=False)
    return next((text for text in map(str, given) if text.startswith(setting)), None)


def print_plans(sweeper: Sweeper, jobs: Sequence[Job]) -> None:
    """Print the plan of each job, and how long what is left of all may take."""
    elsewhere = jobs_run_elsewhere(sweeper)
    followed = []
    for job in jobs:
        stored = [] if elsewhere else stored_here(job.config, job.corpus, job.phases)
        title = f"{job.folder}: {without_hydra(job.overrides)}"
        print_plan(job.config, job.corpus, job.phases, title, stored)
        followed.append(stored)
    if all(followed) or elsewhere:  # not for another machine's device
        console().print(describe_work(sweeper, jobs, followed), markup=False)


def announce(sweeper: Sweeper, jobs: Sequence[Job]) -> list[Job]:
    """Say what there is to do. Returns the jobs that did not complete, in the order of launching.

    Raises ConfigError where they cannot be launched here.
    """
    waiting = [job for job in in_launch_order(jobs) if not job.completed]
    before = len(jobs) - len(waiting)
    lines = [f"{len(jobs)} jobs in {sweeper.config.hydra.sweep.dir}, {before} finished before"]
    # With nothing to run, torch, which knows the machine's part in the keys, is not needed at all.
    if waiting:
        check_launcher(sweeper)
        lines.append(describe_work(sweeper, jobs))
    for line in lines:
        console().print(line, markup=False)
    return waiting


def sum_up(folders: Sequence[Path], report: bool) -> bool:
    """Print the table of the jobs in `folders`, and leave the report in the last if it is wanted.

    After Ctrl-C the table is enough: the same command goes on, and reports at its end.

    Returns whether a job failed.
    """
    from proglayer.results.summary import print_summary

    failed = print_summary(*folders)
    if report and not isinstance(sys.exception(), KeyboardInterrupt):
        leave_report(folders[-1], *folders[:-1])
    return failed


def launch(
    sweeper: Sweeper,
    listed: Mapping[str, Sequence[str]],
    jobs: Sequence[Job],
    at_once: int | None = None,
) -> list[JobReturn]:
    """Run jobs, `at_once` of them at a time (None or less than 1: all).

    The sweep's folder says first which jobs it has (`listed`: the overrides by the folder), and
    keeps the settings and the state of the code that these go by. Those that the launcher's
    scheduler holds since an earlier command stay as they were submitted, and are waited for.

    Returns how each ended. Raises ConfigError where a held one has other settings now.
    """
    folder = Path(sweeper.config.hydra.sweep.dir)
    ask = getattr(sweeper.launcher, "in_queue", None)
    held: dict[str, str] = ask() if ask is not None else {}
    for job in jobs:
        before = record_of(folder / job.folder) if job.folder in held else None
        if before is not None and before.config not in (None, job.config.model_dump(mode="json")):
            raise ConfigError(
                f"hydra.sweep.dir={folder}: its job {job.folder} is in the queue with other "
                f"settings: choose another folder, or end that job ({held[job.folder]}) first"
            )
    _list_jobs(folder, listed, [job for job in jobs if job.folder not in held])
    ended: list[JobReturn] = []
    size = at_once if at_once and at_once > 0 else max(1, len(jobs))
    with Heartbeat(folder / SWEEP_FILE):
        for batch in (jobs[start : start + size] for start in range(0, len(jobs), size)):
            sweeper.launcher.jobs = batch
            with on_signals(interrupt, once=False):
                returns = sweeper.launcher.launch([job.launched for job in batch], len(ended))
            for job, job_return in zip(batch, returns, strict=True):
                if job_return.status is JobStatus.FAILED:  # by an error that it could not record
                    reason = with_type(job_return._return_value)
                    record_unstarted(folder / job.folder, RunState.failed, reason)
            ended += returns
    return ended


def _list_jobs(folder: Path, listed: Mapping[str, Sequence[str]], new: Sequence[Job]) -> None:
    """Say in the folder of a sweep which jobs it has, and what those that are to come go by."""
    git = git_state()
    write_sweep(
        folder,
        SweepRecord(
            jobs=[SweepJob(folder=job, overrides=list(given)) for job, given in listed.items()],
            command=sys.argv,
            git=git,
            submitted=now(),
        ),
    )
    difference = folder / DIFFERENCE
    if git is not None and git.changed:
        files.write_atomically(difference, git_difference().encode())
    for job in new:
        submit(folder / job.folder, list(job.overrides), job.config.model_dump(mode="json"), git)


def expand(sweeper: ProductSweeper, arguments: list[str]) -> list[tuple[str, ...]]:
    """The overrides of each job: the product of all swept values, paired keys moving together.

    With blocks it is the union of a product for each, which have the other overrides in common.
    What the filter does not hold for is left out.

    Raises ConfigError for pairs, blocks or a filter that do not fit what is given.
    """
    loader = sweeper.hydra_context.config_loader

    def keyed(overrides: Sequence[str]) -> dict[str, Override]:
        return {each.get_key_element(): each for each in parse(overrides, loader)}

    common = keyed(params_as_overrides(sweeper.params))
    asked = keyed(arguments)
    blocks = [keyed(params_as_overrides(block)) for block in sweeper.blocks or ()]
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
    pairs = sweeper.pairs or []
    for key in itertools.chain.from_iterable(pairs):
        if not any(key in axes for axes in all_axes):
            raise ConfigError(f"hydra.sweeper.pairs names {key}, which has no values here")
    products = [_paired(axes, pairs) for axes in all_axes]
    if sum(math.prod(map(len, product)) for product in products) > MOST_JOBS:
        raise ConfigError(f"these are more than {MOST_JOBS:,} jobs: give them as several sweeps")
    distinct: dict[frozenset[str], tuple[str, ...]] = {}
    for choice in itertools.chain.from_iterable(itertools.product(*each) for each in products):
        overrides = tuple(itertools.chain(*choice))
        distinct.setdefault(frozenset(overrides), overrides)
    jobs = list(distinct.values())
    if sweeper.filter is None:
        return jobs
    texts = list(dict.fromkeys(itertools.chain.from_iterable(jobs)))
    values = {
        text: (each.key_or_group, plain(each.value()))
        for text, each in zip(texts, parse(texts), strict=True)
    }
    settings = [dict(values[text] for text in job) for job in jobs]
    return list(itertools.compress(jobs, is_kept(str(sweeper.filter), settings)))


def _paired(
    axes: dict[str, list[str]], pairs: Sequence[Sequence[str]]
) -> list[list[tuple[str, ...]]]:
    """What the product is of: the values of each setting, or of several that move together.

    Raises ConfigError for pairs of unequal length, of keys that have no values, or named twice.
    """
    alone = dict(axes)
    together: dict[str, list[tuple[str, ...]]] = {}
    for group in pairs:
        values = {key: alone.pop(key) for key in group if key in alone}
        if not any(key in axes for key in group):
            continue  # another block has them
        for key in group:
            if key not in values:
                twice = " twice: put what moves together into one group"
                raise ConfigError(
                    f"hydra.sweeper.pairs names {key}"
                    + (twice if key in axes else ", which has no values here")
                )
        if len({*map(len, values.values())}) > 1:
            text = ", ".join(f"{key} has {len(own)}" for key, own in values.items())
            raise ConfigError(f"hydra.sweeper.pairs need as many values each: {text}")
        together[group[0]] = list(zip(*values.values(), strict=True))
    return [
        together[key] if key in together else [(value,) for value in values]
        for key, values in axes.items()
        if key in together or key in alone
    ]


class Checks:
    """Composes and plans jobs one by one, opening each corpus once."""

    def __init__(self, sweeper: Sweeper) -> None:
        if named := given_to_hydra(sweeper, "hydra.sweep.subdir"):
            raise ConfigError(
                f"{named}: folders of jobs are named by number and overrides: leave it out"
            )
        self._master = sweeper.config
        self._folder = Path(sweeper.config.hydra.sweep.dir)
        self._loader = sweeper.hydra_context.config_loader
        self._threads = threads_per_job(sweeper.config.hydra.launcher)
        self._corpora: dict[DataConfig, Corpus] = {}

    def job(self, number: int, overrides: tuple[str, ...]) -> Job:
        """Job `number`. Raises ConfigError."""
        folder = job_folder(number, overrides)
        launched = [*overrides, f"hydra.sweep.subdir='{folder}'", f"hydra.job.num={number}"]
        try:
            composed = self._loader.load_sweep_config(self._master, launched)
        except Exception as error:
            raise SweepError(in_one_line(error)) from error
        config = to_config(composed)
        config = config.model_copy(update={"threads": config.threads or self._threads})
        self._check_hydra(composed, self._folder / folder)
        checkpoint = open_checkpoint(config)
        if config.data not in self._corpora:
            # In a sweep Hydra has the log on the console, too.
            self._corpora[config.data] = open_corpus(config.data, log.info)
        corpus = self._corpora[config.data]
        phases = plan(config, corpus.vocab_size, checkpoint)
        for phase in phases:
            phase.train.windows(len(corpus.train))
        _check_objective(config, corpus)
        completed = _completed(self._folder / folder, config)
        packed = b"" if completed else pickle.dumps(composed)
        given = number, folder, overrides, tuple(launched), packed
        return Job(*given, config, corpus, phases, completed)

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


def _check_objective(config: Config, corpus: Corpus) -> None:
    """Raise SweepError where `objective` names no number of the record that comes."""
    try:
        check_objective(config.objective, corpus_record(corpus))
    except ConfigError as error:
        raise SweepError(str(error)) from error


def check(checks: Checks, numbered: Iterable[tuple[int, tuple[str, ...]]]) -> list[Job]:
    """The jobs with these numbers and overrides. Raises ConfigError with the problems of all."""
    jobs: list[Job] = []
    problems: dict[str, str] = {}
    for number, overrides in numbered:
        try:
            jobs.append(checks.job(number, overrides))
        except ConfigError as error:
            for line in str(error).splitlines():
                problems.setdefault(line, without_hydra(overrides))
    if problems:
        raise ConfigError("\n".join(f"{line}  [{text}]" for line, text in problems.items()))
    return jobs


def job_folder(number: int, overrides: Sequence[str]) -> str:
    """The name of a job's folder in that of its sweep: its number and a short hash."""
    return f"{number}_{short_hash(without_hydra(overrides))}"


def open_folder(master: DictConfig) -> Path:
    """Make the sweep's folder and keep in it what was asked. Raises StoreError or OSError."""
    folder = Path(master.hydra.sweep.dir)
    folder.mkdir(parents=True, exist_ok=True)
    text = OmegaConf.to_yaml(master)
    files.write_atomically(folder / "multirun.yaml", text.encode())
    return folder


def check_launcher(sweeper: Sweeper) -> None:
    """Raise ConfigError where the launcher can start nothing here, before anything is left."""
    if (own := getattr(sweeper.launcher, "check", None)) is not None:
        own()


def jobs_run_elsewhere(sweeper: Sweeper) -> bool:
    """Whether this process cannot know the machines that jobs run on."""
    return getattr(sweeper.launcher, "jobs_run_elsewhere", False)  # another's has no such field


def in_launch_order(jobs: Sequence[Job]) -> list[Job]:
    """Jobs so that what is distinct starts first: see the module's beginning."""
    order: dict[str, Job] = {}
    covered: set[tuple[Any, ...]] = set()
    runs = [prefixes(job) for job in jobs]
    for depth in range(max(map(len, runs))):
        for job, run in zip(jobs, runs, strict=True):
            if depth < len(run) and run[depth] not in covered:
                order.setdefault(job.folder, job)
                covered.update(run)
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
    runs = [prefixes(job) for job in jobs]
    distinct = set(itertools.chain.from_iterable(runs))
    text = f"{sum(map(len, runs))} phases planned: {len(distinct)} distinct phases"
    if jobs_run_elsewhere(sweeper):
        # What is stored is stored for a kind of machine, which may not be this one's.
        return f"{text}; what is stored for the machines that run them is not known here"
    if followed is None:
        followed = [follow_store(job.config, job.corpus, job.phases) for job in jobs]
    phases: dict[Any, PhaseProgress] = {}
    for job, run, stored in zip(jobs, runs, followed, strict=True):
        for prefix, phase, found in zip(run, job.phases, stored, strict=True):
            flops = training_flops(phase.train, job.config.data.seq_len, len(job.corpus.train))
            epochs = found.epochs if found else ()
            progress = PhaseProgress(
                flops.head + flops.body,
                phase.stop.max_epochs,
                epochs=sum(each.epoch > 0 for each in epochs),
                seconds=sum(each.train_seconds + each.evaluation_seconds for each in epochs),
                complete=found is not None and found.selected is not None,
            )
            # Jobs that share a phase may stop it differently: it is complete when all would.
            before = phases.setdefault(prefix, progress)
            if before.complete and not progress.complete:
                phases[prefix] = progress
    complete = sum(phase.complete for phase in phases.values())
    text = f"{text}, {complete} of them stored"
    if complete == len(phases):
        return f"{text}: nothing to train"
    left = estimate(phases, runs, jobs_at_once(sweeper.config.hydra.launcher))
    if left is None:
        return f"{text}; no throughput is known yet to estimate the time from"
    return (
        f"{text}; about {left.seconds / 60:.0f} min for the rest, if it goes as fast as what is "
        f"stored and takes {left.epochs_per_phase:.1f} epochs a phase as that did"
    )


def prefixes(job: Job) -> list[tuple[Any, ...]]:
    """What each phase of a job is together with those before it, for comparing jobs.

    Its own stopping rule is left out, since it only reads its trajectory.
    """
    config = job.config
    where = config.data, config.device, config.threads
    return [(*where, *job.phases[:depth], phase.train) for depth, phase in enumerate(job.phases)]


def _completed(folder: Path, config: Config) -> bool:
    """Whether the folder holds a completed run with these settings, its threads among them."""
    record = record_of(folder)
    return (
        record.state is RunState.completed
        and record.config == config.model_dump(mode="json")
        and has_whole_weights(folder, record)
    )
