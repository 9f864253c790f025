"""A phase's training as a trajectory: epochs that are on disk first, then freshly trained ones.

What an epoch gives is fixed by where the phase starts and how it trains, not by when it stops. So
stopping early, going on after a kill, sharing a phase between runs and continuing with more
patience are all the same thing: reading a trajectory (the idea of stage trees, Shin et al. 2020,
"Hippo"). The stopping rule is the reader; see `stopping.follow`.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch

from proglayer.data.corpus import Corpus
from proglayer.store.checkpoint import (
    Tensors,
    load_training,
    on_cpu,
    pack_optimizer,
    pack_training,
    pack_weights,
)
from proglayer.store.entries import FORMAT, Entry, Machine, key_of
from proglayer.training.architecture import keyed
from proglayer.training.build import restored
from proglayer.training.group import Group
from proglayer.training.model import Model
from proglayer.training.plan import Phase, TrainSpec
from proglayer.training.stopping import EpochMetrics, best_of, follow
from proglayer.training.trainer import Diverged, ExitMetrics, Progress, Training, evaluate, set_gate

GRADIENTS = "gradients-0001"
STATE_NAME = re.compile(r"state-(\d+)-(\d+)")
# How long to wait for another process's epoch before looking again whether it is stored.
POLL_S = 0.2

T = TypeVar("T")
# How far training is: epochs that are finished, and steps of the one under way.
Position = tuple[int, int]


class Interrupted(Exception):
    """The run was asked to stop; its state is stored. The message names the signal."""


@dataclass
class Hooks:
    """How the outside follows training and stops it.

    stop_requested: returns the name of a signal when the run should end.
    on_step: called after every optimizer step.
    on_wait: called with a line of text when another process trains what this one needs.
    """

    stop_requested: Callable[[], str | None]
    on_step: Callable[[Progress], None]
    on_wait: Callable[[str], None]


@dataclass(eq=False)
class Trajectory:
    """The epochs of one phase from one starting point, stored under their key.

    Use as a context manager: the end frees the lock. Everything that is asked for is read where it
    is stored, else made and stored by the one process that holds the lock (`_stored_or_made`).

    start: returns the model that the phase starts with; called only if something has to be trained.
    carried: returns what the optimizer starts with (see `optim.carried_tensors`).
    keep_optimizer: whether its state at selectable epochs is stored, for a later phase that takes
        it over.
    group: the processes that training and evaluation are shared out to, of which this one is the
        first.
    """

    store: Path
    parent: tuple[str, int] | None
    start: Callable[[], Model]
    phase: Phase
    corpus: Corpus
    device: torch.device
    machine: Machine
    checkpoint_every_s: float
    hooks: Hooks
    carried: Callable[[], Tensors] = dict
    keep_optimizer: bool = False
    group: Group | None = None

    def __post_init__(self) -> None:
        self.description = describe(
            self.parent, self.phase.train, self.corpus.fingerprint, self.machine
        )
        self.key = key_of(self.description)
        self.entry = Entry(self.store, self.key)
        # The epochs that this process trained for the first time.
        self.trained: set[int] = set()
        self._recorded: dict[int, EpochMetrics] = {}
        self._waiting = False
        self._training: Training | None = None
        # The last epoch, if its weights were stored as those of the best so far.
        self._newest: int | None = None
        self._checkpointed = time.monotonic()

    def __enter__(self) -> Trajectory:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self.entry.unlock()
        if self._training is not None and self.group is not None and error is None:
            self.group.order("drop")
        self._training = None

    # -- what a reader asks for -------------------------------------------------------------------

    def epochs(self) -> Iterator[EpochMetrics]:
        """Give epochs 1, 2, ... without end, or epoch 0 where none is to be trained.

        Raises Interrupted, Diverged or StoreError.
        """
        return map(self.epoch, itertools.count(self.phase.stop.first_epoch))

    def epoch(self, number: int) -> EpochMetrics:
        """Give the metrics of an epoch; it is trained from a state before its end."""

        def make() -> None:
            if number:
                self._train_to(number, latest=self._end_of_training(number))
            else:
                last = self.start_exits()[-1]
                start = EpochMetrics(0, None, last.loss, last.accuracy, 0, 0.0, 0.0)
                self.entry.write_json(_name("epoch", 0), asdict(start))

        return self._stored_or_made(lambda: self._stored_epoch(number), make)

    def start_exits(self) -> list[ExitMetrics]:
        """Evaluate the exits of the model that the phase starts with, before its first step."""

        def evaluated() -> list[ExitMetrics]:
            model = self.start().to(self.device)
            set_gate(model, self.phase.train, step=0, steps_per_epoch=1)
            return self._evaluate(model, self.phase.evaluate)

        return self._exits(0, evaluated)

    def gradient_shares(self) -> list[float] | None:
        """Give the new layers' part of the gradient's norm at the first steps after a growth.

        Returns None where nothing is trained.
        """
        if not self.phase.stop.max_epochs:
            return None
        return self._stored_or_made(
            lambda: self.entry.read_json(GRADIENTS),
            lambda: self._train_to(1, latest=self._end_of_training(1)),
        )["new_layers"]

    def finish(self, selected: int) -> list[ExitMetrics]:
        """Store what a later reader needs of a phase that ended: the last state, from which a
        longer patience goes on, and the evaluated exits of the selected epoch.

        Returns:
            the metrics of these exits, bottom exit first.
        """
        if selected == 0:  # there is nothing that cannot be had as it was
            return self.start_exits()
        if self._training is not None:
            self._store_state(self._training)

        def evaluated() -> list[ExitMetrics]:
            metrics, last = self.epoch(selected), self.phase.train.exits - 1
            if self.phase.evaluate == (last,):
                return [ExitMetrics(last, metrics.validation_loss, metrics.validation_accuracy)]
            return self._evaluate(self._model(selected), self.phase.evaluate)

        exits = self._exits(selected, evaluated)
        if self._training is not None:
            # Those that training left on its way back to the selected epoch.
            for position in self._states()[:-1]:
                self.entry.remove(_state_name(position))
        return exits

    def test(self, selected: int) -> ExitMetrics | None:
        """Evaluate the last exit on the test text after the `selected` epoch, once.

        Returns None where the corpus has no such text.
        """
        if self.corpus.test is None:
            return None
        # Training depends on no test text, so the key knows nothing of it: the name does, unless
        # the test text follows from what the key holds.
        text = self.corpus.test_fingerprint
        name = _name("test", selected) + (f"-{int(text[:12], 16)}" if text else "")

        def evaluated() -> dict[str, Any]:
            last = [self.phase.train.exits - 1]
            (metrics,) = self._evaluate(self._model(selected), last, on_test=True)
            return asdict(metrics)

        return ExitMetrics(**self._plain(name, evaluated))

    def weights(self, epoch: int) -> Tensors:
        """Give the model's tensors after `epoch`, on the CPU."""
        return safetensors.torch.load(self._weights(epoch))

    def weights_file(self, epoch: int) -> Path:
        """Find the stored file of the model after `epoch`, which is whole."""
        self._weights(epoch)
        path = self.entry.path(_name("weights", epoch))
        assert path is not None, "it was just read"
        return path

    def optimizer_state(self, epoch: int) -> Tensors:
        """Give the optimizer's tensors after `epoch`, on the CPU."""
        name = _name("optimizer", epoch)
        return safetensors.torch.load(
            self._tensors(name, lambda: pack_optimizer(self._train_to(epoch)))
        )

    def best_recorded(self) -> int | None:
        """Return the epoch with the lowest validation loss of those read so far."""
        epochs = [self._recorded[number] for number in sorted(self._recorded) if number]
        lowest = best_of(epochs, replace(self.phase.stop, min_delta=0.0))
        return lowest.epoch if lowest else None

    # -- stored, or made by one process -----------------------------------------------------------

    def _stored_or_made(self, read: Callable[[], T | None], make: Callable[[], object]) -> T:
        """Return what `read` finds, once this or another process has made it.

        `make` stores what `read` reads. It is called only with the lock.
        """
        while (value := read()) is None:
            if self.entry.locked:
                make()
            else:
                self._try_to_lock()
        return value

    def _plain(self, name: str, made: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return self._stored_or_made(
            lambda: self.entry.read_json(name), lambda: self.entry.write_json(name, made())
        )

    def _tensors(self, name: str, made: Callable[[], bytes]) -> bytes:
        return self._stored_or_made(
            lambda: self.entry.read(name), lambda: self.entry.write(name, made())
        )

    def _try_to_lock(self) -> None:
        """Become the writer, or give another process a moment to store what is wanted."""
        if not self.entry.lock():
            if not self._waiting:
                self.hooks.on_wait(f"phase {self.phase.index + 1} is being trained by another job")
            self._waiting = True
            self._check_stop()
            if not self.entry.lock(POLL_S):
                return
        self._waiting = False
        if self.entry.path("trajectory") is None:
            self.entry.write_json("trajectory", self.description)

    def _stored_epoch(self, number: int) -> EpochMetrics | None:
        if number not in self._recorded and (metrics := _read_epoch(self.entry, number)):
            self._recorded[number] = metrics
        return self._recorded.get(number)

    def _exits(self, epoch: int, made: Callable[[], list[ExitMetrics]]) -> list[ExitMetrics]:
        # An exit's loss is rounded by what it is evaluated with, so neither file stands for both.
        every = len(self.phase.evaluate) == self.phase.train.exits
        name = _name("exits" if every else "trained", epoch)

        plain = self._plain(name, lambda: {"exits": [asdict(exit) for exit in made()]})
        return [ExitMetrics(**row) for row in plain["exits"]]

    def _weights(self, epoch: int) -> bytes:
        def made() -> bytes:
            # Before the first step they are the start's.
            return self._packed(self._train_to(epoch).model if epoch else self.start())

        return self._tensors(_name("weights", epoch), made)

    def _packed(self, model: Model) -> bytes:
        return pack_weights(self.phase.train, on_cpu(model.state_dict()))

    # -- training ---------------------------------------------------------------------------------

    def _train_to(self, epoch: int, latest: Position | None = None) -> Training:
        """Train to the end of `epoch` from the nearest state up to `latest`, or from the start.

        Stores what is not stored yet.
        """
        latest = latest or (epoch, 0)
        training = self._training
        if training is None or _position(training) > latest:
            training = self._training = self._resume(latest)
        while training.epoch < epoch:
            training.train_epoch(lambda progress: self._after_step(training, progress))
            number = training.epoch + 1
            if number == 1 and self.phase.train.growth is not None:
                shares = [float(share) for share in training.gradient_shares]
                self.entry.write_json(GRADIENTS, {"new_layers": shares})
            if self._stored_epoch(number) is not None:
                training.finish_epoch()
                self._keep(training)
            else:
                self._recorded[number] = metrics = self._finish_epoch(training)
                self._keep(training)
                self.entry.write_json(_name("epoch", number), asdict(metrics))
                self.trained.add(number)
        return training

    def _finish_epoch(self, training: Training) -> EpochMetrics:
        """Evaluate and close the epoch under way. Raises Diverged where a loss is not finite."""
        number = training.epoch + 1
        started = time.perf_counter()
        last, frozen = self.phase.train.exits - 1, training.frozen_validation
        (exit,) = self._evaluate(training.model, [last], frozen=frozen, shared=True)
        evaluation_seconds = time.perf_counter() - started
        if not math.isfinite(exit.loss):
            raise Diverged(
                f"the validation loss became {exit.loss} in phase {self.phase.index + 1}, "
                f"epoch {number}: lower lr.base, or add lr.warmup_steps"
            )
        train_loss, train_seconds = training.finish_epoch()
        return EpochMetrics(
            epoch=number,
            train_loss=train_loss,
            validation_loss=exit.loss,
            validation_accuracy=exit.accuracy,
            train_tokens=training.epoch_windows * training.windows.seq_len,
            train_seconds=round(train_seconds, 3),
            evaluation_seconds=round(evaluation_seconds, 3),
        )

    def _keep(self, training: Training) -> None:
        """Store the weights of an epoch that a stopping rule may select: that of the lowest loss,
        which a rule without `min_delta` selects, or the best by the phase's own rule.

        They take the place of the last epoch's if those were not yet waited upon: with any patience
        no rule stopped there.
        """
        epochs = [m for n in range(1, training.epoch + 1) if (m := self._stored_epoch(n))]
        rules = (replace(self.phase.stop, min_delta=0.0), self.phase.stop)
        selectable = {best.epoch for rule in rules if (best := best_of(epochs, rule))}
        newest, self._newest = self._newest, None
        if (epoch := training.epoch) in selectable:
            if self.entry.path(_name("weights", epoch)) is None:
                self.entry.write(_name("weights", epoch), self._packed(training.model))
                self._newest = epoch
            if self.keep_optimizer and self.entry.path(_name("optimizer", epoch)) is None:
                self.entry.write(_name("optimizer", epoch), pack_optimizer(training))
        if newest is not None and newest not in selectable:
            for kind in ("weights", "optimizer"):
                self.entry.remove(_name(kind, newest))

    def _after_step(self, training: Training, progress: Progress) -> None:
        self.hooks.on_step(progress)
        self._check_stop()
        if time.monotonic() - self._checkpointed >= self.checkpoint_every_s:
            self._store_state(training)

    def _check_stop(self) -> None:
        if (signal := self.hooks.stop_requested()) is not None:
            if self._training is not None:
                self._store_state(self._training)
            raise Interrupted(f"stopped by {signal}")

    # -- evaluation -------------------------------------------------------------------------------

    def _evaluate(self, model: Model, exits: Sequence[int], **how: Any) -> list[ExitMetrics]:
        how["between_batches"] = self._check_stop if self.group is None else None
        how["group"] = self.group
        metrics = evaluate(model, self.phase.train, self.corpus, self.device, exits, **how)
        self._check_stop()
        return metrics

    def _model(self, epoch: int) -> Model:
        train = self.phase.train
        model = restored(train.layers, asdict(train.architecture), self.weights(epoch))
        return model.to(self.device)

    # -- states -----------------------------------------------------------------------------------

    def _store_state(self, training: Training) -> None:
        """Store the state of training in place of earlier ones, unless it diverged."""
        if not math.isfinite(training.mean_loss()):
            return
        position = _position(training)
        if self.entry.path(_state_name(position)) is None:
            self.entry.write(_state_name(position), pack_training(training))
        for earlier in self._states():
            if earlier < position:
                self.entry.remove(_state_name(earlier))
        self._checkpointed = time.monotonic()

    def _resume(self, latest: Position) -> Training:
        """Return training in the last stored state up to `latest`, else at the start."""
        self._checkpointed = time.monotonic()
        model = self.start()
        where = self.corpus, self.device, self.carried(), self.group
        training = Training(model, self.phase.train, *where)
        for position in reversed(self._states()):
            if position <= latest and (content := self.entry.read(_state_name(position))):
                load_training(training, content)
                training.epoch, training.step = position
                break
        if self.group is not None:
            training.call_others()
        return training

    def _states(self) -> list[Position]:
        """List where the stored states stand."""
        matches = map(STATE_NAME.fullmatch, self.entry.names("state-"))
        return sorted((int(match[1]), int(match[2])) for match in matches if match)

    def _end_of_training(self, epoch: int) -> Position:
        """Return where `epoch` is trained and still to be evaluated."""
        return epoch - 1, self.phase.train.steps_per_epoch(len(self.corpus.train))


@dataclass(frozen=True)
class StoredEpochs:
    """What the store has of a trajectory: its epochs in a row from the first, as far as a stopping
    rule reads them, and the epoch that the rule selects, None while it would read on.
    """

    key: str
    epochs: tuple[EpochMetrics, ...]
    selected: int | None


def stored_epochs(
    store: Path, parent: tuple[str, int] | None, phase: Phase, fingerprint: str, machine: Machine
) -> StoredEpochs:
    """Read as much of a trajectory as is stored, training nothing."""
    key = key_of(describe(parent, phase.train, fingerprint, machine))
    entry = Entry(store, key)
    epochs: list[EpochMetrics] = []

    def recorded() -> Iterator[EpochMetrics]:
        while metrics := _read_epoch(entry, len(epochs) + phase.stop.first_epoch):
            epochs.append(metrics)
            yield metrics

    stopped = follow(phase.stop, recorded())
    return StoredEpochs(key, tuple(epochs), stopped.best.epoch if stopped else None)


def describe(
    parent: tuple[str, int] | None, train: TrainSpec, fingerprint: str, machine: Machine
) -> dict[str, Any]:
    """Give everything a trajectory depends on as plain data, which its key is the hash of.

    `parent` is the key and the selected epoch of the phase before, None for the first.
    """
    return {
        "format": FORMAT,
        "parent": {"key": parent[0], "epoch": parent[1]} if parent else "fresh",
        "phase": keyed(train),
        "corpus": fingerprint,
        "machine": keyed(machine),
    }


def _read_epoch(entry: Entry, number: int) -> EpochMetrics | None:
    plain = entry.read_json(_name("epoch", number))
    return None if plain is None else EpochMetrics(**plain)


def _position(training: Training) -> Position:
    return training.epoch, training.step


def _name(kind: str, epoch: int) -> str:
    return f"{kind}-{epoch:04d}"


def _state_name(position: Position) -> str:
    return f"state-{position[0]:04d}-{position[1]:06d}"
