"""A run, from its settings to its record: read it from top to bottom."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from proglayer import files
from proglayer.config import Config, store_dir
from proglayer.console import tell
from proglayer.data.pretrained import Pretrained
from proglayer.errors import ConfigError, StoreError, UserError, with_type
from proglayer.run import machine
from proglayer.run import record as records
from proglayer.run.environment import environment, git_state, place
from proglayer.run.loggers import Loggers
from proglayer.run.progress import RunDisplay
from proglayer.run.record import WEIGHTS, RunRecord, RunState
from proglayer.run.setup import Setup, set_up
from proglayer.run.signals import Stop
from proglayer.run.waiting import CoreWatch
from proglayer.store.checkpoint import Tensors, load_model
from proglayer.store.entries import key_of, open_store
from proglayer.store.trajectory import Hooks, Interrupted, Trajectory
from proglayer.training.architecture import keyed
from proglayer.training.build import build, grow, restored
from proglayer.training.group import Broken, Group, joined
from proglayer.training.model import Model
from proglayer.training.optim import carried_tensors
from proglayer.training.plan import Phase
from proglayer.training.stopping import EpochMetrics, follow
from proglayer.training.trainer import Diverged, Progress, follow_orders
from proglayer.training.unused import unused_settings

log = logging.getLogger(__name__)

# Called with the record once an epoch is in it. Returns why the run is to end early, or None for it
# to go on.
Prune = Callable[[RunRecord], str | None]


class Ended(NamedTuple):
    """A phase that ended: its trajectory and its selected epoch."""

    trajectory: Trajectory
    epoch: int


def run(
    config: Config,
    folder: Path,
    asked: Mapping[str, Any] | None = None,
    prune: Prune | None = None,
    worker: int = 0,
) -> RunRecord:
    """Walk the plan of `config`, phase by phase, and leave the run's record in `folder`.

    asked: what the record says of its command, as given: `overrides`, `choices`, `git`.
    prune: by this a search ends the run early.
    worker: the number of this process among those that work at once on this machine, which share
        out its GPUs by it.

    Returns the record. What goes wrong is in it, and not raised, but for a device that is not here
    (ConfigError), a store of others (ConfigError) and what cannot be written (StoreError).
    """
    config, picked = machine.with_precision(config)
    if picked:
        tell(picked)
    with on_devices(config, worker) as (device, gpu, group):
        record = RunRecord(
            state=RunState.running,
            started=records.now(),
            config=config.model_dump(mode="json"),
            environment=environment(),
            machine=machine.describe_machine(device, group.size if group else 1),
            gpu=gpu,
            **{"git": git_state(), **(asked or {})},
        )
        with session(config, folder, record, prune, group) as current:
            setup = prepare(config, record)
            if group is not None:
                group.agree(trained_by(setup, device))
            last = None
            with current.at_work():
                for phase in setup.phases:
                    last = train_phase(phase, last, setup, current)
            assert last is not None, "a plan has a phase"
            record.weights_sha256 = keep_weights(last, folder)
            record.objective = records.objective_of(config.objective, record)
    return record


def follow_run(config: Config, worker: int) -> None:
    """Take part in a run of which this process is not the first: it has no folder and no store.

    Raises ConfigError where it cannot take part.
    """
    stop, config = Stop(), machine.with_precision(config)[0]
    setup = set_up(config, {})
    with on_devices(config, worker, setup) as (device, _, group), stop.listening():
        assert group is not None, "there is a first"
        group.stop = stop
        # A signal, a loss that is not finite: the first tells of it.
        with contextlib.suppress(Broken):
            follow_orders(group, [phase.train for phase in setup.phases], setup.corpus, device)


@contextlib.contextmanager
def on_devices(
    config: Config, worker: int, setup: Setup | None = None
) -> Iterator[tuple[torch.device, str | None, Group | None]]:
    """Give the device of this process, the name of its GPU, and the group that it joins, if any.

    setup: what one that is not the first is set up to train.
    """
    device, where = machine.pick_device(config.device, config.precision), place()
    processes = machine.processes_of(config)
    about = trained_by(setup, device) if setup else {}
    with (
        machine.switches(config.threads, config.precision, processes),
        machine.gpu_of(worker * where.local_size + where.local_rank, device) as gpu,
        contextlib.nullcontext()
        if processes == 1
        else joined(
            device, config.join_timeout_s, {"host": socket.gethostname(), "gpu": gpu, **about}
        ) as group,
    ):
        yield device, gpu, group


def trained_by(setup: Setup, device: torch.device) -> dict[str, str | None]:
    """Return what all processes of a run have to have in common, by what a user calls it."""
    phases = {"phases": [keyed(phase.train) for phase in setup.phases]}
    texts = setup.corpus.fingerprint, setup.corpus.test_fingerprint
    return {
        "settings": key_of(phases),
        "text": " ".join(filter(None, texts)),
        "device": device.type,
        "version of torch": str(torch.__version__),
    }


def prepare(config: Config, record: RunRecord) -> Setup:
    """Open the corpus and plan; adds to `record` what that gives.

    Raises ConfigError where settings, corpus and machine do not fit together.
    """
    setup = set_up(config, {})
    if unused := unused_settings(config, setup.phases):
        tell(unused)
    record.corpus = records.corpus_record(setup.corpus)
    if setup.checkpoint is not None:
        record.checkpoint = records.CheckpointRecord(
            path=str(config.model.path),
            revision=setup.checkpoint.revision,
            sha256=setup.phases[0].train.checkpoint_sha256,
            layers=setup.phases[0].train.layers,
        )
    return setup


def train_phase(phase: Phase, previous: Ended | None, setup: Setup, current: Session) -> Ended:
    """Train a phase or read it from the store, and record it.

    It starts from the selected epoch of the one before: the same model, grown. If it diverges, the
    run keeps the last good weights: the best epoch so far, else what the phase started from.
    """
    record, folder = current.record, current.folder
    following = setup.phases[phase.index + 1 : phase.index + 2]
    current.display.phase(phase, len(setup.phases))
    assert record.machine is not None, "the run has begun"
    device = torch.device(record.machine.device or "cpu")
    trajectory = Trajectory(
        store=current.store,
        parent=(previous.trajectory.key, previous.epoch) if previous else None,
        start=functools.partial(starting_model, phase, previous, setup.checkpoint),
        phase=phase,
        corpus=setup.corpus,
        device=device,
        machine=record.machine,
        checkpoint_every_s=current.config.checkpoint_every_s,
        hooks=current.hooks,
        carried=functools.partial(carried_moments, phase, previous),
        keep_optimizer=any(after.train.optimizer.carry != "none" for after in following),
        group=current.group,
    )

    lowest = math.inf

    def on_epoch(metrics: EpochMetrics, best: EpochMetrics | None = None) -> None:
        nonlocal lowest
        test = None
        if best is not None and metrics.validation_loss < lowest:
            # A comparison within a budget counts this epoch if the budget ends before a better one.
            lowest, test = metrics.validation_loss, trajectory.test(metrics.epoch)
        current.add(records.epoch_row(trajectory, metrics, best is metrics, test))

    with trajectory:
        trajectory.entry.mark_used(folder)
        try:
            if phase.train.growth is not None and phase.stop.max_epochs:
                on_epoch(trajectory.epoch(0))
            stopped = follow(phase.stop, trajectory.epochs(), on_epoch)
            assert stopped is not None, "a trajectory has no end of its own"
            best = stopped.best
            exits = trajectory.finish(best.epoch)
            test = trajectory.test(best.epoch)
            record.phases.append(records.phase_record(trajectory, stopped, exits, test))
        except Diverged:
            good = trajectory.best_recorded()
            kept = previous if good is None else Ended(trajectory, good)
            if kept is not None:
                record.weights_sha256 = keep_weights(kept, folder)
            raise
    return Ended(trajectory, best.epoch)


def starting_model(phase: Phase, previous: Ended | None, checkpoint: Pretrained | None) -> Model:
    """Make the model that `phase` begins with: untrained, that of the checkpoint, or the last
    one's selected epoch, grown.
    """
    if previous is None:
        return build(phase.train, checkpoint and checkpoint.folder)
    before = previous.trajectory.phase.train
    with previous.trajectory as trajectory:
        weights = trajectory.weights(previous.epoch)
    return grow(restored(before.layers, asdict(before.architecture), weights), phase.train)


def carried_moments(phase: Phase, previous: Ended | None) -> Tensors:
    """Read what the optimizer of `phase` takes over from the selected epoch of the one before."""
    if previous is None or phase.train.optimizer.carry == "none":
        return {}
    with previous.trajectory as trajectory:
        state = trajectory.optimizer_state(previous.epoch)
    return carried_tensors(state, phase.train, previous.trajectory.phase.train.layers)


def keep_weights(ended: Ended, folder: Path) -> str:
    """Put the selected model into a run's folder: a hard link where that can be had.

    Returns the file's SHA-256.
    """
    with ended.trajectory as trajectory:
        stored = trajectory.weights_file(ended.epoch)
    files.link_or_copy(stored, folder / WEIGHTS)
    return records.hash_weights(folder)


def load_run(folder: str | Path) -> Model:
    """Load the model that a run left in its folder, on the CPU, ready to evaluate.

    Raises ConfigError where no run left a model, RecordError for a damaged record, and StoreError
    where the file is not what the run left.
    """
    folder = Path(folder)
    path = folder / WEIGHTS
    if not path.exists():
        below = ", ".join(sorted(found.parent.name for found in folder.glob(f"*/{WEIGHTS}")))
        which = f"one of {below}" if below else "the folder of one run that has trained"
        raise ConfigError(f"there is no {path}: name {which}")
    if not records.has_whole_weights(folder, records.read_record(folder)):
        raise StoreError(
            f"{path} is not what the run left there, but damaged or written over: the command of "
            "the run, given again, puts it back"
        )
    return load_model(path.read_bytes()).eval()


# --- what surrounds the walk --------------------------------------------------------------------


class Pruned(Exception):
    """The search that the run belongs to gave it up. The message says why."""


@dataclass(frozen=True, eq=False)
class Session:
    """What a run writes to and shows itself by. `record` is what it leaves."""

    config: Config
    folder: Path
    record: RunRecord
    store: Path
    display: RunDisplay
    stop: Stop
    watch: CoreWatch
    loggers: Loggers
    prune: Prune | None
    group: Group | None = None

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Show life, and note a signal, which ends a run at once that is not at work yet."""
        records.write_record(self.folder, self.record)
        alive = records.sign_of_life(self.folder / records.RUN_FILE)
        with alive, self.stop.listening(), contextlib.closing(self.watch):
            yield

    @property
    def hooks(self) -> Hooks:
        """What training asks and tells."""
        return Hooks(lambda: self.stop.signal, self._step, tell)

    def _step(self, progress: Progress) -> None:
        self.display.step(progress)
        assert self.record.machine is not None, "the run has begun"
        # Processes of a group wait for each other, which looks like a want of cores.
        watched = self.record.machine.device == "cpu" and self.group is None
        if watched and (line := self.watch.step(first=progress.step <= 1)):
            tell(line)

    def add(self, epoch: records.EpochRow) -> None:
        """Write an epoch down, and tell the others of it. Raises Pruned."""
        record = self.record
        for row in record.epochs if epoch.best else ():
            row.best = row.best and row.phase != epoch.phase
        record.epochs.append(epoch)
        self.display.epoch(epoch)
        records.write_record(self.folder, record)
        records.write_metrics(self.folder, record)
        if epoch.epoch or epoch.best:  # else it is the start of a phase that will train
            assert record.corpus is not None, "it was opened"
            row = epoch.columns(record.corpus)
            self.loggers.epoch(row)
            if self.prune is not None and (reason := self.prune(record)) is not None:
                raise Pruned(reason)


