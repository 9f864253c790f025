"""Plans and trainings of a model that trains in a moment."""

from __future__ import annotations

import torch

from proglayer.training.growth import build
from proglayer.training.model import Model
from proglayer.training.plan import Phase, plan
from proglayer.training.trainer import Training

from ..helpers import TINY, config, tiny_corpus

CPU = torch.device("cpu")
CORPUS = tiny_corpus()


def planned(*overrides: str) -> tuple[Phase, ...]:
    """The phases of a tiny model on `CORPUS`."""
    return plan(config(*TINY, *overrides), CORPUS.vocab_size)


def begun(phase: Phase, model: Model | None = None) -> Training:
    """A training of this model, of a new one where none is given."""
    return Training(build(phase) if model is None else model, phase, CORPUS, CPU)


def trained(phase: Phase, model: Model | None = None, epochs: int = 1) -> Training:
    """The same after some epochs."""
    training = begun(phase, model)
    for _ in range(epochs):
        training.train_epoch()
        training.finish_epoch()
    return training


def pattern(old: Model, new: Model) -> str:
    """The old layer whose tensors each new one has, `r` where none."""

    def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
        return all(map(torch.equal, a.parameters(), b.parameters()))

    return "".join(
        next((str(i) for i, below in enumerate(old.layers) if same(below, layer)), "r")
        for layer in new.layers
    )
