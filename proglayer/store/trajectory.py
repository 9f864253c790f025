"""A phase's training as a trajectory: epochs that are on disk first, then freshly trained ones.

What an epoch gives is fixed by where the phase starts and how it trains, not by when it stops. So
stopping early, going on after a kill, sharing a phase between runs and continuing with more
patience are all the same thing: reading a trajectory (the idea of stage trees, Shin et al. 2020,
"Hippo"). The stopping rule is the reader; see `stopping.follow`.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic_core import to_jsonable_python

from proglayer.data.corpus import Corpus
from proglayer.errors import UserError
from proglayer.store.checkpoint import (
    Tensors,
    load_training,
    on_cpu,
    pack_optimizer,
    pack_training,
    pack_weights,
    trainable_parameters,
)
from proglayer.store.stages import FORMAT, Machine, Stage, stage_key
from proglayer.training.build import restored
from proglayer.training.model import Model
from proglayer.training.optim import trains
from proglayer.training.plan import Phase, TrainSpec
from proglayer.training.stopping import EpochMetrics, best_of, follow
from proglayer.training.trainer import Diverged, ExitMetrics, Progress, Training, evaluate, set_gate

STATE_NAME = re.compile(r"state-(\d+)-(\d+)")

# How long to wait for another process's epoch before looking again whether it is stored.
POLL_S = 0.2


class NotMoved(UserError):
    """A tensor that should train is where it was when the phase began."""


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


@dataclass
class Counts:
    """What a trajectory cost this process.

    trained: the epochs that it trained for the first time.
    epochs_replayed: how many it trained again on the way to others.
    waited_seconds: how long it waited for another process.
    """

    trained: set[int] = field(default_factory=set)
    epochs_replayed: int = 0
    waited_seconds: float = 0.0


@dataclass(eq=False)
class Trajectory:
    """The epochs of one phase from one starting point, stored under their key.

    Use as a context manager: the end frees the stage's lock.

    start: returns the model that the phase starts with; called only if something has to be trained.
    carried: returns what the optimizer starts with (see `optim.carried_tensors`).
    keep_optimizer: whether its state at selectable epochs is stored, for a later phase that takes
        it over.
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

    def __post_init__(self) -> None:
        self.description = describe(
            self.parent, self.phase.train, self.corpus.fingerprint, self.machine
        )
        self.stage = Stage(self.store, stage_key(self.description))
        self.counts = Counts()
        self._recorded: dict[int, EpochMetrics] = {}
        self._training: Training | None = None
        # Of what trains, the hashes of its start: another model in memory would be as large again.
        self._started: dict[str, str] = {}
        # The trainable weights of the best epoch so far, while only memory has them.
        self._best: tuple[int, Tensors] | None = None
        self._checkpointed = time.monotonic()

    # -- how an epoch is obtained ---------------------------------------------------------------

    def epochs(self) -> Iterator[EpochMetrics]:
        """Epochs 1, 2, ... without end, or epoch 0 where none is to be trained. Raises Interrupted,
        Diverged or StoreError.
        """
        return map(self.epoch, itertools.count(self.phase.stop.first_epoch))

    def epoch(self, number: int) -> EpochMetrics:
        """One epoch: stored, or trained on from the last stored state before it."""
        while (metrics := self._stored_epoch(number)) is None:
            if number == 0:
                last = self.start_exits()[-1]
                start = EpochMetrics(0, None, last.loss, last.accuracy, 0, 0.0, 0.0)
                self._become_writer()
                self.stage.write_json("epoch-0000", asdict(start))
            elif self._become_writer(unless=lambda: self._stored_epoch(number) is not None):
                training = self._training_before(number)
                self._train_to(training, number)
        return metrics

    def _training_before(self, number: int) -> Training:
        """Training in a state from which `number` is still to come: what memory has, else resumed
        from the store, else untrained. An epoch that is stored needs its weights again, not its
        metrics: then its own end will do.
        """
        steps = self.phase.train.steps_per_epoch(len(self.corpus.train))
        latest = (number, 0) if self._stored_epoch(number) else (number - 1, steps)
        if self._training is None or _position(self._training) > latest:
            self._training = self._resume(latest)
        return self._training

    # -- as a context ---------------------------------------------------------------------------

    def __enter__(self) -> Trajectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.stage.unlock()
        self._training = self._best = None

    @property
    def key(self) -> str:
        return self.stage.key

    # -- the moment of a growth -----------------------------------------------------------------

    def start_exits(self) -> list[ExitMetrics]:
        """The evaluated exits of the model that the phase starts with, before its first step."""
        while (exits := self._stored_exits(0)) is None:
            if self._become_writer(unless=lambda: self._stored_exits(0) is not None):
                model = self.start().to(self.device)
                set_gate(model, self.phase.train, 0)
                self._store_exits(0, self._evaluate_exits(model, None))
        return exits

    def gradient_shares(self) -> list[float] | None:
        """The new layers' part of the gradient's norm at the first steps after a growth.

        None where an earlier version trained the phase and kept none.
        """
        return self.stage.read_json("gradients-0001", lambda plain: list(plain["new_layers"]))

    # -- what a phase leaves to the next --------------------------------------------------------

    def finish(self, selected: int) -> list[ExitMetrics]:
        """Store what a later reader needs of a phase that ended: the last state, the selected
        epoch's weights, and the metrics of its evaluated exits.

        Returns:
            those metrics, bottom exit first.
        """
        if selected == 0:  # there is nothing that cannot be had as it was
            return self.start_exits()
        if self._training is not None and _position(self._training) >= max(
            self._states(), default=(0, 0)
        ):
            self._store_state(self._training)
        exits = self._stored_exits(selected)
        if exits is None or self.weights_path(selected) is None:
            self._become_writer()
            weights = self.weights(selected)
            self._store_weights(selected, weights)
            exits = self._stored_exits(selected)
            if exits is None:
                self._check_moved(weights)
                metrics = self._stored_epoch(selected)
                if self.phase.evaluate == (last := self.phase.train.exits - 1,) and metrics:
                    exits = [
                        ExitMetrics(last, metrics.validation_loss, metrics.validation_accuracy)
                    ]
                else:
                    exits = self._evaluate_exits(self._model(weights), self._training)
                self._store_exits(selected, exits)
        if self._training is not None:
            # Those that training left on its way back to the selected epoch.
            for position in self._states()[:-1]:
                self.stage.remove(_state_name(position))
        return exits

    def weights(self, epoch: int) -> Tensors:
        """The model's tensors after `epoch`, on the CPU: from memory, stored, or trained again."""
        if self._best is not None and self._best[0] == epoch and self._training is not None:
            return {**on_cpu(self._training.model.state_dict()), **self._best[1]}
        while (weights := self._stored_weights(epoch)) is None:
            if self._become_writer(unless=lambda: self.weights_path(epoch) is not None):
                break
        if weights is not None:
            return weights
        if epoch == 0:
            return on_cpu(self.start().state_dict())
        training = self._training_before(epoch)
        self._train_to(training, epoch)
        return on_cpu(training.model.state_dict())

    def optimizer_state(self, epoch: int) -> Tensors:
        """The optimizer's tensors after `epoch`, on the CPU: stored ones, or trained again."""
        name = f"optimizer-{epoch:04d}"
        if self.stage.read(name, safetensors.torch.load) is None:
            self._become_writer()
            training = self._training_before(epoch)
            self._train_to(training, epoch)
            if self.stage.path(name) is None:
                self.stage.write(name, "safetensors", pack_optimizer(training))
        state = self.stage.read(name, safetensors.torch.load)
        assert state is not None, "it was just read or stored"
        return state

    def test(self, selected: int) -> ExitMetrics | None:
        """The last exit's metrics on the test text after the `selected` epoch of a phase that
        ended; None without such a text. Evaluated once and stored.
        """
        if self.corpus.test is None:
            return None
        while (metrics := self._stored_test(selected)) is None:
            if self._become_writer(unless=lambda: self._stored_test(selected) is not None):
                model = self._model(self.weights(selected))
                last = [self.phase.train.exits - 1]
                (metrics,) = self._evaluate(model, last, self._training, tokens=self.corpus.test)
                self.stage.write_json(self._test_name(selected), asdict(metrics))
        return metrics

    def weights_file(self, epoch: int) -> Path:
        """The stored file of the model after `epoch`, read to its end; trained again if damaged."""
        if self._stored_weights(epoch) is None:
            self._become_writer()
            self._store_weights(epoch, self.weights(epoch))
        path = self.weights_path(epoch)
        assert path is not None, "it was just read or stored"
        return path

    def weights_path(self, epoch: int) -> Path | None:
        """The stored file of the model after `epoch`, if there is one."""
        return self.stage.path(f"weights-{epoch:04d}")

    def best_recorded(self) -> int | None:
        """The epoch with the lowest validation loss of those read so far."""
        epochs = [self._recorded[number] for number in sorted(self._recorded)]
        lowest = best_of(epochs, replace(self.phase.stop, min_delta=0.0))
        return lowest.epoch if lowest else None

    # -- training -------------------------------------------------------------------------------

    def _become_writer(self, unless: Callable[[], bool] = lambda: False) -> bool:
        """Wait for the stage's lock. Returns False, without it, once `unless` is true: another
        process has stored what is wanted.
        """
        if self.stage.locked:
            return True
        started = time.monotonic()
        waited = False
        while not self.stage.lock(POLL_S):
            if not waited:
                self.hooks.on_wait(f"phase {self.phase.index + 1} is being trained by another job")
                waited = True
            self._check_stop(None)
            if unless():
                break
        if waited:
            self.counts.waited_seconds += time.monotonic() - started
        if unless():
            self.stage.unlock()
            return False
        if self.stage.read_json("stage") is None:
            self.stage.write_json("stage", self.description)
        return True

    def _train_to(self, training: Training, epoch: int) -> None:
        """Train to the end of `epoch`, storing metrics that are not stored yet. Needs the lock."""
        while training.epoch < epoch:
            training.train_epoch(lambda progress: self._after_step(training, progress))
            if self._stored_epoch(training.epoch + 1) is not None:
                training.finish_epoch()
                self.counts.epochs_replayed += 1
            else:
                metrics = self._finish_epoch(training)
                if self.phase.train.growth is not None and metrics.epoch == 1:
                    shares = [float(share) for share in training.gradient_shares]
                    self.stage.write_json("gradients-0001", {"new_layers": shares})
                self._record(metrics)
            self._keep_best(training)

    def _finish_epoch(self, training: Training) -> EpochMetrics:
        """Evaluate and close the epoch under way. Raises Diverged where a loss is not finite."""
        number = training.epoch + 1
        started = time.perf_counter()
        last, frozen = self.phase.train.exits - 1, training.frozen_validation
        (exit,) = self._evaluate(training.model, [last], training, frozen=frozen)
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
            train_tokens=len(training.windows) * training.windows.seq_len,
            train_seconds=train_seconds,
            evaluation_seconds=evaluation_seconds,
        )

    def _record(self, metrics: EpochMetrics) -> None:
        self.stage.write_json(f"epoch-{metrics.epoch:04d}", asdict(metrics))
        self._recorded[metrics.epoch] = metrics
        self.counts.trained.add(metrics.epoch)

    def _keep_best(self, training: Training) -> None:
        """Store the weights that a reader may select once another epoch follows; until then memory
        holds them. They are those of the lowest loss, which a rule without `min_delta` selects, and
        those that the phase's own rule selects.
        """
        epochs = [m for n in range(1, training.epoch + 1) if (m := self._stored_epoch(n))]
        rules = (replace(self.phase.stop, min_delta=0.0), self.phase.stop)
        selectable = {best.epoch for rule in rules if (best := best_of(epochs, rule))}
        if self._best is not None and self._best[0] in selectable - {training.epoch}:
            self._store_weights(self._best[0], self.weights(self._best[0]))
        self._best = None
        if training.epoch in selectable and self.keep_optimizer:
            for name in self.stage.names("optimizer-"):
                if int(name.removeprefix("optimizer-")) not in selectable:
                    self.stage.remove(name)
            name = f"optimizer-{training.epoch:04d}"
            if self.stage.path(name) is None:
                self.stage.write(name, "safetensors", pack_optimizer(training))
        if training.epoch in selectable:
            self._best = (training.epoch, on_cpu(trainable_parameters(training), copy=True))

    def _evaluate(
        self, model: Model, exits: list[int], training: Training | None, **how: Any
    ) -> list[ExitMetrics]:
        how["between_batches"] = functools.partial(self._check_stop, training)
        return evaluate(model, self.phase.train, self.corpus, self.device, exits, **how)

    def _evaluate_exits(self, model: Model, training: Training | None) -> list[ExitMetrics]:
        return self._evaluate(model, list(self.phase.evaluate), training)

    def _model(self, weights: Tensors) -> Model:
        model = restored(self.phase.train.layers, asdict(self.phase.train.architecture), weights)
        return model.to(self.device)

    def _check_moved(self, weights: Tensors) -> None:
        """Raise NotMoved where a tensor that trains is, bit for bit, what it was at the start."""
        started = self._started or self._hashes(self.start())
        still = [name for name, start in started.items() if _hash(weights[name]) == start]
        if still:
            more = f" and {len(still) - 1} more" if len(still) > 1 else ""
            raise NotMoved(
                f"phase {self.phase.index + 1} did not move {still[0]}{more}, which should train: "
                "its gradient is zero, or too small for its rate (see lr, loss and growth)"
            )

    def _hashes(self, model: Model) -> dict[str, str]:
        """Of each parameter that the phase trains."""
        parameters = model.named_parameters()
        return {name: _hash(value) for name, value in parameters if trains(name, self.phase.train)}

    def _after_step(self, training: Training, progress: Progress) -> None:
        self.hooks.on_step(progress)
        self._check_stop(training)
        if time.monotonic() - self._checkpointed >= self.checkpoint_every_s:
            self._store_state(training)

    def _check_stop(self, training: Training | None) -> None:
        signal = self.hooks.stop_requested()
        if signal is not None:
            if training is not None:
                self._store_state(training)
            raise Interrupted(f"stopped by {signal}")

    # -- the stage's files ----------------------------------------------------------------------

    def _stored_epoch(self, number: int) -> EpochMetrics | None:
        if number not in self._recorded:
            metrics = _read_epoch(self.stage, number)
            if metrics is None:
                return None
            self._recorded[number] = metrics
        return self._recorded[number]

    def _stored_weights(self, epoch: int) -> Tensors | None:
        return self.stage.read(f"weights-{epoch:04d}", safetensors.torch.load)

    def _stored_exits(self, epoch: int) -> list[ExitMetrics] | None:
        def read(plain: dict[str, Any]) -> list[ExitMetrics]:
            return [ExitMetrics(**row) for row in plain["exits"]]

        return self.stage.read_json(self._exits_name(epoch), read)

    def _store_exits(self, epoch: int, exits: list[ExitMetrics]) -> None:
        self.stage.write_json(self._exits_name(epoch), {"exits": [asdict(exit) for exit in exits]})

    def _exits_name(self, epoch: int) -> str:
        # An exit's loss is rounded by what it is evaluated with, so neither file stands for both.
        every = len(self.phase.evaluate) == self.phase.train.exits
        return f"{'exits' if every else 'trained'}-{epoch:04d}"

    def _stored_test(self, epoch: int) -> ExitMetrics | None:
        return self.stage.read_json(self._test_name(epoch), lambda plain: ExitMetrics(**plain))

    def _test_name(self, epoch: int) -> str:
        """Training depends on no test text, so the key of a stage knows nothing of it: the name
        does, unless the test text follows from what the key holds.
        """
        text = self.corpus.test_fingerprint
        return f"test-{epoch:04d}" + (f"-{int(text[:12], 16)}" if text else "")

    def _states(self) -> list[tuple[int, int]]:
        """Where the stored states stand (epochs, steps), in their order."""
        found = (STATE_NAME.fullmatch(name) for name in self.stage.names("state-"))
        return sorted((int(match[1]), int(match[2])) for match in found if match)

    def _store_weights(self, epoch: int, weights: Tensors) -> None:
        if self.weights_path(epoch) is None:
            content = pack_weights(self.phase.train, weights)
            self.stage.write(f"weights-{epoch:04d}", "safetensors", content)

    def _store_state(self, training: Training) -> None:
        """Store the state of training, and remove earlier ones. What diverged is not stored: there
        is no going on from it.
        """
        if not math.isfinite(training.mean_loss()):
            return
        position = _position(training)
        if self.stage.path(_state_name(position)) is None:
            in_memory = self._best is not None and self.weights_path(self._best[0]) is None
            content = pack_training(training, self._best if in_memory else None)
            self.stage.write(_state_name(position), "safetensors", content)
        for earlier in self._states():
            if earlier < position:
                self.stage.remove(_state_name(earlier))
        self._checkpointed = time.monotonic()

    def _resume(self, latest: tuple[int, int]) -> Training:
        """Training in the last stored state up to `latest` (epochs, steps), else from the start."""
        self._best = None
        self._checkpointed = time.monotonic()
        model = self.start()
        self._started = self._hashes(model)
        training = Training(model, self.phase.train, self.corpus, self.device, self.carried())

        def load(content: bytes) -> bool:
            self._best = load_training(training, content)
            return True

        for position in reversed(self._states()):
            if position <= latest and self.stage.read(_state_name(position), load):
                training.epoch, training.step = position
                break
        return training


