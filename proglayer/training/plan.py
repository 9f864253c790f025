"""From settings to a tuple of phases. Needs no torch.

A phase's `train` holds everything its training depends on and nothing that comes later in the
plan, so two runs whose plans begin alike share those phases bit for bit.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from proglayer.config import (
    BudgetOverrides,
    Config,
    ConfigError,
    FreezeStep,
    Kind,
    LayerDrop,
    OptimizerConfig,
    Precision,
    ScheduleShape,
    Settings,
    SomeLayers,
    depth_problems,
    growths_of,
)
from proglayer.training.architecture import Architecture, CausalLM, later
from proglayer.training.growth import Growth, growth_of, layer_sources, ties_of
from proglayer.training.stopping import StoppingRule

if TYPE_CHECKING:
    from proglayer.data.pretrained import Pretrained

T = TypeVar("T", bound=Settings)


class Role(StrEnum):
    """What a parameter is to its phase."""

    new = "new"
    existing = "existing"
    embedding = "embedding"
    head = "head"  # with the norm that it reads through, where there is one


@dataclass(frozen=True)
class Rates:
    """Learning rate of each role; None where nothing of that role trains."""

    new: float | None
    existing: float | None
    embedding: float | None
    head: float | None


@dataclass(frozen=True)
class Schedule:
    """How the rate moves within a phase. `total_epochs` is None where the shape needs no end.

    begun: epochs of earlier phases that the same schedule went over.
    warm_again: steps at the start of a later phase over which the rate rises to the schedule's.
    """

    shape: ScheduleShape
    warmup_steps: int
    final_factor: float
    total_epochs: int | None
    decay_share: float | None = None
    begun: int = later(0)
    warm_again: int = later(0)

    def factor(self, step: int, steps_per_epoch: int) -> float:
        """What the rate is multiplied by at optimizer step `step` of the phase, counted from 0."""
        again = min(1.0, (step + 1) / self.warm_again) if self.warm_again else 1.0
        return again * self._factor(step + self.begun * steps_per_epoch, steps_per_epoch)

    def _factor(self, step: int, steps_per_epoch: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.total_epochs is None:
            return 1.0
        total = self.total_epochs * steps_per_epoch
        begin = self.warmup_steps
        if self.decay_share is not None:  # warm-up, stable, decay: only its last part falls
            begin = max(begin, round(total * (1 - self.decay_share)))
        done = min(1.0, max(0.0, (step - begin) / max(1, total - begin)))
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return 1 - (1 - self.final_factor) * done


@dataclass(frozen=True)
class ExitCurriculum:
    """Which of the exits with a weight the loss reads at a step; its position is the step alone.

    rotate: the last exit, and every `every`-th of the others in turn (0: one of them at a time),
    their weights times `every`, so that the mean over a round is the full loss; or, `normalized`,
    such that they add up to 1 in each step.
    gradual: from the last exit down, all of them after `steps` steps, or `epochs` epochs where that
    is 0; weights add up to 1.
    After Elhoushi et al. 2024, "LayerSkip".
    """

    kind: str = "all"
    every: int = 0
    steps: int = 0
    epochs: float = later(0.0)
    normalized: bool = later(False)

    def weights(
        self, full: tuple[float, ...], step: int, steps_per_epoch: int
    ) -> tuple[float, ...]:
        """The weight of each exit at optimizer step `step` of a phase, counted from 0."""
        *others, _ = [exit for exit, weight in enumerate(full) if weight > 0]
        if self.kind == "all" or not others:
            return full
        weights = list(full)
        if self.kind == "rotate":
            every = min(self.every or len(others), len(others))
            for place, exit in enumerate(others):
                scale = 1 if self.normalized else every
                weights[exit] *= scale if place % every == step % every else 0
            if not self.normalized:
                return tuple(weights)
        else:
            steps = self.steps or math.ceil(self.epochs * steps_per_epoch)
            shown = min(len(others), step * len(others) // steps)
            if shown == len(others):
                return full
            for exit in others[: len(others) - shown]:
                weights[exit] = 0.0
        return tuple(weight / sum(weights) for weight in weights)


@dataclass(frozen=True)
class TrainSpec:
    """Everything that the training of a phase depends on, beside its text, its machine and the
    weights it starts with; nothing else. With these it is the key of what is trained.

    Layers are numbered from 0 at the bottom, as they stand after this phase's growth.
    `new_layers` came with the latest growth, which may be an earlier phase's.
    epoch_steps, begun: optimizer steps of an epoch in which not all windows are read, and the
        epochs of earlier phases, after which the windows go on.
    layer_drop: how often a step leaves out each layer, bottom first; empty where none is.
    frozen_kinds: parts that are frozen in every layer.
    checkpoint_sha256: the hash of a checkpoint that the first phase starts with.
    """

    index: int
    seed: int
    architecture: Architecture | CausalLM
    checkpoint_sha256: str | None
    layers: int
    growth: Growth | None
    new_layers: tuple[int, ...]
    trained_layers: tuple[int, ...]
    exit_weights: tuple[float, ...]
    curriculum: ExitCurriculum
    detached: bool
    rates: Rates
    schedule: Schedule
    optimizer: OptimizerConfig
    batch_size: int
    samples: int | None
    accumulate: int
    precision: Precision
    compile: bool
    checkpoint_activations: bool
    cache_frozen: bool
    epoch_steps: int | None = later(None)
    begun: int = later(0)
    layer_drop: tuple[float, ...] = later(())
    frozen_kinds: tuple[str, ...] = later(())

    @property
    def exits(self) -> int:
        """How many exits there are: one for each layer, and with no layer the embedding's."""
        return max(1, self.layers)

    @property
    def ties(self) -> Sequence[int]:
        """For each layer the one whose tensors it has: itself, unless some share theirs."""
        return self.architecture.ties or range(self.layers)

    @property
    def last_read(self) -> int:
        """The highest exit that the loss reads. Where exits are detached, this one is not."""
        return max(exit for exit, weight in enumerate(self.exit_weights) if weight > 0)

    @property
    def lowest_trained(self) -> int:
        """The lowest layer whose output needs a gradient to reach something that trains."""
        if self.rates.embedding is not None:
            return -1
        return min(self.trained_layers, default=self.exits)

    @property
    def frozen(self) -> tuple[str, ...]:
        """The frozen parts by name: `embedding`, `layers.0`, ..., `layers.*.mlp`, `head` (with its
        norm).
        """
        parts = [f"layers.{i}" for i in range(self.layers) if i not in self.trained_layers]
        parts += [f"layers.*.{kind}" for kind in self.frozen_kinds]
        if self.rates.embedding is None:
            parts.insert(0, "embedding")
        if self.rates.head is None:
            parts.append("head")
        return tuple(parts)

    def exit_weights_at(self, step: int, steps_per_epoch: int) -> tuple[float, ...]:
        """The loss's weight at each exit at optimizer step `step` of the phase."""
        return self.curriculum.weights(self.exit_weights, step, steps_per_epoch)

    def dropped_at(self, step: int) -> tuple[int, ...]:
        """The layers that optimizer step `step` of the phase leaves out: never all that train."""
        if not self.layer_drop:
            return ()
        draw = random.Random(f"{self.seed}/drop/{self.index}/{step}")
        dropped = [layer for layer, often in enumerate(self.layer_drop) if draw.random() < often]
        if dropped == [*self.trained_layers]:  # nothing might get a gradient
            del dropped[0]
        return tuple(dropped)

    def steps_per_epoch(self, train_windows: int) -> int:
        """Batches in an epoch, the last short one counted."""
        return math.ceil(self.windows(train_windows) / self.batch_size)

    def windows(self, train_windows: int) -> int:
        """Training windows of an epoch."""
        pool = self.pool(train_windows)
        return self.epoch_steps * self.batch_size if self.epoch_steps else pool

    def pool(self, train_windows: int) -> int:
        """Training windows that there are, of a corpus with enough."""
        return train_windows if self.samples is None else self.samples


