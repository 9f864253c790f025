"""One phase's training: an epoch and an evaluation.

It sees the `train` of a Phase, a model and a corpus, and never the settings they came from.
Shapes in names: n windows, t positions, d model dimension, e exits, v vocabulary.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from proglayer.data.corpus import Corpus
from proglayer.errors import UserError
from proglayer.training.build import restored, stream
from proglayer.training.frozen import FrozenStates, Windows
from proglayer.training.group import Group
from proglayer.training.growth import gate_value
from proglayer.training.loss import ExitScores, Workspace, evaluate_exits, linear_cross_entropy
from proglayer.training.model import Model
from proglayer.training.optim import build_optimizer, optimizer_tensors, set_rates, start_from
from proglayer.training.plan import Role, TrainSpec
from proglayer.training.recorded import RecordedSteps

# The loss is looked at, and reported, at least this far apart. On a GPU a look waits for all steps
# that are on their way there, so within a short epoch there is none.
LOOK_EVERY_S = 1.0
LOOK_EVERY_ON_DEVICE_S = 60.0
# Validation tokens at a time, at least, elsewhere than on the CPU.
TOKENS_ON_DEVICE = 8192
# Optimizer steps after a growth, within the first epoch, whose gradient's norm is kept.
SHARE_STEPS = 10


class Diverged(UserError):
    """The training loss is no longer a finite number."""


@dataclass(frozen=True)
class ExitMetrics:
    """Validation loss (nats per token) and accuracy (0 to 1) read at one exit, 0 = bottom."""

    exit: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Progress:
    """Where training stands, for showing it. `loss` is the epoch's mean so far, if looked at."""

    epoch: int
    step: int
    steps: int
    loss: float | None
    tokens_per_second: float


