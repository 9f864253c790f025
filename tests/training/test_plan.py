"""Plans: which phases a run has, what trains in each, at which rate, and what it costs."""

from __future__ import annotations

import math

import pytest

from proglayer.config import ConfigError
from proglayer.store.entries import Machine, key_of
from proglayer.store.trajectory import describe
from proglayer.training.cost import evaluation_flops, parameter_counts, training_flops
from proglayer.training.plan import Phase, plan

from ..helpers import config, experiments

FOUNDING_VOCABULARY = 69_830


def planned(*overrides: str, vocab_size: int = FOUNDING_VOCABULARY) -> tuple[Phase, ...]:
    return plan(config(*overrides), vocab_size)


def test_parameter_counts_are_the_published_ones() -> None:
    initial, grown = planned("experiment=original")
    assert initial.train.architecture.sizes.layer == 65_664
    assert parameter_counts(initial.train)[:2] == (9_135_232, 9_135_232)
    assert parameter_counts(grown.train)[:2] == (9_200_896, 4_534_784)


def test_the_vocabulary_is_padded_to_the_founding_one() -> None:
    padded = planned("model.vocab_size=69830", vocab_size=33_448)
    assert parameter_counts(padded[1].train).total == 9_200_896
    with pytest.raises(ConfigError, match=r"model.vocab_size=69829 is smaller than .* 69830"):
        planned("model.vocab_size=69829")


def test_rates_follow_roles() -> None:
    initial, grown = planned("experiment=original")
    assert set(vars(initial.train.rates).values()) == {1e-3}
    assert grown.train.rates.new == grown.train.rates.head == pytest.approx(1e-4)
    assert grown.train.rates.existing is None
    assert grown.train.rates.embedding is None
    _, unfrozen = planned("experiment=split_lr", "freeze=none")
    assert (unfrozen.train.rates.new, unfrozen.train.rates.existing) == (1e-3, 1e-5)


@pytest.mark.parametrize(
    "experiment", sorted(set(experiments()) - {"wider", "control_from_scratch"})
)
def test_what_comes_later_does_not_leak_into_the_first_phase(experiment: str) -> None:
    first, original = planned(f"experiment={experiment}")[0], planned("experiment=original")[0]
    assert first.train == original.train


def test_layers_are_added_one_at_a_time() -> None:
    phases = planned("phase=one_at_a_time", "added_layers=3")
    found = [(p.train.layers, p.train.new_layers) for p in phases]
    assert found == [(3, (0, 1, 2)), (4, (3,)), (5, (4,)), (6, (5,))]
    assert phases[:2] == planned("added_layers=1")


def test_freezing_counts_existing_layers_from_the_top() -> None:
    phases = planned("freeze=gradual", "growth.position=bottom")
    assert phases[1].train.new_layers == (0,)
    assert phases[2].train.trained_layers == (0, 3)


def test_exit_weights() -> None:
    assert planned("model=standard")[1].train.exit_weights == (0, 0, 0, 1)
    assert planned("model=deep_supervision")[0].train.exit_weights == (1 / 3,) * 3
    assert planned("model=deep_supervision")[1].train.exit_weights == (1 / 4,) * 4
    assert planned("model.exit_weights=linear")[0].train.exit_weights == (1 / 6, 2 / 6, 3 / 6)
    assert planned("model.exit_weights=[1,0,1,2]")[0].train.exit_weights == (0.5, 0, 0.5)
    frozen = "freeze.steps=[{existing: 0, embedding: false, head: false}]"
    for weights, said, others in (
        ("[1,0,1]", "has 3 weights for 4 layers", ()),
        ("[0,0,0,1]", "gives no weight to any of 3 layers", ()),
        # Weights and states of layers that the loss does not reach would never come to be.
        ("[1,1,0,0]", r"model.exit_weights=\[1, 1, 0, 0\] .* layer 3 would get", ()),
        ("[1,1,1,0]", r"above layer 3 of 4: layer 4 would .* in phase 2", ()),
        ("[1,1,1,0]", r"above layer 3 of 4", (frozen,)),
    ):
        with pytest.raises(ConfigError, match=said):
            planned(f"model.exit_weights={weights}", *others)
    # What is above may be frozen: here the new layer goes to the bottom.
    below = planned("model.exit_weights=[1,0,1,0]", "growth.position=bottom", frozen)
    assert (below[1].train.trained_layers, below[1].train.exit_weights) == ((0,), (0.5, 0, 0.5, 0))


