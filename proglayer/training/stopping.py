"""When a phase stops, and which epoch it selects: readers of a trajectory. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum


class StopReason(StrEnum):
    """What ended a phase: no improvement within its patience, or its most epochs."""

    patience = "patience"
    max_epochs = "max_epochs"


@dataclass(frozen=True)
class StoppingRule:
    """When a phase ends. It only reads the trajectory, so it is no part of the trajectory's key.

    whole: it takes all of `max_epochs`, and selects the last.
    """

    max_epochs: int
    patience: int
    min_delta: float
    whole: bool = False

    @property
    def first_epoch(self) -> int:
        """The first epoch that is read: 0, the model as it is, where none is trained."""
        return min(1, self.max_epochs)


@dataclass(frozen=True)
class EpochMetrics:
    """What one epoch of training gave. Losses in nats per token, shares from 0 to 1.

    Epoch 0 is the model that a phase starts with, and has no training loss.
    """

    epoch: int
    train_loss: float | None
    validation_loss: float
    validation_accuracy: float
    train_tokens: int
    train_seconds: float
    evaluation_seconds: float


def best_of(epochs: Iterable[EpochMetrics], rule: StoppingRule) -> EpochMetrics | None:
    """The best of `epochs`, in their order; the only place that says which it is.

    An epoch is an improvement when its validation loss is lower than that of the best so far minus
    `min_delta`. The first epoch is always one, and with `whole` each is. Returns None where there
    is no epoch.
    """
    best = None
    for metrics in epochs:
        if (
            best is None
            or rule.whole
            or metrics.validation_loss < best.validation_loss - rule.min_delta
        ):
            best = metrics
    return best


@dataclass(frozen=True)
class Stopped:
    """How a stopping rule ended: the epoch it selects, the epochs it read, and why it stopped."""

    best: EpochMetrics
    epochs: tuple[EpochMetrics, ...]
    reason: StopReason


def follow(
    rule: StoppingRule,
    epochs: Iterable[EpochMetrics],
    on_epoch: Callable[[EpochMetrics, EpochMetrics], None] | None = None,
) -> Stopped | None:
    """Read epochs until the rule says stop; select the last improvement (see `best_of`).

    `patience` epochs in a row without an improvement stop it, and so do `max_epochs`. `on_epoch`
    is called with each epoch and the best so far. Returns None if the epochs end first.
    """
    read: list[EpochMetrics] = []
    best = None
    for metrics in epochs:
        read.append(metrics)
        best = best_of([metrics] if best is None else [best, metrics], rule)
        assert best is not None
        if on_epoch is not None:
            on_epoch(metrics, best)
        if metrics.epoch - best.epoch >= rule.patience and not rule.whole:
            return Stopped(best, tuple(read), StopReason.patience)
        if metrics.epoch >= rule.max_epochs:
            return Stopped(best, tuple(read), StopReason.max_epochs)
    return None


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
