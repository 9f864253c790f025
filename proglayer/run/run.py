"""A run, from its settings to its record."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from proglayer import files
from proglayer.config import Carry, Config, Precision
from proglayer.console import tell
from proglayer.data.corpus import open_corpus
from proglayer.data.pretrained import Pretrained
from proglayer.errors import StoreError, UserError
from proglayer.files import RUN_FILE
from proglayer.run import machine
from proglayer.run.code import git_state
from proglayer.run.record import (
    WEIGHTS,
    CheckpointRecord,
    GitState,
    GrowthRecord,
    PeakMemory,
    PhaseRecord,
    PhaseWork,
    RunRecord,
    RunState,
    Score,
    check_objective,
    corpus_record,
    has_whole_weights,
    now,
    objective_of,
    read_record,
)
from proglayer.run.session import Prune, Session, Setup, give_up, session
from proglayer.store.checkpoint import Tensors, load_model
from proglayer.store.trajectory import Trajectory
from proglayer.training.build import build, grow, restored
from proglayer.training.cost import parameter_counts, training_flops
from proglayer.training.model import Model
from proglayer.training.optim import carried_tensors
from proglayer.training.plan import Phase, open_checkpoint, plan
from proglayer.training.stopping import Stopped, follow
from proglayer.training.trainer import Diverged, ExitMetrics
from proglayer.training.unused import unused_settings


class Ended(NamedTuple):
    """A phase that ended: its trajectory, and its selected epoch with that one's loss."""

    trajectory: Trajectory
    epoch: int
    validation_loss: float


def run(
    config: Config,
    folder: Path,
    overrides: Sequence[str] = (),
    choices: dict[str, str] | None = None,
    prune: Prune | None = None,
    git: GitState | None = None,
) -> RunRecord:
    """Walk the plan of `config`, phase by phase, and leave the run's record in `folder`.

    overrides, choices: the command line and the group options, recorded as given.
    prune: by this a search ends the run early.
    git: the state of the code where this is a copy of it; None: the checkout's.

    Returns the record. What goes wrong is in it, and not raised, but for a ConfigError or
    StoreError before the first phase: then nothing is written.
    """
    record = RunRecord(
        state=RunState.running,
        started=now(),
        overrides=list(overrides),
        choices=choices or {},
        config=config.model_dump(mode="json"),
        environment=machine.environment(),
        git=git or git_state(),
    )
    with machine.switches(config.threads, config.precision):
        try:
            setup = prepare(config, record)
        except UserError:
            raise
        except Exception as error:
            give_up(folder, record, error)
            return record
        with session(config, folder, record, setup, prune) as current:
            last = train_phases(setup, current)
            record.weights_sha256 = keep_weights(last.trajectory, last.epoch, folder)
            record.objective = objective_of(config.objective, record)
    return record


def train_phases(setup: Setup, current: Session) -> Ended:
    """Train every phase or read it from the store, and record it. Returns the last one.

    Each starts from the selected epoch of the one before: the same model, grown.
    """
    previous: Ended | None = None
    for phase in setup.phases:
        current.display.phase(phase)
        machine.reset_peak_memory(setup.device)
        with _trajectory(phase, previous, setup, current) as trajectory:
            if phase.train.growth is not None and phase.stop.max_epochs:
                current.start(phase, trajectory.start_exits()[-1])
            on_epoch = functools.partial(current.epoch, phase, trajectory.counts)
            stopped = follow(phase.stop, trajectory.epochs(), on_epoch)
            assert stopped is not None, "a trajectory has no end of its own"
            exits = trajectory.finish(stopped.best.epoch)
            test = trajectory.test(stopped.best.epoch)
            growth = _growth_record(trajectory, previous, stopped)
        memory = machine.peak_memory_mb(setup.device)
        current.record.phases.append(
            _phase_record(setup, trajectory, stopped, exits, test, memory, growth)
        )
        previous = Ended(trajectory, stopped.best.epoch, stopped.best.validation_loss)
    assert previous is not None, "a plan has a phase"
    return previous