@dataclass(frozen=True)
class Phase:
    """One stretch of training: one depth, one trainable set, one set of rates.

    train: what its training depends on.
    stop: when it ends, and which epoch it selects.
    evaluate: the exits, bottom first, that are evaluated where it starts and at its end; the last
        is one of them.
    """

    train: TrainSpec
    stop: StoppingRule
    evaluate: tuple[int, ...]

    @property
    def index(self) -> int:
        """Its place in the plan, counted from 0."""
        return self.train.index

    @property
    def name(self) -> str:
        """What this phase is called in tables."""
        if self.index == 0:
            return "initial"
        if self.train.growth is not None:
            return "grown"
        return "unfreezing" if self.train.new_layers else "continued"


def open_checkpoint(config: Config) -> Pretrained | None:
    """Find what `model.path` names, before a text is prepared for it; None for an untrained model.

    Raises ConfigError where there is no model of a family that is known.
    """
    path, revision = config.model.path, config.model.revision
    if path is None:
        return None
    # Both take a while to import, which `train.py --help` and `--cfg job` are to be spared.
    from proglayer.data.pretrained import open_pretrained
    from proglayer.training.causal_lm import known_family

    settings = open_pretrained(path, revision, weights=False)
    known_family(settings, path)  # before its weights are fetched
    return settings if config.plan else open_pretrained(path, revision)


