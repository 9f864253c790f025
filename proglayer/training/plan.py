"""From settings to a tuple of phases, and what each phase costs. Pure: no torch, no disk.

A `Phase` holds everything its training depends on and nothing that comes later in the plan, so
two runs whose plans begin alike share those phases bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, replace
from enum import StrEnum
from typing import Any

from proglayer.config import (
    BudgetOverrides,
    Carry,
    Config,
    ConfigError,
    Curriculum,
    EvaluatedExits,
    ExitWeights,
    GrowthInit,
    GrowthPosition,
    ModelConfig,
    ModelKind,
    OptimizerConfig,
    PhaseSchedule,
    Precision,
    ScheduleShape,
    depth_problems,
    to_plain,
)
from proglayer.training.architecture import Architecture, CausalLM


class Role(StrEnum):
    """What a parameter is to its phase."""

    new = "new"
    existing = "existing"
    embedding = "embedding"
    head = "head"  # with the norm that it reads through, where there is one


@dataclass(frozen=True)
class Growth:
    """Layers added at the start of a phase. Settings that an operator does not read keep their
    defaults here, so that they are no part of what the phase depends on.
    """

    layers: int
    init: GrowthInit
    position: GrowthPosition
    noise: float = 0.0
    block: int = 1
    gate_steps: int = 0


@dataclass(frozen=True)
class Source:
    """Where a layer of a grown model comes from.

    `layer` is the old layer that it is or starts from, None for one that is drawn; `new` whether
    the growth added it.
    """

    layer: int | None
    new: bool


@dataclass(frozen=True)
class Rates:
    """Learning rate of each role; None where nothing of that role trains."""

    new: float | None
    existing: float | None
    embedding: float | None
    head: float | None


@dataclass(frozen=True)
class Schedule:
    """How the rate moves within a phase. `total_epochs` is None where the shape needs no end."""

    shape: ScheduleShape
    warmup_steps: int
    final_factor: float
    total_epochs: int | None
    decay_share: float | None = None

    def factor(self, step: int, steps_per_epoch: int) -> float:
        """What the rate is multiplied by at optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.total_epochs is None:
            return 1.0
        total = self.total_epochs * steps_per_epoch
        if self.decay_share is not None:  # warm-up, stable, decay: only its last part falls
            stable = max(self.warmup_steps, round(total * (1 - self.decay_share)))
            done = min(1.0, max(0.0, (step - stable) / max(1, total - stable)))
        else:
            decay_steps = max(1, total - self.warmup_steps)
            done = min(1.0, (step - self.warmup_steps) / decay_steps)
        if self.shape is ScheduleShape.cosine:
            done = (1 - math.cos(math.pi * done)) / 2
        return 1 - (1 - self.final_factor) * done


