"""A phase's training as a trajectory: epochs that are on disk first, then freshly trained ones.

What an epoch gives is fixed by where the phase starts and how it trains, not by when it stops. So
stopping early, going on after a kill, sharing a phase between runs and continuing with more
patience are all the same thing: reading a trajectory (the idea of stage trees, Shin et al. 2020,
"Hippo"). The stopping rule is the reader; see `trainer.follow`.
"""

from __future__ import annotations

import functools
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from proglayer.data.corpus import Corpus
from proglayer.errors import UserError
from proglayer.store.record import Machine
from proglayer.store.stages import FORMAT, Stage, stage_key
from proglayer.training.frozen import FrozenStates
from proglayer.training.model import Transformer, restored
from proglayer.training.optim import load_optimizer_tensors, optimizer_tensors, trains
from proglayer.training.plan import Phase, Precision, described
from proglayer.training.stopping import EpochMetrics, best_of, follow
from proglayer.training.trainer import Diverged, ExitMetrics, Progress, Training, evaluate, set_gate

# The entry of a file's metadata that holds what is not a tensor.
ABOUT = "proglayer"

STATE_NAME = re.compile(r"state-(\d+)-(\d+)")

# How long to wait for another process's epoch before looking again whether it is stored.
LOOK_AGAIN_S = 0.2


class NotMoved(UserError):
    """A tensor that should train is where it was when the phase began."""


class Interrupted(Exception):
    """The run was asked to stop; its state is stored. The message names the signal."""


@dataclass
class Watch:
    """How the outside follows training and stops it.

    `stop_requested` gives the name of a signal when the run should end; `on_step` is shown every
    optimizer step, `on_wait` is told when another process is training what this one needs.
    """

    stop_requested: Callable[[], str | None]
    on_step: Callable[[Progress], None]
    on_wait: Callable[[str], None]


@dataclass
class Work:
    """What a trajectory cost this process: the epochs it trained for the first time, how many it
    trained again on the way to others, and the seconds it waited for another process.
    """

    trained: set[int] = field(default_factory=set)
    epochs_replayed: int = 0
    waited_seconds: float = 0.0


