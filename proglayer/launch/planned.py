"""What is known of jobs before they run: their phases, what is stored of them, how long it takes.

Jobs of a sweep share phases. They meet in the store, so any order is right; `in_launch_order` keeps
workers from waiting for each other.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from proglayer.config import store_dir
from proglayer.console import console, counted, say
from proglayer.errors import ConfigError
from proglayer.launch.job import Job
from proglayer.run.progress import plan_lines, plan_table
from proglayer.run.record import RunState, has_whole_weights, record_of, same_settings
from proglayer.run.setup import Opened, Setup, once, set_up
from proglayer.training.cost import training_flops
from proglayer.training.plan import Phase, open_checkpoint, plan
from proglayer.training.unused import unused_settings

if TYPE_CHECKING:
    from proglayer.store.trajectory import StoredEpochs


@dataclass(frozen=True, eq=False)
class Planned:
    """A job with its plan. `completed`: its folder holds a completed run with these settings."""

    job: Job
    setup: Setup
    completed: bool


def planned(job: Job, opened: Opened) -> Planned:
    """Plan a job and check what needs its corpus. Raises ConfigError.

    opened: corpora and checkpoints of other jobs; those of this one are added.
    """
    config = job.config
    if config.data not in opened:
        # What does not depend on the text is wrong before it is prepared.
        plan(config, 1, once(opened, config.model, lambda: open_checkpoint(config)))
    setup = set_up(config, opened)
    record = record_of(job.folder)
    completed = (
        record is not None
        and record.state is RunState.completed
        and same_settings(record, config)
        and has_whole_weights(job.folder, record)
    )
    return Planned(job, setup, completed)


def stored_of(each: Planned) -> list[StoredEpochs | None]:
    """Return what the store has of each phase; None where the one before is not complete.

    Raises ConfigError for a device that is not here.
    """
    from proglayer.run import machine
    from proglayer.store.trajectory import stored_epochs

    config, _ = machine.with_precision(each.job.config)
    device = machine.pick_device(config.device, config.precision)
    processes = machine.processes_of(config)
    with machine.switches(config.threads, config.precision, processes):
        here = machine.describe_machine(device, processes)
    store = store_dir(config.store.dir)
    parent: tuple[str, int] | None = None
    stored: list[StoredEpochs | None] = [None] * len(each.setup.phases)
    for n, phase in enumerate(each.setup.phases):
        phase = replace(phase, train=replace(phase.train, precision=config.precision))
        found = stored_epochs(store, parent, phase, each.setup.corpus.fingerprint, here)
        stored[n] = found
        if found.selected is None:
            break
        parent = found.key, found.selected
    return stored


def print_plan(each: Planned, title: str = "plan", elsewhere: bool = False) -> None:
    """Print a job's phases, what they cost, and what is stored of them here.

    elsewhere: the job is to run on a machine whose part of the store is not known here.
    """
    from proglayer.run import machine

    config, corpus, phases = each.job.config, each.setup.corpus, each.setup.phases
    stored: list[str] = []
    held = plan_lines(phases, config.data.seq_len, config.least_devices)
    lines = [*held, unused_settings(config, phases)]
    with contextlib.suppress(ConfigError):  # the device is another machine's
        if not elsewhere:
            lines.append(machine.with_precision(config)[1])
            found = stored_of(each)
            stored += [counted(len(one.epochs) if one else 0, "epoch") for one in found]
    windows = len(corpus.train), len(corpus.validation)
    console().print(plan_table(phases, config.data.seq_len, *windows, title, stored))
    say("\n".join(filter(None, lines)))


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
    phases: dict[Any, PhaseProgress] = {}
    for each, run in zip(jobs, runs, strict=True):
        for prefix, phase, found in zip(run, each.setup.phases, stored_of(each), strict=True):
            progress = _progress(each, phase, found)
            # Jobs that share a phase may stop it differently: it is complete when all would.
            if phases.setdefault(prefix, progress).complete:
                phases[prefix] = progress
    complete = sum(phase.complete for phase in phases.values())
    text = f"{text}, {complete} of them stored"
    left = estimate(phases, runs, at_once)
    if complete == len(phases) or left is None:
        return text
    return (
        f"{text}; about {left / 60:.0f} min for the rest, if it goes as fast and takes as many "
        "epochs a phase as what is stored"
    )


@dataclass(frozen=True)
class PhaseProgress:
    """How far a phase is.

    flops: floating-point operations of one of its epochs.
    max_epochs: how many it may take.
    epochs: how many are stored.
    seconds: what those took, evaluation included.
    complete: whether it needs no further one.
    """

    flops: int
    max_epochs: int
    epochs: int = 0
    seconds: float = 0.0
    complete: bool = False


def estimate(
    phases: Mapping[Hashable, PhaseProgress], runs: Sequence[Sequence[Hashable]], workers: int
) -> float | None:
    """Estimate the seconds until all `runs`, each a row of names in `phases`, are complete.

    A phase that several runs share is trained once. Epochs go as fast as the stored ones, by their
    floating-point operations; an unfinished phase ends after as many epochs as complete ones took,
    of which those that are stored are done. `workers` runs go on at once, and the phases of a run
    one after another.

    Returns None while no phase is complete: how many epochs one takes is not known then.
    """
    complete = [phase.epochs for phase in phases.values() if phase.complete and phase.max_epochs]
    flops = sum(phase.epochs * phase.flops for phase in phases.values())
    seconds = sum(phase.seconds for phase in phases.values())
    if not complete or not seconds:
        return None
    expected = mean(complete)

    def left(phase: PhaseProgress) -> float:
        if phase.complete or not phase.max_epochs:
            return 0.0
        epochs = min(max(expected - phase.epochs, 1.0), phase.max_epochs - phase.epochs)
        return epochs * phase.flops * seconds / flops

    each = {name: left(phase) for name, phase in phases.items()}
    longest = max((sum(each[name] for name in run) for run in runs), default=0.0)
    return max(sum(each.values()) / workers, longest)


def _progress(each: Planned, phase: Phase, found: StoredEpochs | None) -> PhaseProgress:
    """Return how far a phase is."""
    seq_len, windows = each.job.config.data.seq_len, len(each.setup.corpus.train)
    flops = training_flops(phase.train, seq_len, windows)
    epochs = found.epochs if found else ()
    return PhaseProgress(
        flops.head + flops.body,
        phase.stop.max_epochs,
        epochs=sum(epoch.epoch > 0 for epoch in epochs),
        seconds=sum(epoch.train_seconds + epoch.evaluation_seconds for epoch in epochs),
        complete=found is not None and found.selected is not None,
    )


def prefixes(each: Planned) -> list[tuple[Any, ...]]:
    """Return what each phase of a job is together with those before it, for comparing jobs.

    Its own stopping rule is left out, since it only reads its trajectory.
    """
    config, phases = each.job.config, each.setup.phases
    where = config.data, config.device, config.devices, config.threads
    return [(*where, *phases[:depth], phase.train) for depth, phase in enumerate(phases)]
