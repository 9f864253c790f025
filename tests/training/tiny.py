"""Plans and trainings of a model that trains in a moment."""

from __future__ import annotations

import torch

from proglayer.training.build import build
from proglayer.training.model import Model
from proglayer.training.plan import TrainSpec, plan
from proglayer.training.trainer import Training

from ..helpers import TINY, config, tiny_corpus

CPU = torch.device("cpu")
CORPUS = tiny_corpus()


def planned(*overrides: str) -> tuple[TrainSpec, ...]:
    """How the phases of a tiny model on `CORPUS` train."""
    return tuple(phase.train for phase in plan(config(*TINY, *overrides), CORPUS.vocab_size))


def begun(spec: TrainSpec, model: Model | None = None) -> Training:
    """A training of this model, of a new one where none is given."""
    return Training(build(spec) if model is None else model, spec, CORPUS, CPU)


def trained(spec: TrainSpec, model: Model | None = None, epochs: int = 1) -> Training:
    """The same after some epochs."""
    training = begun(spec, model)
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