def test_budgets_of_their_own() -> None:
    initial, grown = planned(
        "phase.initial.max_epochs=7", "phase.grown.batch_size=8", "phase.patience=3"
    )
    assert (initial.stop.max_epochs, grown.stop.max_epochs) == (7, 50)
    assert (initial.train.batch_size, grown.train.batch_size) == (64, 8)
    assert initial.stop.patience == grown.stop.patience == 3


def test_a_phase_may_train_on_fewer_windows_than_there_are() -> None:
    phase = planned("phase.samples=100")[0]
    assert phase.train.windows(100) == 100
    assert phase.train.steps_per_epoch(500) == 2


def test_schedules() -> None:
    constant, warm = (planned(*o)[0].train.schedule for o in ((), ("lr.warmup_steps=4",)))
    assert {constant.factor(step, 10) for step in range(1000)} == {1.0}
    assert [warm.factor(step, 10) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    linear, cosine = (
        planned(*overrides)[0].train.schedule
        for overrides in (
            ("lr.schedule=linear", "phase.max_epochs=2", "lr.final_factor=0.5"),
            ("lr.schedule=cosine", "phase.max_epochs=1", "lr.warmup_steps=2"),
        )
    )
    assert [linear.factor(step, 2) for step in range(6)] == [1, 0.875, 0.75, 0.625, 0.5, 0.5]
    assert cosine.factor(2, 12) == 1
    assert cosine.factor(7, 12) == pytest.approx(0.5)
    assert cosine.factor(12, 12) == pytest.approx(0)
    # A constant rate does not depend on when training would end; a decaying one does.
    assert constant.total_epochs is None
    assert cosine.total_epochs == 1


def test_the_head_costs_what_its_products_cost() -> None:
    initial, grown = planned("experiment=original")
    product = 2 * 10_000 * 32 * FOUNDING_VOCABULARY * 64
    assert training_flops(initial.train, 32, 10_000).head == 3 * product
    assert training_flops(grown.train, 32, 10_000).head == 3 * product
    deep = planned("experiment=original", "model=deep_supervision")
    assert training_flops(deep[0].train, 32, 10_000).head == 9 * product
    # Below the new layer nothing trains: the three old exits train the head only.
    assert training_flops(deep[1].train, 32, 10_000).head == (3 + 3 * 2) * product
    assert evaluation_flops(grown.train, 32, 2_000).head == product / 5
    whole, frozen = (training_flops(p.train, 32, 10_000).body for p in (initial, grown))
    assert 0.4 < frozen / whole < 0.7


def test_stopping_is_no_part_of_what_a_phase_trains() -> None:
    short, long = planned("phase.patience=1"), planned("phase.patience=5", "phase.max_epochs=100")
    assert [phase.train for phase in short] == [phase.train for phase in long]
    assert math.isfinite(short[0].train.schedule.factor(10**6, 10))


def test_keys_hold_for_who_does_not_use_what_came_later() -> None:
    machine = Machine("cpu", "a cpu", 1, "2.13.0")
    stack = ("growth=stack", "added_layers=3", "lr.schedule=cosine")
    for overrides, expected in {
        (): "bd8f50b0dc06d6c08ee5441dbdd02059",
        ("growth=gate", "model=deep_supervision"): "8e2c7ea3c87e95ad872938485099532b",
        stack: "aafc591da8e2a7612f33292c4709150c",
    }.items():
        grown = plan(config(*overrides), 8192)[1]
        described = describe(None, grown.train, "text", machine) | {"format": 3}
        assert key_of(described) == expected