class Training:
    """A model in training through one phase; its whole state is in plain attributes.

    `epoch` counts finished epochs, `step` the optimizer steps of the one under way, and `loss_sum`
    its summed loss (tokens x nats). `seconds` is its training time so far.

    group: the processes that it is shared out to, all in the same state: see `follow_orders`.
    """

    # Whether steps on a GPU may become CUDA graphs.
    records = True
    cross_entropy = staticmethod(linear_cross_entropy)

    def __init__(
        self,
        model: Model,
        spec: TrainSpec,
        corpus: Corpus,
        device: torch.device,
        carried: dict[str, Tensor] | None = None,
        group: Group | None = None,
    ) -> None:
        self.spec, self.device, self.group = spec, device, group
        self.model = model.to(device)
        self.model.checkpoint_activations = spec.checkpoint_activations
        self.optimizer = build_optimizer(self.model, spec)
        start_from(self.optimizer, carried or {})
        self.body = self.model
        if spec.compile:
            # What was compiled while other layers trained might be run in its place (PyTorch
            # #139476).
            torch.compiler.reset()
            self.body = torch.compile(self.model, dynamic=False)
        self.trainable = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.windows = Windows(corpus.train[: spec.pool(len(corpus.train))], device)
        self.epoch_windows = spec.windows(len(corpus.train))
        # Of training windows, and of validation windows at the last exit.
        self.frozen = self.frozen_validation = None
        if spec.cache_frozen and device.type == "cpu":
            read = [e for e, weight in enumerate(spec.exit_weights) if weight > 0]
            self.frozen = FrozenStates(spec, read, self.windows, group)
            held = Windows(corpus.validation, device)
            self.frozen_validation = FrozenStates(spec, [spec.exits - 1], held, group)
        self.workspace = Workspace()
        self.recorded = None
        alone = device.type == "cuda" and group is None
        if self.records and alone and spec.accumulate == 1 and not spec.compile:
            self.recorded = RecordedSteps(self.trainable, self.workspace, device)
        self.steps_per_epoch = spec.steps_per_epoch(len(corpus.train))
        self.epoch, self.step, self.seconds = 0, 0, 0.0
        self.loss_sum = torch.zeros((), device=device)
        # Over the first steps after a growth, the new layers' part of the gradient's norm.
        self.gradient_shares: list[Tensor] = []

    def train_epoch(self, after_step: Callable[[Progress], None] | None = None) -> None:
        """Train to the end of the epoch under way.

        `after_step` is called when the state is whole; it may raise to stop here. Raises Diverged
        when the loss is no longer finite, looked at every second (elsewhere than on the CPU every
        minute, as a look waits for the device) and at the end. Of a group the first looks alone;
        the others return early where it has left.
        """
        spec, model, group = self.spec, self.model, self.group
        if group is not None and group.rank == 0:
            group.order("epoch", self.epoch)
            group.stepped(more=self.step < self.steps_per_epoch)
        model.train()
        order = self.order()
        looked = time.perf_counter()
        look_every_s = LOOK_EVERY_S if self.device.type == "cpu" else LOOK_EVERY_ON_DEVICE_S
        started, seconds_before, first_step = looked, self.seconds, self.step
        while self.step < self.steps_per_epoch:
            if group is not None and not group.meet():
                return
            batch = order[self.step * spec.batch_size : (self.step + 1) * spec.batch_size]
            done = self.epoch * self.steps_per_epoch + self.step
            set_rates(self.optimizer, spec.schedule.factor(done, self.steps_per_epoch))
            set_gate(self.model, spec, done, self.steps_per_epoch)
            model.dropped = spec.dropped_at(done)

            for parameter in self.trainable:
                parameter.grad = None
            own, loss_sum = batch, self.loss_sum
            if group is not None:
                own = group.share(batch, own=self.frozen is not None)
                loss_sum = torch.zeros_like(self.loss_sum)
            every = spec.exit_weights_at(done, self.steps_per_epoch)
            for part in own.tensor_split(min(spec.accumulate, len(own))) if len(own) else ():
                share = len(part) / len(batch)
                weights = [share * weight for weight in every]
                if self.recorded is not None and model.gate is None and not spec.layer_drop:
                    loss = self.recorded(self.backward, part, weights)
                else:
                    loss = self.backward(part, weights)
                loss_sum += loss * (len(batch) * self.windows.seq_len)
            if group is not None:
                if not len(own):  # gradients of 0, of what has some elsewhere
                    self.backward(torch.tensor([group.rank]), every)
                    for grad in (p.grad for p in self.trainable if p.grad is not None):
                        grad.zero_()
                self.loss_sum += group.reduce(self.trainable, loss_sum)
            model.dropped = ()
            if spec.growth is not None and self.epoch == 0 and self.step < SHARE_STEPS:
                self.gradient_shares.append(gradient_share(self.optimizer))
            if spec.optimizer.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.trainable, spec.optimizer.clip_norm)
            self.optimizer.step()

            self.step += 1
            if group is not None:
                group.stepped(more=self.step < self.steps_per_epoch)
            now = time.perf_counter()
            mean = None
            due = now - looked > look_every_s or self.step == self.steps_per_epoch
            if due and (group is None or group.rank == 0):
                mean = self.check_finite()
                # Elsewhere than on the CPU that took as long as the steps on their way there.
                looked = now = time.perf_counter()
            self.seconds = seconds_before + now - started
            if after_step is not None:
                windows = min(self.step * spec.batch_size, self.epoch_windows)
                tokens = (windows - first_step * spec.batch_size) * self.windows.seq_len
                rate = tokens / max(now - started, 1e-9)
                after_step(Progress(self.epoch + 1, self.step, self.steps_per_epoch, mean, rate))
        # A gate opens within the first epoch, so that what is evaluated and stored has none.
        set_gate(model, spec, (self.epoch + 1) * self.steps_per_epoch, self.steps_per_epoch)

    def order(self) -> Tensor:
        """The numbers of the windows of the epoch under way, in their order.

        Where an epoch does not read all of them, it goes on in the shuffled passes over all that
        earlier epochs and phases began.
        """
        spec, every = self.spec, len(self.windows)
        if spec.epoch_steps is None:
            draw = stream(spec.seed, "order", spec.index, self.epoch + 1)
            return torch.randperm(every, generator=draw)
        first = (spec.begun + self.epoch) * self.epoch_windows
        last = first + self.epoch_windows
        passes = range(first // every, -(-last // every))
        drawn = (torch.randperm(every, generator=stream(spec.seed, "pass", p)) for p in passes)
        return torch.cat([*drawn])[first - passes[0] * every :][: self.epoch_windows]

    def backward(self, window_n: Tensor, exit_weights: Sequence[float]) -> Tensor:
        """Add the gradients of the loss of these windows; gives the loss, detached."""
        loss = self.loss(*self.windows.batch(window_n), exit_weights, window_n)
        loss.backward()
        return loss.detach()

    def loss(
        self,
        input_nt: Tensor,
        target_nt: Tensor,
        exit_weights: Sequence[float] | None = None,
        window_n: Tensor | None = None,
    ) -> Tensor:
        """The loss of one batch: cross-entropy at the exits that carry weight (the phase's own).

        `window_n` are the numbers of its windows, by which states that are kept are found.
        """
        spec = self.spec
        weights = exit_weights or spec.exit_weights
        exits = [e for e, weight in enumerate(weights) if weight > 0]
        with autocast(self.spec, self.device):
            if self.frozen is not None and window_n is not None:
                hidden_entd = self.frozen.hidden(self.model, window_n)
            else:
                hidden_entd = self.body(input_nt)
            attached = [spec.last_read] if spec.detached else exits
            states = [hidden_entd[e] if e in attached else hidden_entd[e].detach() for e in exits]
            return self.cross_entropy(
                [self.model.read(hidden_ntd).flatten(0, 1) for hidden_ntd in states],
                self.model.head_weight,
                target_nt.reshape(-1),
                [weights[e] for e in exits],
                count=False,
                workspace=self.workspace,
            ).loss

    def call_others(self) -> None:
        """Have the others of the group begin in the state in which this one is."""
        assert self.group is not None, "there are others"
        state = {"loss_sum/": self.loss_sum} | self.model.state_dict()
        state |= optimizer_tensors(self.optimizer)  # a / is in each of their names
        self.group.order("start", self.spec.index, self.epoch, self.step, tensors=state)

    def finish_epoch(self) -> tuple[float, float]:
        """Close the epoch under way; gives its mean training loss and its seconds."""
        result = self.check_finite(), self.seconds
        self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
        self.loss_sum = torch.zeros_like(self.loss_sum)
        return result

    def mean_loss(self) -> float:
        """The mean loss of the epoch under way, 0 before its first step."""
        if self.step == 0:
            return 0.0
        tokens = min(self.step * self.spec.batch_size, self.epoch_windows) * self.windows.seq_len
        return float(self.loss_sum) / tokens

    def check_finite(self) -> float:
        """The mean loss of the epoch under way. Raises Diverged where it is not finite."""
        mean = self.mean_loss()
        if not math.isfinite(mean):
            raise Diverged(
                f"the training loss became {mean} in phase {self.spec.index + 1}, epoch "
                f"{self.epoch + 1}, step {self.step}: lower lr.base, or add lr.warmup_steps"
            )
        return mean


def evaluate(
    model: Model,
    spec: TrainSpec,
    corpus: Corpus,
    device: torch.device,
    exits: Sequence[int],
    between_batches: Callable[[], None] | None = None,
    frozen: FrozenStates | None = None,
    on_test: bool = False,
    group: Group | None = None,
    shared: bool = False,
) -> list[ExitMetrics]:
    """Loss and accuracy at each of `exits`, over all validation windows, in one pass.

    `frozen` are hidden states of the validation windows that are kept, where they hold `exits`.
    on_test: over the windows of the test text instead.
    group: each of its processes takes a share, less of it where a signal comes. shared: all have
        this model, as the one that they train, and what is kept.
    """
    if group is not None and group.rank == 0:
        how = spec.index, [*exits], on_test, model.gate is not None
        group.order("evaluate", *how, tensors={} if shared else model.state_dict())
    tokens = corpus.test if on_test else corpus.validation
    assert tokens is not None, "there is such a text"
    windows = Windows(tokens, device)
    workspace = Workspace()
    model.eval()
    scores: list[ExitScores] = []
    with torch.inference_mode():
        size = spec.batch_size
        if device.type != "cpu":
            # Few launches; what is kept of a batch are hidden states.
            size = max(size, TOKENS_ON_DEVICE // windows.seq_len)
        own = torch.arange(len(windows))
        if group is not None:
            own = group.share(own, own=True)
        for batch in own.split(size) if len(own) else ():
            input_nt, target_nt = windows.batch(batch)
            with autocast(spec, device):
                hidden_entd = model(input_nt) if frozen is None else frozen.hidden(model, batch)
                states = [model.read(hidden_entd[e]).flatten(0, 1) for e in exits]
                target_n = target_nt.reshape(-1)
                scores += [evaluate_exits(states, model.head_weight, target_n, workspace=workspace)]
            if group is not None and group.stop.signal is not None:
                break
            if between_batches is not None:
                between_batches()
    zero_e = torch.zeros(len(exits), dtype=torch.int64, device=device)
    nll_e = functools.reduce(torch.add, [score.nll_e for score in scores], zero_e)
    correct_e = functools.reduce(torch.add, [score.correct_e for score in scores], zero_e)
    if group is not None:
        nll_e, correct_e = group.sum(torch.stack([nll_e.double(), correct_e.double()]))
    count = len(windows) * windows.seq_len
    return [
        ExitMetrics(e, nll / count, correct / count)
        for e, nll, correct in zip(exits, nll_e.tolist(), correct_e.tolist(), strict=True)
    ]


def follow_orders(
    group: Group, specs: Sequence[TrainSpec], corpus: Corpus, device: torch.device
) -> None:
    """Do what the first process of the group orders: train and evaluate phases of these `specs`."""
    training: Training | None = None
    for what, about, tensors in group.orders():
        if what == "drop":
            training = None
        else:
            training = _follow(what, about, tensors, training, specs, corpus, device, group)
        tensors.clear()


def _follow(
    what: str,
    about: Sequence[Any],
    tensors: dict[str, Tensor],
    training: Training | None,
    specs: Sequence[TrainSpec],
    corpus: Corpus,
    device: torch.device,
    group: Group,
) -> Training | None:
    """Do one order, and return what is in training then. What came with it is taken from `tensors`,
    so that nothing is held twice.
    """
    if what == "epoch":
        assert training is not None, "it was started"
        while training.epoch < about[0]:
            training.finish_epoch()
        training.train_epoch()
        return training
    spec, model, frozen = specs[about[0]], None, None
    if weights := {name: tensors.pop(name) for name in [*tensors] if "/" not in name}:
        model = restored(spec.layers, asdict(spec.architecture), weights)
        weights.clear()
        model = model.to(device)
    elif training is not None:
        model, frozen = training.model, training.frozen_validation
    assert model is not None, "it was sent, or is in training"
    if what == "start":
        training = Training(model, spec, corpus, device, tensors, group)
        _, training.epoch, training.step = about
        training.loss_sum = tensors["loss_sum/"]
        return training
    _, exits, on_test, gated = about
    if gated:
        set_gate(model, spec, step=0, steps_per_epoch=1)
    evaluate(model, spec, corpus, device, exits, None, frozen, on_test, group)
    return training


def gradient_share(optimizer: torch.optim.Optimizer) -> Tensor:
    """The norm of the new layers' gradient over that of all that trains: a scalar from 0 to 1."""

    squares = [
        (group["role"] is Role.new, parameter.grad.square().sum())
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    total = torch.stack([square for _, square in squares]).sum()
    new = [square for is_new, square in squares if is_new]
    return (torch.stack(new).sum() / total).sqrt() if new else torch.zeros_like(total)


def set_gate(model: Model, spec: TrainSpec, step: int, steps_per_epoch: int) -> None:
    """Give the model its gate at optimizer step `step` of the phase: none any more once it is 1."""
    value = gate_value(spec.growth, step, steps_per_epoch)
    model.gate = None if value is None else torch.tensor(value, device=model.head_weight.device)
    model.gated_layers = spec.new_layers


def autocast(spec: TrainSpec, device: torch.device) -> torch.autocast:
    """Mixed precision for body and head, where the phase asks for it."""
    mixed = spec.precision == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=mixed)