class Trajectory:
    """The epochs of one phase from one starting point, stored under their key.

    `start` gives the model that the phase starts with; it is called only if something has to be
    trained. `carried` gives what the optimizer starts with (see `optim.carried_tensors`); with
    `keep_optimizer` its state at selectable epochs is stored, for a later phase that takes it over.
    Use as a context manager: the end frees the stage's lock.
    """

    def __init__(
        self,
        store: Path,
        parent: tuple[str, int] | None,
        start: Callable[[], Transformer],
        phase: Phase,
        corpus: Corpus,
        device: torch.device,
        machine: Machine,
        checkpoint_every_s: float,
        watch: Watch,
        carried: Callable[[], dict[str, Tensor]] = dict,
        keep_optimizer: bool = False,
    ) -> None:
        self.phase = phase
        self.corpus = corpus
        self.device = device
        self.description = describe(parent, phase, corpus.fingerprint, machine)
        self.stage = Stage(store, stage_key(self.description))
        self.work = Work()
        self._start = start
        self._carried = carried
        self._keep_optimizer = keep_optimizer
        self._checkpoint_every_s = checkpoint_every_s
        self._watch = watch
        self._recorded: dict[int, EpochMetrics] = {}
        self._training: Training | None = None
        # The trainable weights of the best epoch so far, while only memory has them.
        self._best: tuple[int, dict[str, Tensor]] | None = None
        self._checkpointed = time.monotonic()

    def __enter__(self) -> Trajectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.stage.unlock()
        self._training = self._best = None

    @property
    def key(self) -> str:
        return self.stage.key

    # -- reading --------------------------------------------------------------------------------

    def epochs(self) -> Iterator[EpochMetrics]:
        """Epochs 1, 2, ... without end. Raises Interrupted, Diverged or StoreError."""
        number = 0
        while True:
            number += 1
            while (metrics := self._read_epoch(number)) is None:
                if self._own(until=lambda n=number: self._read_epoch(n) is not None):
                    self._advance(number)
            yield metrics

    def finish(self, selected: int) -> list[ExitMetrics]:
        """Store what a later reader needs of a phase that ended: the last state, the selected
        epoch's weights, and each of its exits. Gives the exits, bottom first.
        """
        if self._training is not None and _position(self._training) >= max(
            self._states(), default=(0, 0)
        ):
            self._store_state(self._training)
        exits = self._read_exits(selected)
        if exits is None or self.weights_path(selected) is None:
            self._own(until=lambda: False)
            state = self.weights(selected)
            self._store_weights(selected, state)
            exits = self._read_exits(selected)
            if exits is None:
                self._check_moved(state)
                exits = self._evaluate_exits(state)
                rows = [asdict(exit) for exit in exits]
                self.stage.write_json(f"exits-{selected:04d}", {"exits": rows})
        if self._training is not None:
            # Those that training left on its way back to the selected epoch.
            for position in self._states()[:-1]:
                self.stage.remove(_state_name(position))
        return exits

    def start_exits(self) -> list[ExitMetrics]:
        """Every exit of the model that the phase starts with, before its first step."""
        while (exits := self._read_exits(0)) is None:
            if self._own(until=lambda: self._read_exits(0) is not None):
                model = self._start().to(self.device)
                set_gate(model, self.phase, 0)
                exits = self._evaluate(model, list(range(self.phase.exits)), None)
                rows = [asdict(exit) for exit in exits]
                self.stage.write_json("exits-0000", {"exits": rows})
                return exits
        return exits

    def gradient_shares(self) -> list[float] | None:
        """The new layers' part of the gradient's norm at the first steps after a growth.

        None where an earlier version trained the phase and kept none.
        """
        return self.stage.read_json("gradients-0001", lambda plain: list(plain["new_layers"]))

    def optimizer_state(self, epoch: int) -> dict[str, Tensor]:
        """The optimizer's tensors after `epoch`, on the CPU: stored ones, or trained again."""
        name = f"optimizer-{epoch:04d}"
        if (stored := self.stage.read(name, safetensors.torch.load)) is not None:
            return stored
        self._own(until=lambda: False)
        training = self._advance(epoch)
        if (stored := self.stage.read(name, safetensors.torch.load)) is not None:
            return stored
        state = _cpu(optimizer_tensors(training.optimizer))
        self.stage.write(name, "safetensors", safetensors.torch.save(state))
        return state

    def test(self, selected: int) -> ExitMetrics | None:
        """The last exit's metrics on the test text after the `selected` epoch of a phase that
        ended; None without such a text. Evaluated once and stored.
        """
        if self.corpus.test is None:
            return None

        def form(plain: dict[str, Any]) -> ExitMetrics:
            return ExitMetrics(**plain)

        name = f"test-{selected:04d}"
        metrics = self.stage.read_json(name, form)
        if metrics is None:
            self._own(until=lambda: False)
            metrics = self.stage.read_json(name, form)
        if metrics is None:
            model = restored(
                self.phase.layers, asdict(self.phase.architecture), self.weights(selected)
            )
            last = [self.phase.exits - 1]
            (metrics,) = self._evaluate(
                model.to(self.device), last, self._training, tokens=self.corpus.test
            )
            self.stage.write_json(name, asdict(metrics))
        return metrics

    def weights_file(self, epoch: int) -> Path:
        """The stored file of the model after `epoch`, read to its end; trained again if damaged."""
        if self._read_weights(epoch) is None:
            self._own(until=lambda: False)
            self._store_weights(epoch, self.weights(epoch))
        path = self.weights_path(epoch)
        assert path is not None, "it was just read or stored"
        return path

    def weights(self, epoch: int) -> dict[str, Tensor]:
        """The model's tensors after `epoch`, on the CPU: stored ones, or trained again."""
        while (state := self._read_weights(epoch)) is None:
            if self._own(until=lambda: self.weights_path(epoch) is not None):
                break
        if state is not None:
            return state
        if self._best is not None and self._best[0] == epoch and self._training is not None:
            return {**_cpu(self._training.model.state_dict()), **self._best[1]}
        return _cpu(self._advance(epoch).model.state_dict())

    def weights_path(self, epoch: int) -> Path | None:
        """The stored file of the model after `epoch`, if there is one."""
        return self.stage.path(f"weights-{epoch:04d}")

    def best_recorded(self) -> int | None:
        """The epoch with the lowest validation loss of those read so far."""
        epochs = [self._recorded[number] for number in sorted(self._recorded)]
        lowest = best_of(epochs, replace(self.phase.stop, min_delta=0.0))
        return lowest.epoch if lowest else None

    def _read_epoch(self, number: int) -> EpochMetrics | None:
        if number not in self._recorded:
            metrics = _read_epoch(self.stage, number)
            if metrics is None:
                return None
            self._recorded[number] = metrics
        return self._recorded[number]

    def _read_weights(self, epoch: int) -> dict[str, Tensor] | None:
        return self.stage.read(f"weights-{epoch:04d}", safetensors.torch.load)

    def _read_exits(self, epoch: int) -> list[ExitMetrics] | None:
        def form(plain: dict[str, Any]) -> list[ExitMetrics]:
            return [ExitMetrics(**row) for row in plain["exits"]]

        return self.stage.read_json(f"exits-{epoch:04d}", form)

    # -- training -------------------------------------------------------------------------------

    def _own(self, until: Callable[[], bool]) -> bool:
        """Become the writer of this stage. False, and not the writer, if `until` came true first:
        another process has stored what is wanted.
        """
        if self.stage.locked:
            return True
        started = time.monotonic()
        told = False
        while not self.stage.lock(LOOK_AGAIN_S):
            if not told:
                self._watch.on_wait(f"phase {self.phase.index + 1} is being trained by another job")
                told = True
            self._check_stop(None)
            if until():
                break
        if told:
            self.work.waited_seconds += time.monotonic() - started
        if until():
            self.stage.unlock()
            return False
        if self.stage.read_json("stage") is None:
            self.stage.write_json("stage", self.description)
        return True

    def _advance(self, epoch: int) -> Training:
        """Train to the end of `epoch`, recording what is not recorded yet. Needs the lock."""
        training = self._training
        # The end of an epoch gives its weights, but no longer its metrics.
        latest = (
            (epoch, 0)
            if self._read_epoch(epoch)
            else (epoch - 1, self.phase.steps_per_epoch(len(self.corpus.train)))
        )
        if training is None or (training.epoch, training.step) > latest:
            training = self._training = self._resume(latest)
        while training.epoch < epoch:
            training.train_epoch(lambda progress: self._after_step(training, progress))
            number = training.epoch + 1
            if self._read_epoch(number) is not None:
                training.finish_epoch()
                self.work.epochs_replayed += 1
            else:
                started = time.perf_counter()
                last = self.phase.exits - 1
                frozen = training.frozen_validation
                (exit,) = self._evaluate(training.model, [last], training, frozen)
                evaluation_seconds = time.perf_counter() - started
                if not math.isfinite(exit.loss):
                    raise Diverged(
                        f"the validation loss became {exit.loss} in phase {self.phase.index + 1}, "
                        f"epoch {number}: lower lr.base, or add lr.warmup_steps"
                    )
                tokens = len(training.windows) * training.windows.seq_len
                train_loss, seconds = training.finish_epoch()
                if self.phase.growth is not None and number == 1:
                    shares = {"new_layers": [float(share) for share in training.gradient_shares]}
                    self.stage.write_json("gradients-0001", shares)
                self._record(
                    EpochMetrics(
                        epoch=number,
                        train_loss=train_loss,
                        validation_loss=exit.loss,
                        validation_accuracy=exit.accuracy,
                        train_tokens=tokens,
                        train_seconds=seconds,
                        evaluation_seconds=evaluation_seconds,
                    )
                )
                self.work.trained.add(number)
            self._keep_best(training)
        return training

    def _record(self, metrics: EpochMetrics) -> None:
        self.stage.write_json(f"epoch-{metrics.epoch:04d}", asdict(metrics))
        self._recorded[metrics.epoch] = metrics

    def _keep_best(self, training: Training) -> None:
        """Store the weights that a reader may select once another epoch follows; until then memory
        holds them. They are those of the lowest loss, which a rule without `min_delta` selects, and
        those that the phase's own rule selects.
        """
        epochs = [m for n in range(1, training.epoch + 1) if (m := self._read_epoch(n))]
        rules = (replace(self.phase.stop, min_delta=0.0), self.phase.stop)
        selectable = {best.epoch for rule in rules if (best := best_of(epochs, rule))}
        if self._best is not None and self._best[0] in selectable - {training.epoch}:
            self._store_weights(self._best[0], self.weights(self._best[0]))
        self._best = None
        if training.epoch in selectable and self._keep_optimizer:
            for name in self.stage.names("optimizer-"):
                if int(name.removeprefix("optimizer-")) not in selectable:
                    self.stage.remove(name)
            if self.stage.path(f"optimizer-{training.epoch:04d}") is None:
                state = safetensors.torch.save(_cpu(optimizer_tensors(training.optimizer)))
                self.stage.write(f"optimizer-{training.epoch:04d}", "safetensors", state)
        if training.epoch in selectable:
            trainable = {n: p for n, p in training.model.named_parameters() if p.requires_grad}
            self._best = (training.epoch, _cpu(trainable, copy=True))

    def _evaluate(
        self,
        model: Transformer,
        exits: list[int],
        training: Training | None,
        frozen: FrozenStates | None = None,
        tokens: np.ndarray | None = None,
    ) -> list[ExitMetrics]:
        return evaluate(
            model,
            self.phase,
            self.corpus,
            self.device,
            exits,
            between_batches=lambda: self._check_stop(training),
            frozen=frozen,
            tokens=tokens,
        )

    def _evaluate_exits(self, state: dict[str, Tensor]) -> list[ExitMetrics]:
        model = restored(self.phase.layers, asdict(self.phase.architecture), state)
        exits = list(range(self.phase.exits))
        return self._evaluate(model.to(self.device), exits, self._training)

    def _check_moved(self, state: dict[str, Tensor]) -> None:
        """Raise NotMoved where a tensor that trains is, bit for bit, what it was at the start."""
        start = self._start()
        still = [
            name
            for name, parameter in start.named_parameters()
            if trains(name, self.phase) and torch.equal(parameter.cpu(), state[name])
        ]
        if still:
            more = f" and {len(still) - 1} more" if len(still) > 1 else ""
            raise NotMoved(
                f"phase {self.phase.index + 1} did not move {still[0]}{more}, which should train: "
                "its gradient is zero, or too small for its rate (see lr, loss and growth)"
            )

    def _after_step(self, training: Training, progress: Progress) -> None:
        self._watch.on_step(progress)
        self._check_stop(training)
        if time.monotonic() - self._checkpointed >= self._checkpoint_every_s:
            self._store_state(training)

    def _check_stop(self, training: Training | None) -> None:
        signal = self._watch.stop_requested()
        if signal is not None:
            if training is not None:
                self._store_state(training)
            raise Interrupted(f"stopped by {signal}")

    # -- storing --------------------------------------------------------------------------------

    def _store_weights(self, epoch: int, state: dict[str, Tensor]) -> None:
        name = f"weights-{epoch:04d}"
        if self.stage.path(name) is None:
            about = {
                "architecture": described(self.phase.architecture),
                "layers": self.phase.layers,
            }
            self.stage.write(name, "safetensors", _packed(state, about))

    def _store_state(self, training: Training) -> None:
        """Store everything that training changes, for going on from exactly here. What diverged
        is not stored: there is no going on from it.
        """
        if not math.isfinite(training.mean_loss()):
            return
        position = _position(training)
        if self.stage.path(_state_name(position)) is None:
            tensors = {"loss_sum": training.loss_sum}
            for name, parameter in training.model.named_parameters():
                if parameter.requires_grad:
                    tensors[f"model/{name}"] = parameter.detach()
            for name, value in optimizer_tensors(training.optimizer).items():
                tensors[f"optimizer/{name}"] = value
            about: dict[str, Any] = {"seconds": training.seconds}
            if training.gradient_shares and training.epoch == 0:
                about["gradient_shares"] = [float(share) for share in training.gradient_shares]
            if self._best is not None and self.weights_path(self._best[0]) is None:
                about["best_epoch"] = self._best[0]
                tensors |= {f"best/{name}": value for name, value in self._best[1].items()}
            content = _packed(_cpu(tensors), about)
            self.stage.write(_state_name(position), "safetensors", content)
        for earlier in self._states():
            if earlier < position:
                self.stage.remove(_state_name(earlier))
        self._checkpointed = time.monotonic()

    def _resume(self, latest: tuple[int, int]) -> Training:
        """Training in the last stored state up to `latest` (epochs, steps), else afresh."""
        self._best = None
        self._checkpointed = time.monotonic()
        training = Training(self._start(), self.phase, self.corpus, self.device, self._carried())
        for position in reversed(self._states()):
            if position > latest:
                continue
            form = functools.partial(_read_state, training)
            if (read := self.stage.read(_state_name(position), form)) is None:
                continue
            parts, about = read
            with torch.no_grad():
                for name, parameter in training.model.named_parameters():
                    if parameter.requires_grad:
                        parameter.copy_(parts["model"][name])
            load_optimizer_tensors(training.optimizer, parts["optimizer"])
            training.epoch, training.step = position
            training.loss_sum = parts["loss_sum"][""].to(self.device)
            training.seconds = about["seconds"]
            shares = about.get("gradient_shares", [])
            training.gradient_shares = [torch.tensor(share) for share in shares]
            if "best_epoch" in about:
                self._best = (about["best_epoch"], parts["best"])
            return training
        return training

    def _states(self) -> list[tuple[int, int]]:
        """Where the stored states stand (epochs, steps), in their order."""
        found = (STATE_NAME.fullmatch(name) for name in self.stage.names("state-"))
        return sorted((int(match[1]), int(match[2])) for match in found if match)


