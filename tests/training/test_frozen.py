"""Hidden states of frozen layers, kept: the same training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from proglayer.training.build import grow
from proglayer.training.cost import evaluation_flops, training_flops
from proglayer.training.model import Model
from proglayer.training.plan import TrainSpec
from proglayer.training.trainer import evaluate

from .tiny import CORPUS, CPU, begun, planned, trained


def grown(*overrides: str) -> tuple[Model, TrainSpec]:
    """An initial model after an epoch and a growth, and the phase that goes on with it."""
    initial, phase = planned(*overrides)
    return grow(trained(initial).model, phase), phase


def train(model: Model, phase: TrainSpec, epochs: int = 2) -> tuple[list[float], list[Tensor]]:
    """Losses and metrics of each epoch, and the weights after the last."""
    training = begun(phase, model)
    losses = []
    for _ in range(epochs):
        training.train_epoch()
        losses.append(training.finish_epoch()[0])
        (metrics,) = evaluate(
            model, phase, CORPUS, CPU, [phase.exits - 1], frozen=training.frozen_validation
        )
        losses += [metrics.loss, metrics.accuracy]
    return losses, [parameter.detach().clone() for parameter in model.parameters()]


SHAPES = [
    ("model=standard",),
    ("model=deep_supervision",),
    ("model=deep_supervision", "freeze.steps=[{existing:1,embedding:false,head:true}]"),
    ("model=deep_supervision", "freeze.steps=[{existing:0,embedding:false,head:false}]"),
    ("model=standard", "model.norm=pre"),
    ("model=standard", "growth.position=interleave"),
    ("model=standard", "precision=bfloat16"),
]


@pytest.mark.parametrize("overrides", SHAPES, ids=" ".join)
def test_kept_states_give_the_training_that_computed_ones_give(overrides: tuple[str, ...]) -> None:
    model, phase = grown(*overrides)
    cached_model, cached = grown(*overrides, "cache_frozen=true")
    assert cached.cache_frozen
    assert replace(cached, cache_frozen=False) == phase
    expected, weights = train(model, phase)
    found, cached_weights = train(cached_model, cached)
    assert found == pytest.approx(expected, rel=1e-3 if "precision" in overrides[-1] else 1e-5)
    for mine, theirs in zip(cached_weights, weights, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_the_frozen_layers_run_once() -> None:
    model, phase = grown("cache_frozen=true")
    runs: list[int] = []
    model.layers[0].register_forward_hook(lambda *_: runs.append(1))
    train(model, phase, epochs=3)
    batches = -(-len(CORPUS.train) // phase.batch_size)
    assert len(runs) == 2 * batches  # of training and validation windows


def test_only_what_has_frozen_layers_at_the_bottom_is_changed() -> None:
    asked = planned("cache_frozen=true")
    assert [phase.cache_frozen for phase in asked] == [False, True]
    assert asked[0] == planned()[0]
    for overrides in (("growth.position=bottom",), ("compile=true",), ("freeze=none",)):
        assert not any(phase.cache_frozen for phase in planned("cache_frozen=true", *overrides))


def test_the_plan_counts_frozen_layers_once_a_phase() -> None:
    for flops in (training_flops, evaluation_flops):
        every, cached = (flops(planned(*o)[1], 8, 40) for o in ((), ("cache_frozen=true",)))
        assert cached.head == every.head
        # Three of four layers of the forward pass, each of a fourth of an evaluation.
        layer = evaluation_flops(planned()[1], 8, 40).body / 4
        assert every.body - cached.body == 3 * layer