def plan(
    config: Config, vocab_size: int, checkpoint: Pretrained | None = None
) -> tuple[Phase, ...]:
    """The phases of a run on a corpus of `vocab_size` words.

    checkpoint: what `open_checkpoint` gave.

    Raises ConfigError where the settings and the corpus, or the depths, do not fit together.
    """
    model, padded = config.model, config.model.vocab_size
    if padded is not None and padded < vocab_size:
        raise ConfigError(
            f"model.vocab_size={padded} is smaller than the corpus's vocabulary of {vocab_size}: "
            "raise it, or lower data.max_vocab"
        )
    vocab_size, depth = padded or vocab_size, None
    if model.kind == "causal_lm":
        from proglayer.training.causal_lm import architecture_of

        seq_len, first = config.data.seq_len, _first_depth(config, 0)
        architecture, depth = architecture_of(model, checkpoint, vocab_size, seq_len, first)
    else:
        sizes = (model.dim, model.num_heads, model.ffn_multiple, model.rotary_base, model.norm_eps)
        how = model.norm, model.residual_scale
        architecture = Architecture(vocab_size, *sizes, *how)  # pyright: ignore[reportArgumentType]
    if depth is not None:
        layers = depth if config.initial_layers is None else config.initial_layers
        config = config.model_copy(update={"initial_layers": layers})
        if problems := list(depth_problems(config)):
            raise ConfigError("\n".join(problems))
        if (first := _first_depth(config, layers)) > depth:
            raise ConfigError(
                f"model.path={model.path} has {depth} layers, and the first phase asks for "
                f"{first}: lower initial_layers, or take phase=grow_once"
            )
    # A plan is shown without its weights, which may be large.
    sha256 = None if checkpoint is None or config.plan else checkpoint.sha256()
    phases = tuple(_phases(config, architecture, sha256))
    for phase in phases:
        rates = phase.train.rates
        if architecture.tied and rates.embedding != rates.head:
            raise ConfigError(
                f"phase {phase.index + 1} trains embedding and head apart, which are one tensor of "
                f"this model: give them the same value in freeze.initial, in each of freeze.steps "
                "and in lr.factor, or set model.untie=true"
            )
    return phases


def _first_depth(config: Config, most: int) -> int:
    """How many layers the first phase has; `most` where it takes all of a checkpoint."""
    layers = most if config.initial_layers is None else config.initial_layers
    if config.phase.schedule != "from_scratch":
        return layers
    for part in growths_of(config):
        given = part.growth.layers
        layers = layers + part.added_layers if given is None else len(given)  # pyright: ignore
    return layers


