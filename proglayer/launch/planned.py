"""What is known of jobs before they run: their phases, what is stored of them, how long it takes.

Jobs of a sweep share phases. They meet in the store, so any order is right; `in_launch_order` keeps
workers from waiting for each other.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proglayer.config import DataConfig, store_dir
from proglayer.console import console, counted, tell
from proglayer.data.corpus import Corpus, open_corpus
from proglayer.errors import ConfigError, printable
from proglayer.launch.job import Job, record_of, same_settings
from proglayer.run.estimate import PhaseProgress, estimate
from proglayer.run.progress import plan_table
from proglayer.run.record import RunState, check_objective, corpus_record, has_whole_weights
from proglayer.training.cost import training_flops
from proglayer.training.plan import Phase, open_checkpoint, plan
from proglayer.training.unused import unused_settings

if TYPE_CHECKING:
    from proglayer.store.trajectory import StoredEpochs


# Compared by identity: the corpus holds arrays.
@dataclass(frozen=True, eq=False)
class Planned:
    """A job with its plan. `completed`: its folder holds a completed run with these settings."""

    job: Job
    corpus: Corpus
    phases: tuple[Phase, ...]
    completed: bool


class Planner:
    """Plans jobs one by one, opening each corpus once."""

    def __init__(self) -> None:
        self._corpora: dict[DataConfig, Corpus] = {}

    def plan(self, job: Job) -> Planned:
        """Plan a job and check what needs its corpus. Raises ConfigError."""
        config = job.config
        checkpoint = open_checkpoint(config)
        if config.data not in self._corpora:
            self._corpora[config.data] = open_corpus(config.data, tell)
        corpus = self._corpora[config.data]
        phases = plan(config, corpus.vocab_size, checkpoint)
        for phase in phases:
            phase.train.windows(len(corpus.train))
        check_objective(config.objective, corpus_record(corpus))
        record = record_of(job.folder)
        completed = (
            record is not None
            and record.state is RunState.completed
            and same_settings(record, config)
            and has_whole_weights(job.folder, record)
        )
        return Planned(job, corpus, phases, completed)


def stored_of(planned: Planned) -> list[StoredEpochs | None]:
    """Return what the store has of each phase; None where the one before is not complete.

    Raises ConfigError for a device that is not here.
    """
    from proglayer.run import machine
    from proglayer.store.trajectory import stored_epochs

    config, _ = machine.with_precision(planned.job.config)
    device = machine.pick_device(config.device, config.precision)
    with machine.switches(config.threads, config.precision):
        here = machine.describe_machine(device)
    parent: tuple[str, int] | None = None
    reachable = True
    stored: list[StoredEpochs | None] = []
    for phase in planned.phases:
        found = None
        if reachable:
            phase = replace(phase, train=replace(phase.train, precision=config.precision))
            store = Path(store_dir(config))
            found = stored_epochs(store, parent, phase, planned.corpus.fingerprint, here)
            reachable = found.selected is not None
            parent = found.key, found.selected or 0
        stored.append(found)
    return stored


def print_plan(planned: Planned, title: str = "plan", elsewhere: bool = False) -> None:
    """Print a job's phases, what they cost, and what is stored of them here.

    elsewhere: the job is to run on a machine whose part of the store is not known here.
    """
    config, corpus = planned.job.config, planned.corpus
    try:
        stored = [] if elsewhere else stored_of(planned)
    except ConfigError:  # the device is another machine's
        stored = []
    said = []
    for found in stored if Path(store_dir(config)).is_dir() else ():
        epochs = counted(len(found.epochs), "epoch") if found and found.epochs else "no"
        goes_on = found is not None and found.epochs and found.selected is None
        said.append(f"{epochs}, goes on" if goes_on else epochs)
    windows = len(corpus.train), len(corpus.validation)
    console().print(plan_table(planned.phases, config.data.seq_len, *windows, title, said))
    if unused := unused_settings(config, planned.phases):
        console().print(printable(unused), markup=False)


def in_launch_order(jobs: Sequence[Planned]) -> list[Planned]:
    """Order jobs so that what is distinct starts first.

    One job for each distinct first phase comes first, then one for each distinct second phase that
    builds on them, and so on (breadth first over the tree that the plans form). Those that only
    read what these have trained come last.
    """
    order: dict[Path, Planned] = {}
    covered: set[tuple[Any, ...]] = set()
    runs = [prefixes(each) for each in jobs]
    for depth in range(max(map(len, runs), default=0)):
        for each, run in zip(jobs, runs, strict=True):
            if depth < len(run) and run[depth] not in covered:
                order.setdefault(each.job.folder, each)
                covered.update(run)
    return list((order | {each.job.folder: each for each in jobs}).values())


def describe_work(jobs: Sequence[Planned], at_once: int, elsewhere: bool) -> str:
    """Say in one line how many phases there are, how many are shared, and what is left to do.

    at_once: how many jobs run at once. elsewhere: what is stored for the machines that run the
    jobs is not known here.

    Raises ConfigError for a device that is not here, where here is where the jobs run.
    """
    runs = [prefixes(each) for each in jobs]
    distinct = set(itertools.chain.from_iterable(runs))
    text = f"{sum(map(len, runs))} phases planned: {len(distinct)} distinct phases"
    if elsewhere:
        return f"{text}; what is stored for the machines that run them is not known here"
    phases = _progress(jobs, runs)
    complete = sum(phase.complete for phase in phases.values())
    text = f"{text}, {complete} of them stored"
    if complete == len(phases):
        return f"{text}: nothing to train"
    left = estimate(phases, runs, at_once)
    if left is None:
        return f"{text}; no throughput is known yet to estimate the time from"
    return (
        f"{text}; about {left / 60:.0f} min for the rest, if it goes as fast and takes as many "
        "epochs a phase as what is stored"
    )


def _progress(
    jobs: Sequence[Planned], runs: Iterable[Sequence[Any]]
) -> Mapping[Any, PhaseProgress]:
    """Return how far each distinct phase is."""
    phases: dict[Any, PhaseProgress] = {}
    for each, run in zip(jobs, runs, strict=True):
        for prefix, phase, found in zip(run, each.phases, stored_of(each), strict=True):
            windows = len(each.corpus.train)
            flops = training_flops(phase.train, each.job.config.data.seq_len, windows)
            epochs = found.epochs if found else ()
            progress = PhaseProgress(
                flops.head + flops.body,
                phase.stop.max_epochs,
                epochs=sum(epoch.epoch > 0 for epoch in epochs),
                seconds=sum(epoch.train_seconds + epoch.evaluation_seconds for epoch in epochs),
                complete=found is not None and found.selected is not None,
            )
            # Jobs that share a phase may stop it differently: it is complete when all would.
            before = phases.setdefault(prefix, progress)
            if before.complete and not progress.complete:
                phases[prefix] = progress
    return phases


def prefixes(planned: Planned) -> list[tuple[Any, ...]]:
    """Return what each phase of a job is together with those before it, for comparing jobs.

    Its own stopping rule is left out, since it only reads its trajectory.
    """
    config, phases = planned.job.config, planned.phases
    where = config.data, config.device, config.threads
    return [(*where, *phases[:depth], phase.train) for depth, phase in enumerate(phases)]