@contextlib.contextmanager
def session(
    config: Config, folder: Path, record: RunRecord, prune: Prune | None, group: Group | None
) -> Iterator[Session]:
    """Surround the walk through a run's phases: from here on every end is in its record.

    What the block raises goes no further.
    """
    began = time.perf_counter()
    stop = Stop()
    store = store_dir(config.store.dir)
    open_store(store)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (records.METRICS, WEIGHTS):
        (folder / name).unlink(missing_ok=True)
    loggers = Loggers(config.logger, folder, record)
    if group is not None:
        group.stop = stop
    try:
        shown = RunDisplay(), stop, CoreWatch(), loggers
        yield Session(config, folder, record, store, *shown, prune, group)
        record.state = RunState.completed
    except Interrupted as error:
        record.state = RunState.preempted if stop.requeue else RunState.interrupted
        record.reason = str(error)
        when = "when its scheduler starts it again" if stop.requeue else "by the same command"
        tell(f"{error}; it goes on {when}")
    except Pruned as error:
        record.state, record.reason = RunState.pruned, str(error)
        tell(record.reason)
    except UserError as error:
        record.state = RunState.lost if isinstance(error, Broken) else RunState.failed
        record.reason = str(error)
        log.error("%s", error)
    except Exception as error:
        record.state, record.reason = RunState.failed, with_type(error)
        record.traceback = traceback.format_exc()
        log.exception("the run failed")
    record.ended = records.now()
    record.seconds = time.perf_counter() - began
    records.write_record(folder, record)
    loggers.end(record.state)
    if stop.requeue is not None:
        stop.requeue()