@dataclass(frozen=True)
class StoredEpochs:
    """What the store has of a trajectory: its epochs in a row from the first, as far as a stopping
    rule reads them, and the epoch that the rule selects, None while it would read on.
    """

    description: dict[str, Any]
    epochs: tuple[EpochMetrics, ...]
    selected: int | None

    @property
    def key(self) -> str:
        return stage_key(self.description)


def stored_epochs(
    store: Path, parent: tuple[str, int] | None, phase: Phase, fingerprint: str, machine: Machine
) -> StoredEpochs:
    """Read as much of a trajectory as is stored, training nothing."""
    description = describe(parent, phase.train, fingerprint, machine)
    stage = Stage(store, stage_key(description))
    epochs: list[EpochMetrics] = []

    def recorded() -> Iterator[EpochMetrics]:
        while metrics := _read_epoch(stage, len(epochs) + phase.stop.first_epoch):
            epochs.append(metrics)
            yield metrics

    stopped = follow(phase.stop, recorded())
    return StoredEpochs(description, tuple(epochs), stopped.best.epoch if stopped else None)


def describe(
    parent: tuple[str, int] | None, train: TrainSpec, fingerprint: str, machine: Machine
) -> dict[str, Any]:
    """Everything a trajectory depends on, as plain data: what its key is the hash of.

    `parent` is the key and the selected epoch of the phase before, None for the first.
    """
    return {
        "format": FORMAT,
        "parent": {"key": parent[0], "epoch": parent[1]} if parent else "fresh",
        "phase": to_jsonable_python(train),
        "corpus": fingerprint,
        "machine": asdict(machine),
    }


def _read_epoch(stage: Stage, number: int) -> EpochMetrics | None:
    return stage.read_json(f"epoch-{number:04d}", lambda plain: EpochMetrics(**plain))


def _hash(tensor: torch.Tensor) -> str:
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return hashlib.sha256(content).hexdigest()


def _position(training: Training) -> tuple[int, int]:
    return training.epoch, training.step


def _state_name(position: tuple[int, int]) -> str:
    return f"state-{position[0]:04d}-{position[1]:06d}"