@dataclass(frozen=True)
class Stored:
    """What the store has of a trajectory: its epochs in a row from the first, as far as a stopping
    rule reads them, and the epoch that the rule selects, None while it would read on.
    """

    key: str
    epochs: tuple[EpochMetrics, ...]
    selected: int | None


def stored_epochs(
    store: Path, parent: tuple[str, int] | None, phase: Phase, fingerprint: str, machine: Machine
) -> Stored:
    """Read as much of a trajectory as is stored, training nothing."""
    stage = Stage(store, stage_key(describe(parent, phase, fingerprint, machine)))
    epochs: list[EpochMetrics] = []

    def recorded() -> Iterator[EpochMetrics]:
        while metrics := _read_epoch(stage, len(epochs) + 1):
            epochs.append(metrics)
            yield metrics

    stopped = follow(phase.stop, recorded())
    return Stored(stage.key, tuple(epochs), stopped.best.epoch if stopped else None)


def describe(
    parent: tuple[str, int] | None, phase: Phase, fingerprint: str, machine: Machine
) -> dict[str, Any]:
    """Everything a trajectory depends on, as plain data: what its key is the hash of.

    `parent` is the key and the selected epoch of the phase before, None for an untrained model.
    The stopping rule is left out: it only reads.
    """
    plain = described(phase)
    del plain["stop"]
    # Raised by hand where the products of one precision change, so that the others keep their keys.
    arithmetic = {}
    if machine.device == "cpu" and phase.precision is Precision.bfloat16:
        arithmetic = {"arithmetic": 2}
    return {
        **arithmetic,
        "format": FORMAT,
        "parent": {"key": parent[0], "epoch": parent[1]} if parent else "fresh",
        "phase": plain,
        "corpus": fingerprint,
        "machine": asdict(machine),
    }