def starting_model(phase: Phase, previous: Ended | None, checkpoint: Path | None) -> Model:
    """The model that `phase` begins with: untrained, that of the folder `checkpoint`, or the last
    one's selected epoch, grown.
    """
    if previous is None:
        return build(phase.train, checkpoint)
    before = previous.trajectory.phase.train
    with previous.trajectory as trajectory:
        weights = trajectory.weights(previous.epoch)
    return grow(restored(before.layers, asdict(before.architecture), weights), phase.train)


def carried_moments(phase: Phase, previous: Ended | None) -> Tensors:
    """What the optimizer of `phase` takes over from the selected epoch of the phase before."""
    if previous is None or phase.train.optimizer.carry is Carry.none:
        return {}
    with previous.trajectory as trajectory:
        state = trajectory.optimizer_state(previous.epoch)
    return carried_tensors(state, phase.train, previous.trajectory.phase.train.layers)


def prepare(config: Config, record: RunRecord) -> Setup:
    """Open the corpus, plan, and look at the machine; adds to `record` what that gives.

    Raises ConfigError where settings, corpus and machine do not fit together.
    """
    assert config.precision is not Precision.auto, "machine.with_precision comes before"
    device = machine.pick_device(config.device, config.precision)
    if warning := machine.precision_warning(device, config.precision):
        tell(warning)
    checkpoint = open_checkpoint(config)
    corpus = open_corpus(config.data, tell)
    phases = plan(config, corpus.vocab_size, checkpoint)
    for phase in phases:
        phase.train.windows(len(corpus.train))
    if unused := unused_settings(config, phases):
        tell(unused)
    record.machine = machine.describe_machine(device)
    record.corpus = corpus_record(corpus)
    record.checkpoint = checkpoint_record(config, checkpoint, phases[0])
    check_objective(config.objective, record.corpus)
    return Setup(device, record.machine, corpus, checkpoint, phases)


def checkpoint_record(
    config: Config, checkpoint: Pretrained | None, first: Phase
) -> CheckpointRecord | None:
    """What the record says of the weights that a run began with; None for an untrained model."""
    if checkpoint is None:
        return None
    return CheckpointRecord(
        path=str(config.model.path),
        revision=checkpoint.revision,
        sha256=first.train.checkpoint_sha256,
        layers=first.train.layers,
    )


@contextlib.contextmanager
def _trajectory(
    phase: Phase, previous: Ended | None, setup: Setup, current: Session
) -> Iterator[Trajectory]:
    """The trajectory of a phase. If it diverges, the run keeps the last good weights: the best
    epoch so far of this phase, else what it started from.
    """
    following = setup.phases[phase.index + 1 : phase.index + 2]
    trajectory = Trajectory(
        store=current.store,
        parent=(previous.trajectory.key, previous.epoch) if previous else None,
        start=functools.partial(
            starting_model, phase, previous, setup.checkpoint and setup.checkpoint.folder
        ),
        phase=phase,
        corpus=setup.corpus,
        device=setup.device,
        machine=setup.machine,
        checkpoint_every_s=current.config.checkpoint_every_s,
        hooks=current.hooks,
        carried=functools.partial(carried_moments, phase, previous),
        keep_optimizer=any(after.train.optimizer.carry is not Carry.none for after in following),
    )
    with trajectory:
        trajectory.entry.mark_used(current.folder)
        try:
            yield trajectory
        except Diverged:
            best = trajectory.best_recorded()
            if best is not None:
                current.record.weights_sha256 = keep_weights(trajectory, best, current.folder)
            elif previous is not None:
                last_good = previous.trajectory, previous.epoch
                current.record.weights_sha256 = keep_weights(*last_good, current.folder)
            raise


