"""What a phase may have of its own: loss, curriculum, schedule, moments, and what trains."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from proglayer.config import ConfigError
from proglayer.training.build import build, grow
from proglayer.training.cost import parameter_counts, training_flops
from proglayer.training.optim import build_optimizer, carried_tensors, optimizer_tensors, start_from
from proglayer.training.plan import ExitCurriculum, plan
from proglayer.training.stopping import EpochMetrics, follow
from proglayer.training.trainer import Training, evaluate

from ..helpers import config
from .tiny import CORPUS, CPU, begun, planned, trained

# -- the loss -------------------------------------------------------------------------------------


def test_initial_and_grown_phases_have_exit_weights_of_their_own() -> None:
    initial, grown = planned("phase.initial.exit_weights=uniform")
    assert initial.exit_weights == (1 / 3,) * 3
    assert grown.exit_weights == (0, 0, 0, 1)
    initial, grown = planned("model=deep_supervision", "phase.grown.exit_weights=[0,0,0,2]")
    assert (initial.exit_weights, grown.exit_weights) == ((1 / 3,) * 3, (0, 0, 0, 1))


def test_the_mean_over_a_round_of_a_rotation_is_the_full_loss() -> None:
    for full in ((0.25,) * 4, (0.1, 0.0, 0.3, 0.2, 0.4)):
        for every in (0, 1, 2, 3, 9):
            curriculum = ExitCurriculum("rotate", every)
            others = sum(weight > 0 for weight in full) - 1
            length = min(every or others, others)
            steps = [curriculum.weights(full, step, 9) for step in range(length)]
            assert [sum(each) / length for each in zip(*steps, strict=True)] == pytest.approx(full)
            assert all(weights[-1] == full[-1] for weights in steps)
            assert curriculum.weights(full, length, 9) == steps[0]
            normalized = ExitCurriculum("rotate", every, normalized=True)
            for step, weights in enumerate(steps):
                read = [weight * (found > 0) for weight, found in zip(full, weights, strict=True)]
                expected = [weight / sum(read) for weight in read]
                assert normalized.weights(full, step, 9) == pytest.approx(expected)


def test_a_gradual_curriculum_goes_from_the_last_exit_down() -> None:
    curriculum = ExitCurriculum("gradual", steps=8)
    full = (0.2,) * 5
    read = [[e for e, w in enumerate(curriculum.weights(full, s, 9)) if w] for s in range(0, 10, 2)]
    assert read == [[4], [3, 4], [2, 3, 4], [1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert all(sum(curriculum.weights(full, s, 9)) == pytest.approx(1) for s in range(10))
    assert curriculum.weights(full, 8, 9) == full
    # By itself it is through after half of the phase's epochs.
    own = planned("model=deep_supervision", "loss.curriculum=gradual", "phase.max_epochs=6")[0]
    read = [sum(weight > 0 for weight in own.exit_weights_at(s, 10)) for s in range(40)]
    assert (read[0], read[14], read[15], read[29], read[30]) == (1, 1, 2, 2, 3)


def test_a_rotating_loss_reads_only_the_exits_of_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from proglayer.training import trainer

    phase = planned("model=deep_supervision", "loss.curriculum=rotate", "initial_layers=6")[0]
    seen = []
    whole = trainer.linear_cross_entropy

    def spy(hidden, *rest, **named):
        seen.append(len(hidden))
        return whole(hidden, *rest, **named)

    monkeypatch.setattr(trainer.Training, "cross_entropy", staticmethod(spy))
    trained(phase)
    assert set(seen) == {2}
    full = planned("model=deep_supervision", "initial_layers=6")[0]
    costs = [training_flops(each, 8, 40) for each in (phase, full)]
    assert costs[0].head / costs[1].head == pytest.approx(2 / 6)
    assert costs[0].body == costs[1].body


def test_detached_exits_train_the_head_alone() -> None:
    phase = planned("model=deep_supervision", "loss.detach=true")[0]
    model = build(phase)
    training = begun(phase, model)
    input_nt, target_nt = training.windows.batch(torch.arange(8))
    training.loss(input_nt, target_nt).backward()
    detached = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    # The layers get what the last exit alone gives them; the head what all exits do.
    for name, exits in (("layers.0.ffn.w1.weight", (0, 0, 1 / 3)), ("head.weight", (1 / 3,) * 3)):
        for p in model.parameters():
            p.grad = None
        plain = Training(model, planned("model=deep_supervision")[0], CORPUS, CPU)
        plain.loss(input_nt, target_nt, exits).backward()
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        torch.testing.assert_close(detached[name], gradient)
    attached = planned("model=deep_supervision")[0]
    assert training_flops(phase, 8, 40).head < training_flops(attached, 8, 40).head


# -- what trains ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "layers", "kinds"),
    [
        ("frozen_layers: [0, 1, 4]", "235", ()),
        ("frozen_layers: {lowest: 1, every: 3}", "134", ()),
        ("frozen_kinds: [norms, attention]", "012345", ("attention", "norms")),
        ("frozen_layers: {lowest: 5}, frozen_kinds: [mlp]", "5", ("mlp",)),
        ("frozen_kinds: [mlp, norms, attention]", "", ()),
    ],
)
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_a_freeze_step_holds_layers_and_kinds(
    norm: str, held: str, layers: str, kinds: tuple[str, ...]
) -> None:
    step = f"{{existing: all, embedding: true, head: true, {held}}}"
    growth = ("growth=stack", "added_layers=3", f"model.norm={norm}")
    first, second = planned(*growth, f"freeze.steps=[{step}]")
    assert ("".join(map(str, second.trained_layers)), second.frozen_kinds) == (layers, kinds)
    model = grow(build(first), second)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    training = trained(second, model)
    words = {"attention": "attention", "mlp": "ffn", "norms": "norm"}
    for name, p in model.named_parameters():
        holds = name.startswith("layers.") and (
            name.split(".")[1] not in layers or any(words[kind] in name for kind in kinds)
        )
        assert torch.equal(p, before[name]) is holds, name
    assert parameter_counts(second).trainable == sum(p.numel() for p in training.trainable)
    whole = planned(*growth, "freeze=none")[1]
    assert training_flops(second, 8, 40).body < training_flops(whole, 8, 40).body


@pytest.mark.parametrize(
    ("held", "line"),
    [
        ("frozen_layers: [4]", r"frozen_layers=\[4\] names others than 4 layers"),
        ("frozen_layers: [3]", "freezes everything"),
        ("frozen_kinds: [attention, mlp, norms]", "freezes everything"),
        ("frozen_layers: {highest: 2}", "a list of layers from 0, or"),
    ],
)
def test_what_a_freeze_step_cannot_hold_is_told(held: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        planned(f"freeze.steps=[{{existing: 0, embedding: false, head: false, {held}}}]")


def test_steps_leave_layers_out_as_often_as_is_asked_for() -> None:
    spec = planned("phase.layer_drop=0.4", "initial_layers=5")[0]
    assert spec.layer_drop == pytest.approx([0.4 * (2 ** (layer / 4) - 1) for layer in range(5)])
    steps = [spec.dropped_at(step) for step in range(4_000)]
    for layer, often in enumerate(spec.layer_drop):
        assert sum(layer in each for each in steps) / 4_000 == pytest.approx(often, abs=0.03)
    other = replace(spec, seed=spec.seed + 1)
    assert steps != [other.dropped_at(step) for step in range(4_000)]
    always, grown = planned("phase.layer_drop=[0.99,0.99,0.99,0.99]")
    assert all(len(always.dropped_at(step)) < 3 for step in range(99))
    assert grown.layer_drop == ()  # one layer trains, so it is never left out
    with pytest.raises(ConfigError, match=r"phase.layer_drop=\[0.5\] has 1 for 3 layers"):
        planned("phase.layer_drop=[0.5]")
    with pytest.raises(ConfigError, match="a number from 0 to below 1, or a list"):
        planned("phase.layer_drop=1")


@pytest.mark.parametrize("again", ["false", "true"])
def test_a_layer_that_a_step_leaves_out_is_as_if_it_were_not_there(again: str) -> None:
    whole, _ = planned("model=deep_supervision", f"model.checkpoint_activations={again}")
    none, half, all_of_them = (replace(whole, layer_drop=(0.0, p, 0.0)) for p in (0, 0.5, 1))
    training = begun(all_of_them)
    before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    seen: list[tuple[Tensor, ...]] = []
    training.model.register_forward_hook(lambda _, __, exits: seen.append(exits))
    training.train_epoch()
    assert all(torch.equal(exits[0], exits[1]) for exits in seen)
    for name, p in training.model.named_parameters():
        assert torch.equal(p, before[name]) is name.startswith("layers.1."), name
    assert training.model.dropped == ()  # what is evaluated has all its layers
    bodies = [training_flops(each, 8, 40).body for each in (none, half, all_of_them)]
    assert bodies[0] - bodies[1] == bodies[1] - bodies[2] > 0


# -- rates and moments ----------------------------------------------------------------------------


def test_grown_phases_have_a_schedule_of_their_own() -> None:
    initial, grown = planned(
        "lr.grown.schedule=linear", "lr.grown.warmup_steps=4", "lr.grown.final_factor=0.5"
    )
    assert {initial.schedule.factor(step, 3) for step in range(9)} == {1.0}
    assert [grown.schedule.factor(step, 3) for step in (0, 3, 9)] == [0.25, 1, 0.5]


def test_warmup_stable_decay() -> None:
    schedule = planned(
        "lr.schedule=wsd", "lr.warmup_steps=2", "lr.decay_share=0.5", "phase.max_epochs=2"
    )[0].schedule
    factors = [schedule.factor(step, 10) for step in (0, 1, 2, 9, 10, 15, 20, 30)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 0.5, 0, 0])


@pytest.mark.parametrize("carry", ["none", "existing", "copy"])
def test_what_is_carried_goes_by_name(carry: str) -> None:
    growth = ("growth=stack", "added_layers=2", "freeze=none")
    initial, grown = planned(*growth, f"optimizer.carry={carry}")
    training = trained(initial)
    before = optimizer_tensors(training.optimizer)
    optimizer = build_optimizer(grow(training.model, grown), grown)
    start_from(optimizer, carried_tensors(before, grown, 3))
    after = optimizer_tensors(optimizer)
    sources = {"existing": {0: 0, 1: 1, 2: 2}, "copy": {0: 0, 1: 1, 2: 2, 3: 0, 4: 1}}
    expected = set()
    for new, old in sources.get(carry, {}).items():
        for name in ("attention.q.weight", "ffn.w2.weight", "norm1.weight"):
            for entry in ("step", "exp_avg", "exp_avg_sq"):
                key = f"layers.{new}.{name}/{entry}"
                assert torch.equal(after[key], before[f"layers.{old}.{name}/{entry}"])
                assert after[key].data_ptr() != before[f"layers.{old}.{name}/{entry}"].data_ptr()
        expected.add(str(new))
    assert {name.split(".")[1] for name in after if name.startswith("layers")} == expected
    assert ("head.weight/exp_avg" in after) is (carry != "none")


def test_weight_decay_may_leave_out_gains_and_embedding() -> None:
    def without(*overrides: str) -> set[str]:
        phase = planned("model.norm=pre", "optimizer.weight_decay=0.1", *overrides)[0]
        groups = build_optimizer(build(phase), phase).param_groups
        names = {name for group in groups if group["weight_decay"] == 0 for name in group["names"]}
        assert {group["weight_decay"] for group in groups} <= {0.0, 0.1}
        return names

    assert without() == set()
    gains = {f"layers.{i}.norm{k}.weight" for i in range(3) for k in (1, 2)} | {"norm.weight"}
    assert without("optimizer.decay_norms=false") == gains
    assert without("optimizer.decay_embedding=false") == {"embedding.weight"}


# -- what trains ----------------------------------------------------------------------------------


def test_the_embedding_may_be_frozen_from_the_start() -> None:
    phase = planned("freeze.initial.embedding=false")[0]
    before = build(phase).embedding.weight
    assert torch.equal(trained(phase).model.embedding.weight, before)
    assert phase.frozen == ("embedding",)
    counts = parameter_counts(phase)
    assert counts.total - counts.trainable == 30 * 8


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_a_model_without_layers_is_the_embedding_read_by_the_head(norm: str) -> None:
    overrides = ("initial_layers=0", f"model.norm={norm}", "model=deep_supervision")
    initial, grown = planned(*overrides, "added_layers=2", "freeze=none")
    assert (initial.exits, initial.exit_weights) == (1, (1.0,))
    training = trained(initial)
    model = training.model
    tokens = torch.arange(30)[None]
    expected = model.head(model.norm(model.embedding(tokens)))
    assert torch.equal(model.logits(tokens), expected)
    # A bigram model: what is predicted depends on the last word alone.
    torch.testing.assert_close(model.logits(tokens)[:, -1], model.logits(tokens[:, -1:])[:, -1])
    (last,) = evaluate(model, initial, CORPUS, CPU, [0])
    assert last.loss < 3.4
    assert training_flops(initial, 8, 40).body == 0
    assert parameter_counts(initial).total == sum(p.numel() for p in model.parameters())
    assert len(grow(model, grown).layers) == 2


# -- one run of the data and one schedule ----------------------------------------------------------

ONE_RUN = (
    "phase.epoch_steps=4", "lr.span=run", "lr.schedule=linear", "lr.warmup_steps=3", "lr=constant",
    "optimizer.carry=existing", "freeze=none", "phase.batch_size=6",
)  # fmt: skip


def test_phases_of_one_run_are_one_phase_cut_in_two() -> None:
    own = ("phase.initial.max_epochs=2", "phase.grown.max_epochs=3")
    first, second = planned(*ONE_RUN, "phase=keep_training", *own)
    (whole,) = planned(*ONE_RUN, "phase=from_scratch", "added_layers=0", "phase.max_epochs=5")
    at_once, part = trained(whole, epochs=5), trained(first, epochs=2)
    moments = carried_tensors(optimizer_tensors(part.optimizer), second, 3)
    rest = Training(part.model, second, CORPUS, CPU, moments)
    for _ in range(3):
        rest.train_epoch()
        rest.finish_epoch()
    for name, tensor in at_once.model.state_dict().items():
        assert torch.equal(tensor, rest.model.state_dict()[name]), name


def test_the_windows_go_on_over_epochs_and_phases() -> None:
    first, second = planned(*ONE_RUN, "phase.initial.max_epochs=2", "phase.grown.max_epochs=3")
    orders = []
    for spec, epochs in ((first, 2), (second, 3)):
        training = begun(spec, None if spec is first else build(replace(spec, growth=None)))
        for training.epoch in range(epochs):
            orders += training.order().tolist()
    windows = len(CORPUS.train)
    assert len(orders) == 5 * 4 * 6 > 2 * windows
    for begin in range(0, len(orders) - windows, windows):
        assert sorted(orders[begin : begin + windows]) == list(range(windows))
    assert orders[:windows] != orders[windows : 2 * windows]


def test_one_schedule_goes_over_all_phases_and_may_warm_up_again() -> None:
    own = ("phase.initial.max_epochs=2", "phase.grown.max_epochs=3")
    for again in (0, 4):
        more = (f"lr.grown.warmup_steps={again}",) if again else ()
        first, second = planned(*ONE_RUN, *own, *more)
        (whole,) = planned(*ONE_RUN, "phase=from_scratch", "phase.max_epochs=5")
        factors = [first.schedule.factor(step, 4) for step in range(8)]
        factors += [second.schedule.factor(step, 4) for step in range(12)]
        expected = [whole.schedule.factor(step, 4) for step in range(20)]
        for step in range(again):
            expected[8 + step] *= (step + 1) / again
        assert factors == expected


def test_a_phase_of_one_run_takes_its_whole_length() -> None:
    phases = plan(config(*ONE_RUN, "phase.initial.max_epochs=2", "phase.grown.max_epochs=3"), 30)
    losses = [1.0, 2.0, 3.0, 4.0]
    for phase, length in zip(phases, (2, 3), strict=True):
        epochs = [EpochMetrics(n + 1, 1.0, loss, 0.0, 1, 0.0, 0.0) for n, loss in enumerate(losses)]
        stopped = follow(phase.stop, epochs)
        assert stopped is not None
        assert (len(stopped.epochs), stopped.best.epoch) == (length, length)
    with pytest.raises(ConfigError, match="give them the same batch_size"):
        planned(*ONE_RUN, "phase.grown.batch_size=2")


def test_new_layers_of_zero_take_no_moments_over() -> None:
    phase = planned("growth=zero", "optimizer.carry=copy", "freeze=none")[1]
    tensors = {f"layers.{layer}.w/step": torch.ones(()) for layer in range(3)}
    assert sorted(carried_tensors(tensors, phase, 3)) == sorted(tensors)