def _read_epoch(stage: Stage, number: int) -> EpochMetrics | None:
    return stage.read_json(f"epoch-{number:04d}", lambda plain: EpochMetrics(**plain))


def _position(training: Training) -> tuple[int, int]:
    return training.epoch, training.step


def _state_name(position: tuple[int, int]) -> str:
    return f"state-{position[0]:04d}-{position[1]:06d}"


def _read_state(
    training: Training, content: bytes
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors of a stored state by part and name, and its plain data.

    Raises ValueError unless the tensors are those that `training` trains.
    """
    parts: dict[str, dict[str, Tensor]] = {"loss_sum": {}, "model": {}, "optimizer": {}, "best": {}}
    for name, value in safetensors.torch.load(content).items():
        part, _, rest = name.partition("/")
        parts[part][rest] = value
    shapes = {n: p.shape for n, p in training.model.named_parameters() if p.requires_grad}
    optimized = {name.rpartition("/")[0] for name in parts["optimizer"]}
    if {n: v.shape for n, v in parts["model"].items()} != shapes or optimized != shapes.keys():
        raise ValueError("other tensors than the phase trains")
    return parts, _about(content)


def _packed(tensors: dict[str, Tensor], about: dict[str, Any]) -> bytes:
    """Tensors and plain data as a safetensors file; equal content gives equal bytes.

    The plain data is one entry of the file's metadata, since those come in no fixed order.
    """
    return safetensors.torch.save(tensors, {ABOUT: json.dumps(about, sort_keys=True)})


def _about(content: bytes) -> dict[str, Any]:
    """The plain data of a file that `_packed` made: a length of 8 bytes, then a header in JSON."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(json.loads(content[8 : 8 + length])["__metadata__"][ABOUT])


def _cpu(tensors: Mapping[str, Tensor], copy: bool = False) -> dict[str, Tensor]:
    return {
        name: value.detach().to("cpu", copy=copy).contiguous() for name, value in tensors.items()
    }