def _phases(
    config: Config, architecture: Architecture | CausalLM, sha256: str | None
) -> list[Phase]:
    layers = initial_layers = _first_depth(config, 0)
    every = tuple(range(layers))
    base, initial = config.lr.base, config.freeze.initial
    rates = Rates(base, base, base if initial.embedding else None, base if initial.head else None)
    where: dict[str, Any] = {"architecture": architecture.grown(every), "layers": layers}
    where |= {"new_layers": every, "trained_layers": every, "checkpoint_sha256": sha256}
    where["growth"] = None
    phases = [_phase(config, 0, rates, where)]
    growths = growths_of(config)
    if config.phase.schedule == "from_scratch":
        growths = []
    grows = config.phase.schedule != "keep_training"
    for part in growths if grows else growths[:1]:
        factor, base = part.lr.factor, part.lr.base
        growth = growth_of(part, layers, initial_layers) if grows else None
        sources = layer_sources(layers, growth)
        ties = ties_of(sources, phases[-1].train.ties, part.growth.share)
        layers = len(sources)
        every = tuple(range(layers))
        where["architecture"] = where["architecture"].grown([old.layer for old in sources], ties)
        new_layers = tuple(i for i, source in enumerate(sources) if source.new)
        existing = [layer for layer in range(layers) if layer not in new_layers]
        where |= {"layers": layers, "new_layers": new_layers, "checkpoint_sha256": None}
        for number, step in enumerate(part.freeze.steps):
            count = len(existing) if step.existing == "all" else int(step.existing)
            setting, kinds = f"freeze.steps[{number}]", {*step.frozen_kinds}
            held = every if kinds == {*get_args(Kind)} else _held(step, layers, setting)
            thawed = {*existing[len(existing) - count :]}.difference(held)
            fresh = {*new_layers}.difference(held)
            where["trained_layers"] = tuple(sorted(fresh | thawed))
            if any((ties[i] in fresh | thawed) != (i in fresh | thawed) for i in every):
                wrong = "freezes a layer and trains one that has its tensors (growth.share=true)"
                raise ConfigError(f"{setting} {wrong}: take freeze=none")
            where["frozen_kinds"] = tuple(sorted(kinds)) if fresh | thawed else ()
            where["growth"] = None if number else growth
            if not thawed and not fresh and not step.embedding and not step.head:
                raise ConfigError(f"{setting} freezes everything: nothing would train")
            rates = Rates(
                new=base * factor.new if fresh & {*ties} else None,
                existing=base * factor.existing if thawed else None,
                embedding=base * factor.embedding if step.embedding else None,
                head=base * factor.head if step.head else None,
            )
            phases.append(_phase(part, len(phases), rates, where))
    return _one_run(config, phases)


def _held(step: FreezeStep, layers: int, setting: str) -> tuple[int, ...]:
    """The layers, of so many, that a freeze step holds. Raises ConfigError for others."""
    held = step.frozen_layers
    if isinstance(held, SomeLayers):
        nth = range(held.every - 1, layers, held.every) if held.every else ()
        return (*range(held.lowest), *nth)
    if held and max(held) >= layers:
        raise ConfigError(f"{setting}.frozen_layers={list(held)} names others than {layers} layers")
    return held


def _one_run(config: Config, phases: list[Phase]) -> list[Phase]:
    """Phases that go on with the windows, or the rate schedule, of those before them."""
    of_data, of_rates = config.phase.epoch_steps is not None, config.lr.span == "run"
    if not of_data and not of_rates:
        return phases
    total, begun = sum(phase.stop.max_epochs for phase in phases), 0
    for number, phase in enumerate(phases):
        train, stop = phase.train, replace(phase.stop, whole=True)
        if of_rates:
            again = config.lr.grown.warmup_steps if train.growth else None
            schedule = phases[0].train.schedule
            ends = schedule.total_epochs and total
            schedule = replace(schedule, total_epochs=ends, begun=begun, warm_again=again or 0)
            train = replace(train, schedule=schedule)
        if of_data:
            train = replace(train, begun=begun)
        phases[number] = replace(phase, train=train, stop=stop)
        begun += stop.max_epochs
    sizes = {(phase.train.batch_size, phase.train.samples) for phase in phases}
    if len(sizes) > 1:
        raise ConfigError(
            "phase.epoch_steps and lr.span=run go over all phases: give them the same batch_size "
            "and samples"
        )
    return phases


def _own(general: T, part: Settings) -> T:
    """What holds for all phases, but for what is a phase's own."""
    return general.model_copy(update={name: value for name, value in part if value is not None})