@dataclass(frozen=True)
class ExitCurriculum:
    """Which of the exits with a weight the loss reads at a step; its position is the step alone.

    rotate: the last exit, and every `every`-th of the others in turn (0: one of them at a time),
    their weights times `every`, so that the mean over a round is the full loss.
    gradual: from the last exit down, all of them after `steps` steps, weights adding up to 1.
    After Elhoushi et al. 2024, "LayerSkip".
    """

    kind: str = "all"
    every: int = 0
    steps: int = 0

    def weights(self, full: tuple[float, ...], step: int) -> tuple[float, ...]:
        """The weight of each exit at optimizer step `step` of a phase, counted from 0."""
        *others, _ = [exit for exit, weight in enumerate(full) if weight > 0]
        if self.kind == "all" or not others:
            return full
        weights = list(full)
        if self.kind == "rotate":
            every = min(self.every or len(others), len(others))
            for place, exit in enumerate(others):
                weights[exit] *= every if place % every == step % every else 0
            return tuple(weights)
        shown = min(len(others), step * len(others) // self.steps)
        if shown == len(others):
            return full
        for exit in others[: len(others) - shown]:
            weights[exit] = 0.0
        return tuple(weight / sum(weights) for weight in weights)


@dataclass(frozen=True)
class StoppingRule:
    """When a phase ends. It only reads the trajectory, so it is no part of the trajectory's key."""

    max_epochs: int
    patience: int
    min_delta: float

    @property
    def first_epoch(self) -> int:
        """The first epoch that is read: 0, the model as it is, where none is trained."""
        return min(1, self.max_epochs)

    def improves(self, loss: float, best: float) -> bool:
        """Whether an epoch with this validation loss is an improvement on the best so far."""
        return loss < best - self.min_delta


@dataclass(frozen=True)
class Phase:
    """One stretch of training: one depth, one trainable set, one set of rates.

    Layers are numbered from 0 at the bottom, as they stand after this phase's growth.
    `new_layers` came with the latest growth, which may be an earlier phase's.
    """

    index: int
    seed: int
    architecture: Architecture | CausalLM
    layers: int
    growth: Growth | None
    new_layers: tuple[int, ...]
    trained_layers: tuple[int, ...]
    exit_weights: tuple[float, ...]
    rates: Rates
    schedule: Schedule
    optimizer: OptimizerConfig
    batch_size: int
    samples: int | None
    precision: Precision
    compile: bool
    stop: StoppingRule
    curriculum: ExitCurriculum = ExitCurriculum()
    detached: bool = False
    cache_frozen: bool = False
    accumulate: int = 1
    checkpoint_activations: bool = False
    # Whether every exit is evaluated where the phase starts and at its end, or the trained alone.
    evaluates_all: bool = True
    # The weights that the first phase starts with, where others trained them: their hash is part of
    # what the phase depends on, and where they lie is not.
    checkpoint_sha256: str | None = None
    checkpoint_folder: str | None = None

    @property
    def exits(self) -> int:
        """How many exits there are: one for each layer, and with no layer the embedding's."""
        return max(1, self.layers)

    @property
    def last_read(self) -> int:
        """The highest exit that the loss reads. Where exits are detached, this one is not."""
        return max(exit for exit, weight in enumerate(self.exit_weights) if weight > 0)

    @property
    def evaluated_exits(self) -> list[int]:
        """The exits that are evaluated where the phase starts and at its end, bottom first; the
        last is one of them.
        """
        trained = {exit for exit, weight in enumerate(self.exit_weights) if weight > 0}
        every = range(self.exits)
        return [exit for exit in every if self.evaluates_all or exit in trained | {every[-1]}]

    def exit_weights_at(self, step: int) -> tuple[float, ...]:
        """The loss's weight at each exit at optimizer step `step` of the phase."""
        return self.curriculum.weights(self.exit_weights, step)

    @property
    def name(self) -> str:
        """What this phase is called in tables."""
        if self.index == 0:
            return "initial"
        if self.growth is not None:
            return "grown"
        return "unfreezing" if self.new_layers else "continued"

    @property
    def frozen(self) -> tuple[str, ...]:
        """The frozen parts by name: `embedding`, `layers.0`, ..., `head` (with its norm)."""
        parts = [f"layers.{i}" for i in range(self.layers) if i not in self.trained_layers]
        if self.rates.embedding is None:
            parts.insert(0, "embedding")
        if self.rates.head is None:
            parts.append("head")
        return tuple(parts)

    def steps_per_epoch(self, train_windows: int) -> int:
        """Batches in an epoch, the last short one counted."""
        return math.ceil(self.windows(train_windows) / self.batch_size)

    def windows(self, train_windows: int) -> int:
        """Training windows of an epoch.

        Raises ConfigError where the corpus has fewer, or where they do not suffice for a gate.
        """
        windows = train_windows if self.samples is None else self.samples
        if windows > train_windows:
            raise ConfigError(
                f"phase.samples={self.samples} asks for more windows than the corpus gives "
                f"({train_windows}): lower it or raise data.samples"
            )
        steps = math.ceil(windows / self.batch_size)
        if self.growth is not None and self.growth.gate_steps > steps:
            raise ConfigError(
                f"growth.gate_steps={self.growth.gate_steps} is more than the {steps} optimizer "
                f"steps of an epoch of phase {self.index + 1}: the gate must be open at its end"
            )
        return windows


def plan(config: Config, vocab_size: int) -> tuple[Phase, ...]:
    """The phases of a run on a corpus of `vocab_size` words.

    Raises ConfigError where the settings and the corpus, or the depths, do not fit together.
    """
    vocab_size = _padded(config, vocab_size)
    if config.model.kind is ModelKind.causal_lm:
        phases = _causal_lm_phases(config, vocab_size)
    else:
        phases = tuple(_phases(config, _own_architecture(config.model, vocab_size)))
    for phase in phases:
        highest = phase.last_read
        above = [str(layer + 1) for layer in phase.trained_layers if layer > highest]
        if above:
            raise ConfigError(
                f"model.exit_weights={list(config.model.exit_weights)} gives no weight above layer "
                f"{highest + 1} of {phase.layers}: layer {', '.join(above)} would get no gradient "
                f"in phase {phase.index + 1}"
            )
    return tuple(replace(phase, cache_frozen=_caches(config, phase)) for phase in phases)


def check_checkpoint(model: ModelConfig) -> None:
    """Look at `model.path` before a text is prepared for it, which may take minutes.

    Raises ConfigError where there is no model of a family that is known.
    """
    if model.path is None:
        return
    from proglayer.data.pretrained import open_pretrained
    from proglayer.training.causal_lm import known_family

    known_family(open_pretrained(model.path, model.revision, weights=False), model.path)


def _own_architecture(model: ModelConfig, vocab_size: int) -> Architecture:
    sizes = (model.dim, model.num_heads, model.ffn_multiple, model.rotary_base, model.norm_eps)
    assert None not in sizes, "to_config refuses it"
    return Architecture(vocab_size, *sizes, model.norm.name)  # pyright: ignore[reportArgumentType]


def _causal_lm_phases(config: Config, vocab_size: int) -> tuple[Phase, ...]:
    """The phases of a model of `transformers`, which is imported here."""
    from proglayer.training.causal_lm import architecture_of

    model, found = config.model, None
    if model.path is not None:
        # Its wing imports NumPy, which `train.py --help` and `--cfg job` are to be spared.
        from proglayer.data.pretrained import open_pretrained

        found = open_pretrained(model.path, model.revision, weights=not config.plan)
    architecture, depth = architecture_of(model, found, vocab_size, config.data.seq_len)
    if depth is not None:
        layers = depth if config.initial_layers is None else config.initial_layers
        config = config.model_copy(update={"initial_layers": layers})
        if problems := list(depth_problems(config)):
            raise ConfigError("\n".join(problems))
    phases = tuple(_phases(config, architecture))
    if depth is not None and phases[0].layers > depth:
        raise ConfigError(
            f"model.path={model.path} has {depth} layers, and the first phase asks for "
            f"{phases[0].layers}: lower initial_layers, or take phase=grow_once"
        )
    for phase in phases:
        if architecture.tied and phase.rates.embedding != phase.rates.head:
            raise ConfigError(
                f"phase {phase.index + 1} trains embedding and head apart, which are one tensor of "
                f"this model: give them the same value in freeze.initial, in each of freeze.steps "
                "and in lr.factor, or set model.untie=true"
            )
    if found is None or config.plan:
        return phases
    first = replace(
        phases[0], checkpoint_sha256=found.sha256(), checkpoint_folder=str(found.folder)
    )
    return (first, *phases[1:])


def _caches(config: Config, phase: Phase) -> bool:
    """Whether the phase has frozen layers, below all that trains, whose output is kept."""
    lowest = lowest_trained(phase)
    gated = phase.growth is not None and phase.growth.gate_steps and min(phase.new_layers) < lowest
    return config.cache_frozen and lowest > 0 and not gated and not config.compile


def described(value: Any) -> Any:
    """A phase, or a part of one, as plain data, for the key of what it trains.

    A field that has a default is left out where it has that value: a phase that does not use what
    a later version brought keeps its key.
    """
    return to_plain(value, lambda field, item: field.default is MISSING or item != field.default)


def placements(layers: int, growth: Growth) -> tuple[int, ...]:
    """Where the new layers stand (0 = bottom) after `growth` on a model of `layers` layers.

    `interleave` spreads them evenly: 3 on 3 layers gives every old layer a new one above it, and
    1 on 3 goes above the second. `stack` puts them on top, `middle` above the block it repeats.
    """
    added = growth.layers
    if growth.init is GrowthInit.middle:
        above = _middle(layers, growth) + growth.block
        return tuple(range(above, above + added))
    if growth.position is GrowthPosition.top:
        return tuple(range(layers, layers + added))
    if growth.position is GrowthPosition.bottom:
        return tuple(range(added))
    return tuple(math.ceil((i + 0.5) * layers / added) + i for i in range(added))


def layer_sources(layers: int, growth: Growth) -> tuple[Source, ...]:
    """Where each layer, bottom first, of `layers` layers with `growth` comes from.

    stack: new layer i starts from old layer i mod `layers` (Gong et al. 2019; Du et al. 2024).
    middle: the new layers repeat a block in the middle (MIDAS, Saunshi et al. 2024).
    copy, zero, gate: from the old layer below; at the bottom, from the one above.
    """
    positions = placements(layers, growth)
    sources: list[Source] = []
    old = 0
    for number in range(layers + growth.layers):
        if number not in positions:
            sources.append(Source(old, False))
            old += 1
        elif growth.init is GrowthInit.random:
            sources.append(Source(None, True))
        elif growth.init is GrowthInit.stack:
            sources.append(Source(number % layers, True))
        elif growth.init is GrowthInit.middle:
            first = _middle(layers, growth)
            repeated = (number - positions[0]) % growth.block
            sources.append(Source(first + repeated, True))
        else:
            sources.append(Source(max(0, old - 1), True))
    return tuple(sources)


def _middle(layers: int, growth: Growth) -> int:
    """The lowest layer of the block that `middle` repeats."""
    return (layers - growth.block) // 2


def _growth(config: Config, added: int) -> Growth | None:
    if not added:
        return None
    settings = config.growth
    growth = Growth(added, settings.init, settings.position, settings.noise)
    if settings.init is GrowthInit.middle:
        return replace(growth, block=settings.block)
    if settings.init is GrowthInit.gate:
        return replace(growth, gate_steps=settings.gate_steps)
    return growth


def _padded(config: Config, vocab_size: int) -> int:
    padded = config.model.vocab_size
    if padded is None:
        return vocab_size
    if padded < vocab_size:
        raise ConfigError(
            f"model.vocab_size={padded} is smaller than the corpus's vocabulary of {vocab_size}: "
            "raise it, or lower data.max_vocab"
        )
    return padded


def _phases(config: Config, architecture: Architecture | CausalLM) -> Iterator[Phase]:
    schedule = config.phase.schedule
    assert config.initial_layers is not None, "to_config refuses it"
    layers = config.initial_layers
    layers += config.added_layers if schedule is PhaseSchedule.from_scratch else 0
    every = tuple(range(layers))
    base, initial = config.lr.base, config.freeze.initial
    rates = Rates(base, base, base if initial.embedding else None, base if initial.head else None)
    yield _phase(config, architecture, 0, None, layers, every, every, rates)
    growths: list[int] = {
        PhaseSchedule.grow_once: [config.added_layers],
        PhaseSchedule.one_at_a_time: [1] * config.added_layers,
        PhaseSchedule.keep_training: [0],
        PhaseSchedule.from_scratch: [],
    }[schedule]
    factor = config.lr.factor
    index = 0
    for added in growths:
        growth = _growth(config, added)
        new_layers = placements(layers, growth) if growth else ()
        layers += added
        existing = [layer for layer in range(layers) if layer not in new_layers]
        for number, step in enumerate(config.freeze.steps):
            index += 1
            count = len(existing) if step.existing == "all" else int(step.existing)
            thawed = existing[len(existing) - count :]
            trained = tuple(sorted((*new_layers, *thawed)))
            rates = Rates(
                new=base * factor.new if new_layers else None,
                existing=base * factor.existing if thawed else None,
                embedding=base * factor.embedding if step.embedding else None,
                head=base * factor.head if step.head else None,
            )
            grown = growth if number == 0 else None
            yield _phase(config, architecture, index, grown, layers, new_layers, trained, rates)


def _phase(
    config: Config,
    architecture: Architecture | CausalLM,
    index: int,
    growth: Growth | None,
    layers: int,
    new_layers: tuple[int, ...],
    trained_layers: tuple[int, ...],
    rates: Rates,
) -> Phase:
    """A phase with its own budget, schedule and loss, or what holds for all phases."""
    own = config.phase.grown if index else config.phase.initial

    def budget(name: str) -> Any:
        value = getattr(own, name)
        return getattr(config.phase, name) if value is None else value

    def rate(name: str) -> Any:
        value = getattr(config.lr.grown, name) if index else None
        return getattr(config.lr, name) if value is None else value

    loss = config.loss
    shape = rate("schedule")
    decays = shape is not ScheduleShape.constant
    return Phase(
        index=index,
        seed=config.seed,
        architecture=architecture,
        layers=layers,
        growth=growth,
        new_layers=new_layers,
        trained_layers=trained_layers,
        exit_weights=_exit_weights(config, own, layers),
        rates=rates,
        schedule=Schedule(
            shape=shape,
            warmup_steps=rate("warmup_steps"),
            final_factor=rate("final_factor") if decays else 1.0,
            total_epochs=budget("max_epochs") if decays else None,
            decay_share=config.lr.decay_share if shape is ScheduleShape.wsd else None,
        ),
        optimizer=config.optimizer
        if index
        else config.optimizer.model_copy(update={"carry": Carry.none}),
        batch_size=budget("batch_size"),
        samples=budget("samples"),
        precision=config.precision,
        compile=config.compile,
        stop=StoppingRule(budget("max_epochs"), budget("patience"), budget("min_delta")),
        curriculum=ExitCurriculum(
            loss.curriculum.name,
            (loss.rotate_every or 0) if loss.curriculum is Curriculum.rotate else 0,
            loss.gradual_steps if loss.curriculum is Curriculum.gradual else 0,
        ),
        detached=loss.detach,
        accumulate=config.phase.accumulate,
        checkpoint_activations=config.model.checkpoint_activations,
        evaluates_all=config.model.evaluated_exits is EvaluatedExits.all,
    )


def _exit_weights(config: Config, own: BudgetOverrides, layers: int) -> tuple[float, ...]:
    """The loss's weight at each exit, bottom first, adding up to 1: the phase's own, if any."""
    layers = max(1, layers)
    named, setting = own.exit_weights, "the phase's own exit_weights"
    if named is None:
        named, setting = config.model.exit_weights, "model.exit_weights"
    if named == ExitWeights.last.name:
        return (0.0,) * (layers - 1) + (1.0,)
    if named == ExitWeights.uniform.name:
        raw = [1.0] * layers
    elif named == ExitWeights.linear.name:
        raw = [float(i + 1) for i in range(layers)]
    elif len(named) < layers:
        raise ConfigError(f"{setting}={list(named)} has {len(named)} weights for {layers} layers")
    else:
        raw = [float(weight) for weight in named[:layers]]
    if sum(raw) == 0:
        raise ConfigError(f"{setting}={list(named)} gives no weight to any of {layers} layers")
    return tuple(weight / sum(raw) for weight in raw)


# ---------------------------------------------------------------------------------------------
# What a phase costs

# The loss's buffer of exponentials on a CPU (`blocks.KEPT_BYTES`).
MOST_BYTES_OF_LOSS = 150_000_000


@dataclass(frozen=True)
class Counts:
    """Parameters of a model."""

    total: int
    trainable: int


@dataclass(frozen=True)
class Flops:
    """Floating-point operations (a multiply-add is two) of the head and of everything below it."""

    head: int
    body: int


def parameter_counts(phase: Phase) -> Counts:
    """Parameters of the model in `phase`, in all and those that train."""
    sizes = phase.architecture.sizes
    head = sizes.norm + sizes.head
    trainable = sizes.layer * len(phase.trained_layers)
    trainable += sizes.embedding * (phase.rates.embedding is not None)
    trainable += head * (phase.rates.head is not None)
    return Counts(sizes.embedding + head + sizes.layer * phase.layers, trainable)


def training_flops(phase: Phase, seq_len: int, train_windows: int, epoch: int = 1) -> Flops:
    """Operations of one epoch of training: every matrix product that this phase needs.

    Forward everywhere; the gradient of a matrix where it trains; the gradient of its input where
    something below it trains. Only exits with a weight are read, and of those the ones that the
    curriculum reads in this epoch (1 is the first). Causal attention is counted
    over the whole square, as the usual formula 4 x tokens x dim does. What `cache_frozen` keeps
    runs once a phase and is left out; so is what `checkpoint_activations` forms a second time.
    """
    tokens = phase.windows(train_windows) * seq_len
    token_product = 2 * phase.architecture.vocab_size * phase.architecture.dim
    lowest = lowest_trained(phase)
    # A norm that trains between hidden state and head needs the gradient of what the head reads.
    norm_trains = phase.architecture.final_norm and phase.rates.head is not None
    head = 0
    for exit, read in enumerate(_tokens_read(phase, seq_len, train_windows, epoch)):
        attached = not phase.detached or exit == phase.last_read
        to_hidden = (lowest <= exit and attached) or norm_trains
        head += token_product * read * (1 + (phase.rates.head is not None) + to_hidden)
    sizes = phase.architecture.sizes
    matrices, reading = 2 * tokens * sizes.matrices, 2 * tokens * sizes.reading
    scores = 4 * tokens * seq_len * sizes.attention
    body = 0
    for layer in range(lowest if phase.cache_frozen else 0, min(phase.last_read + 1, phase.layers)):
        body += matrices + scores
        if lowest <= layer:
            body += 2 * scores
            body += matrices - reading * (lowest == layer)
            body += matrices * (layer in phase.trained_layers)
    return Flops(head=head, body=body)


def memory_bytes(phase: Phase, seq_len: int) -> int:
    """An estimate of the bytes that training holds at its peak, the process itself apart.

    Weights; gradients and the two moments of what trains; what each layer above the lowest that
    trains keeps for the backward pass (for each token, its inputs, queries, keys and values, and
    the feed-forward's widths; with `checkpoint_activations` its input, and one layer all of that);
    hidden states and their gradients at the exits; and the buffers of the loss.
    """
    shape = phase.architecture
    sizes, counts, width = shape.sizes, parameter_counts(phase), shape.weight_bytes
    parameters = width * (counts.total + 3 * counts.trainable)
    tokens = phase.batch_size // phase.accumulate * seq_len
    layer = 6 * shape.dim + 4 * sizes.attention + 4 * sizes.hidden
    first = max(0, lowest_trained(phase))
    layers = max(0, min(phase.last_read + 1, phase.layers) - first)
    kept = layers * (shape.dim if phase.checkpoint_activations else layer)
    kept += layer * (phase.checkpoint_activations and layers > 0)
    exits = sum(weight > 0 for weight in phase.exit_weights)
    kept += 3 * exits * shape.dim
    buffers = min(MOST_BYTES_OF_LOSS, 4 * tokens * shape.vocab_size)
    return parameters + width * tokens * kept + buffers


def evaluation_flops(phase: Phase, seq_len: int, validation_windows: int) -> Flops:
    """Operations of one evaluation at the last exit: the forward products.

    What `cache_frozen` keeps runs once a phase and is left out.
    """
    tokens = validation_windows * seq_len
    sizes = phase.architecture.sizes
    layer = 2 * tokens * sizes.matrices + 4 * tokens * seq_len * sizes.attention
    layers = phase.layers - (lowest_trained(phase) if phase.cache_frozen else 0)
    head = 2 * tokens * phase.architecture.vocab_size * phase.architecture.dim
    return Flops(head=head, body=layer * layers)


def lowest_trained(phase: Phase) -> int:
    """The lowest layer whose output needs a gradient to reach something that trains."""
    if phase.rates.embedding is not None:
        return -1
    return min(phase.trained_layers, default=phase.exits)


def _tokens_read(phase: Phase, seq_len: int, train_windows: int, epoch: int) -> list[int]:
    """How many tokens of an epoch the loss reads at each exit."""
    windows, steps = phase.windows(train_windows), phase.steps_per_epoch(train_windows)
    if phase.curriculum.kind == "all":
        return [windows * seq_len * (weight > 0) for weight in phase.exit_weights]
    read = [0] * phase.exits
    for step in range(steps):
        batch = min(phase.batch_size, windows - step * phase.batch_size)
        for exit, weight in enumerate(phase.exit_weights_at((epoch - 1) * steps + step)):
            read[exit] += batch * seq_len * (weight > 0)
    return read


def schedule_warnings(phase: Phase, train_windows: int) -> Iterator[str]:
    """What to know of a schedule: patience may end the phase before it does, or its warm-up takes
    longer than the phase.
    """
    total, patience = phase.schedule.total_epochs, phase.stop.patience
    if total is not None and patience < total:
        yield (
            f"lr.schedule={phase.schedule.shape.name} ends after {total} epochs; "
            f"patience={patience} may stop phase {phase.index + 1} before"
        )
    warmup = phase.schedule.warmup_steps
    steps = phase.stop.max_epochs * phase.steps_per_epoch(train_windows)
    if 0 < steps < warmup:
        yield (
            f"lr.warmup_steps={warmup} is more than the {steps} steps of phase {phase.index + 1}: "
            f"its rate gets to {steps / warmup:.2g} of what was asked for"
        )