def keep_weights(trajectory: Trajectory, epoch: int, folder: Path) -> str:
    """Put the model after `epoch` into a run's folder: a hard link where that can be had.

    Returns:
        the file's SHA-256.
    """
    with trajectory:
        stored = trajectory.weights_file(epoch)
    files.link_or_copy(stored, folder / WEIGHTS)
    with open(folder / WEIGHTS, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _phase_record(
    setup: Setup,
    trajectory: Trajectory,
    stopped: Stopped,
    exits: list[ExitMetrics],
    test: ExitMetrics | None,
    peak_memory_mb: PeakMemory,
    growth: GrowthRecord | None,
) -> PhaseRecord:
    """Return what the record says of a phase."""
    phase, counts = trajectory.phase, trajectory.counts
    spec = phase.train
    parameters, best = parameter_counts(spec), stopped.best
    windows = setup.corpus.train
    trained = [epoch for epoch in stopped.epochs if epoch.epoch]
    flops = [
        training_flops(spec, windows.shape[1] - 1, len(windows), epoch.epoch) for epoch in trained
    ]
    train_seconds = sum(epoch.train_seconds for epoch in trained)
    tokens = sum(epoch.train_tokens for epoch in trained)
    reused = [epoch for epoch in trained if epoch.epoch not in counts.trained]
    return PhaseRecord(
        name=phase.name,
        layers=spec.layers,
        new_layers=list(spec.new_layers) if phase.index else [],
        parameters_total=parameters.total,
        parameters_trainable=parameters.trainable,
        frozen=list(spec.frozen),
        rates=spec.rates,
        exit_weights=list(spec.exit_weights),
        trajectory=trajectory.key,
        epochs=len(trained),
        best_epoch=best.epoch,
        stopped=stopped.reason,
        train_loss=best.train_loss,
        validation=Score(loss=best.validation_loss, accuracy=best.validation_accuracy),
        test=test and Score(loss=test.loss, accuracy=test.accuracy),
        exits={
            each.exit + 1 if spec.layers else 0: Score(loss=each.loss, accuracy=each.accuracy)
            for each in exits
        },
        train_tokens=tokens,
        train_flops_head=sum(epoch.head for epoch in flops),
        train_flops_body=sum(epoch.body for epoch in flops),
        train_seconds=train_seconds,
        evaluation_seconds=sum(epoch.evaluation_seconds for epoch in trained),
        tokens_per_second=tokens / train_seconds if train_seconds else None,
        work=PhaseWork(
            epochs_trained=len(counts.trained),
            epochs_replayed=counts.epochs_replayed,
            epochs_reused=len(reused),
            seconds_saved=sum(e.train_seconds + e.evaluation_seconds for e in reused),
            seconds_waited=counts.waited_seconds,
            peak_memory_mb=peak_memory_mb,
        ),
        growth=growth,
    )


def _growth_record(
    trajectory: Trajectory, previous: Ended | None, stopped: Stopped
) -> GrowthRecord | None:
    """What the growth at the start of a phase did; None where there was none."""
    if trajectory.phase.train.growth is None:
        return None
    losses = [exit.loss for exit in trajectory.start_exits()]
    before = previous.validation_loss if previous else None
    tokens: int | None = 0
    for epoch in stopped.epochs:
        tokens += epoch.train_tokens
        if before is not None and epoch.validation_loss < before:
            break
    else:
        tokens = None
    return GrowthRecord(
        loss_before=before,
        loss_after=losses[-1],
        exit_losses_after=losses,
        tokens_to_recovery=tokens,
        gradient_share_new=trajectory.gradient_shares(),
    )


def load_run(folder: str | Path) -> Model:
    """The model that a run left in its folder, on the CPU, ready to evaluate.

    Raises FileNotFoundError where the run left none, RecordError for a damaged record, and
    StoreError where the file is not what the run left, or no model.
    """
    path = Path(folder) / WEIGHTS
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS}: did the run complete?")
    has_record = (path.parent / RUN_FILE).exists()
    if has_record and not has_whole_weights(path.parent, read_record(path.parent)):
        raise StoreError(
            f"{path} is not what the run left there, but damaged or written over: the command of "
            "the run, given again, puts it back"
        )
    try:
        return load_model(path.read_bytes()).eval()
    except ValueError as error:
        raise StoreError(f"{path} is no model that a run left ({error})") from error
