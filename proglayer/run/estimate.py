"""How long runs will still take, from what is stored of their phases."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean


@dataclass(frozen=True)
class PhaseProgress:
    """How far a phase is.

    flops: floating-point operations of one of its epochs.
    max_epochs: how many it may take.
    epochs: how many are stored.
    seconds: what those took, evaluation included.
    complete: whether it needs no further one.
    """

    flops: int
    max_epochs: int
    epochs: int = 0
    seconds: float = 0.0
    complete: bool = False


def estimate(
    phases: Mapping[Hashable, PhaseProgress], runs: Sequence[Sequence[Hashable]], workers: int
) -> float | None:
    """Estimate the seconds until all `runs`, each a row of names in `phases`, are complete.

    A phase that several runs share is trained once. Epochs go as fast as the stored ones, by their
    floating-point operations; an unfinished phase ends after as many epochs as complete ones took,
    of which those that are stored are done. `workers` runs go on at once, and the phases of a run
    one after another.

    Returns None while no phase is complete: how many epochs one takes is not known then.
    """
    complete = [phase.epochs for phase in phases.values() if phase.complete and phase.max_epochs]
    flops = sum(phase.epochs * phase.flops for phase in phases.values())
    seconds = sum(phase.seconds for phase in phases.values())
    if not complete or not seconds:
        return None
    expected = mean(complete)

    def left(phase: PhaseProgress) -> float:
        if phase.complete or not phase.max_epochs:
            return 0.0
        epochs = min(max(expected - phase.epochs, 1.0), phase.max_epochs - phase.epochs)
        return epochs * phase.flops * seconds / flops

    each = {name: left(phase) for name, phase in phases.items()}
    longest = max((sum(each[name] for name in run) for run in runs), default=0.0)
    return max(sum(each.values()) / workers, longest)