def _phase(config: Config, index: int, rates: Rates, where: dict[str, Any]) -> Phase:
    """A phase with its own budget, schedule and loss, or what holds for all phases.

    where: the fields of its `TrainSpec` that say what it trains.
    """
    part = config.phase.grown if index else config.phase.initial
    budget, lr = _own(config.phase, part), config.lr
    if index:
        lr = _own(lr, lr.grown)
    loss = config.loss
    gradual, rotates = (loss.curriculum == kind for kind in ("gradual", "rotate"))
    decays = lr.schedule != "constant"
    train = TrainSpec(
        index=index,
        seed=config.seed,
        exit_weights=_exit_weights(config, part, where["layers"]),
        curriculum=ExitCurriculum(
            loss.curriculum,
            every=(loss.rotate_every or 0) if rotates else 0,
            steps=(loss.gradual_steps or 0) if gradual else 0,
            epochs=budget.max_epochs / 2 if gradual and not loss.gradual_steps else 0.0,
            normalized=rotates and loss.normalize,
        ),
        detached=loss.detach,
        rates=rates,
        schedule=Schedule(
            shape=lr.schedule,
            warmup_steps=lr.warmup_steps,
            final_factor=lr.final_factor if decays else 1.0,
            total_epochs=budget.max_epochs if decays else None,
            decay_share=lr.decay_share if lr.schedule == "wsd" else None,
        ),
        optimizer=config.optimizer
        if index
        else config.optimizer.model_copy(update={"carry": "none"}),
        batch_size=budget.batch_size,
        samples=budget.samples,
        accumulate=budget.accumulate,
        epoch_steps=budget.epoch_steps,
        precision=config.precision,
        compile=config.compile,
        checkpoint_activations=config.model.checkpoint_activations,
        cache_frozen=False,
        layer_drop=_layer_drop(budget.layer_drop, where["layers"], where["trained_layers"]),
        **where,
    )
    above = [str(layer + 1) for layer in train.trained_layers if layer > train.last_read]
    if above:
        raise ConfigError(
            f"model.exit_weights={list(config.model.exit_weights)} gives no weight above layer "
            f"{train.last_read + 1} of {train.layers}: layer {', '.join(above)} would get no "
            f"gradient in phase {index + 1}"
        )
    # What frozen layers give below all that trains can be kept.
    lowest, last = train.lowest_trained, train.exits - 1
    gated = train.growth and train.growth.gate_steps and min(train.new_layers, default=0) < lowest
    keeps = config.cache_frozen and lowest > 0 and not gated and not config.compile
    every = config.model.evaluated_exits == "all"
    return Phase(
        train=replace(train, cache_frozen=keeps),
        stop=StoppingRule(budget.max_epochs, budget.patience, budget.min_delta),
        evaluate=tuple(
            e for e, weight in enumerate(train.exit_weights) if every or weight > 0 or e == last
        ),
    )


def _layer_drop(drop: LayerDrop, layers: int, trained: Sequence[int]) -> tuple[float, ...]:
    """How often each layer is left out: of those that train, as none else needs it; empty where
    that is none. A number is the top layer's, with 2^(l / (L - 1)) - 1 of it in layer l of L (from
    0), as in LayerSkip (Elhoushi et al. 2024).
    """
    if not isinstance(drop, tuple):
        drop = tuple(drop * (2 ** (layer / max(1, layers - 1)) - 1) for layer in range(layers))
    if len(drop) < layers:
        raise ConfigError(f"phase.layer_drop={list(drop)} has {len(drop)} for {layers} layers")
    often = tuple(drop[layer] if layer in trained else 0.0 for layer in range(layers))
    return often if any(often) and len(trained) > 1 else ()


def _exit_weights(config: Config, own: BudgetOverrides, layers: int) -> tuple[float, ...]:
    """The loss's weight at each exit, bottom first, adding up to 1: the phase's own, if any."""
    layers = max(1, layers)
    named, setting = own.exit_weights, "the phase's own exit_weights"
    if named is None:
        named, setting = config.model.exit_weights, "model.exit_weights"
    shapes = {
        "last": [0] * (layers - 1) + [1],
        "uniform": [1] * layers,
        "linear": range(1, layers + 1),
        "cumulative": list(itertools.accumulate(range(1, layers + 1))),
    }
    raw = shapes[named] if isinstance(named, str) else named[:layers]
    if len(raw) < layers:
        raise ConfigError(f"{setting}={list(named)} has {len(named)} weights for {layers} layers")
    if sum(raw) == 0:
        raise ConfigError(f"{setting}={list(named)} gives no weight to any of {layers} layers")
    return tuple(weight / sum(raw) for weight in raw)


def schedule_warning(phase: Phase) -> str | None:
    """Tell where patience may end the phase before its schedule does."""
    schedule, patience = phase.train.schedule, phase.stop.patience
    if phase.stop.whole or schedule.total_epochs is None or patience >= schedule.total_epochs:
        return None
    return (
        f"lr.schedule={schedule.shape} ends after {schedule.total_epochs} epochs; "
        f"patience={patience} may stop phase {phase.index + 1} before"
    )
