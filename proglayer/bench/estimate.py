"""What a study will take: the number of its distinct phases times a few measured steps of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from proglayer.bench.measure import interleaved, made_up_corpus, new_training, train
from proglayer.launch.sweep import Job, prefix_of
from proglayer.training.plan import Phase
from proglayer.training.trainer import Training, evaluate


@dataclass(frozen=True)
class Shape:
    """Phases of a study that cost the same, and what they cost. Seconds.

    finish: reading every exit once more at the phase's end.
    """

    text: str
    phases: int
    epochs: int
    steps: int
    step: float
    evaluation: float
    finish: float

    @property
    def epoch(self) -> float:
        return self.steps * self.step + self.evaluation

    @property
    def seconds(self) -> float:
        """All phases of this shape, one after another."""
        return self.phases * (self.epochs * self.epoch + self.finish)


def distinct_phases(jobs: Sequence[Job]) -> list[tuple[Job, Phase]]:
    """Every phase that has to be trained once, however many jobs read it."""
    found: dict[Any, tuple[Job, Phase]] = {}
    for job in jobs:
        for depth, phase in enumerate(job.phases, start=1):
            found.setdefault(prefix_of(job, depth), (job, phase))
    return list(found.values())


def estimate(jobs: Sequence[Job], epochs: int, device: torch.device) -> list[Shape]:
    """What the distinct phases of a study take at `epochs` epochs each, by timing a few steps."""
    shapes: dict[Any, list[tuple[Job, Phase]]] = {}
    for job, phase in distinct_phases(jobs):
        shapes.setdefault(_cost_shape(job, phase), []).append((job, phase))
    return [_time_shape(members, epochs, device) for members in shapes.values()]


def _cost_shape(job: Job, phase: Phase) -> tuple[Any, ...]:
    """What the time of a phase depends on: how it starts and what its rates are do not matter."""
    return (
        phase.architecture,
        phase.trained_layers,
        tuple(weight > 0 for weight in phase.exit_weights),
        tuple(rate is None for rate in asdict(phase.rates).values()),
        phase.batch_size,
        phase.precision,
        phase.compile,
        phase.stop.max_epochs,
        job.config.data.seq_len,
        phase.windows(len(job.corpus.train)),
        len(job.corpus.validation),
    )


def _time_shape(members: Sequence[tuple[Job, Phase]], epochs: int, device: torch.device) -> Shape:
    job, phase = members[0]
    seq_len = job.config.data.seq_len
    steps = 1 if device.type == "cpu" else 20
    training = new_training(Training, phase, seq_len, steps, device)
    windows = min(len(job.corpus.validation), 4 * phase.batch_size)
    corpus = made_up_corpus(phase.architecture.vocab_size, seq_len, 0, windows)

    def read(exits: range) -> Callable[[], object]:
        return lambda: evaluate(training.model, phase, corpus, device, exits)

    seconds = interleaved(
        {
            "step": lambda: train(training),
            "evaluation": read(range(phase.layers - 1, phase.layers)),
            "finish": read(range(phase.layers)),
        },
        3,
        device,
    )
    whole = len(job.corpus.validation) / windows
    read_exits = sum(weight > 0 for weight in phase.exit_weights)
    return Shape(
        text=(
            f"{phase.name}: {phase.layers} layers, {len(phase.trained_layers)} trained, "
            f"{read_exits} exit{'s' if read_exits > 1 else ''} read, "
            f"vocabulary {phase.architecture.vocab_size:,}, dim {phase.architecture.dim}"
        ),
        phases=len(members),
        epochs=min(epochs, phase.stop.max_epochs),
        steps=phase.steps_per_epoch(len(job.corpus.train)),
        step=median(seconds["step"]) / steps,
        evaluation=median(seconds["evaluation"]) * whole,
        finish=median(seconds["finish"]) * whole,
    )
