"""Training: what moves, what must not, when it stops, and that it repeats bit for bit."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from proglayer.training.build import build, grow
from proglayer.training.cost import memory, training_flops
from proglayer.training.optim import build_optimizer, role_of, set_trainable
from proglayer.training.plan import TrainSpec, plan
from proglayer.training.stopping import EpochMetrics, StoppingRule, StopReason, follow
from proglayer.training.trainer import Diverged, Training, evaluate

from ..helpers import config, experiments
from .tiny import CORPUS, CPU, begun, planned, trained

LLAMA = ("model=causal_lm", "model.family=llama")


def epochs_with(perplexities: list[float]) -> Iterator[EpochMetrics]:
    for number, value in enumerate(perplexities, start=1):
        loss = torch.tensor(value, dtype=torch.float64).log().item()
        yield EpochMetrics(number, 0.0, loss, 0.0, 0, 0.0, 0.0)


# ---------------------------------------------------------------------------------------------
# Stopping


@pytest.mark.parametrize(
    ("rule", "series", "length", "best"),
    [
        # Patience 1 on the published series.
        ((50, 1, 0.0), [1003.76, 975.51, 983.27, 1.0], 3, 2),
        ((50, 1, 0.0), [1035.27, 977.14, 968.60, 974.80, 1.0], 4, 3),
        # Patience counts epochs in a row since the best.
        ((50, 3, 0.0), [9.0, 8.0, 8.5, 7.0, 7.5, 7.0, 7.1, 5.0], 7, 4),
        ((50, 4, 0.0), [9.0, 8.0, 8.5, 7.0, 7.5, 7.0, 7.1, 5.0, 6, 6, 6, 6, 1], 12, 8),
        # Equal is no improvement, and log 8 - log 6 is below a half.
        ((50, 1, 0.0), [3.0, 3.0, 1.0], 2, 1),
        ((50, 2, 0.5), [8.0, 7.0, 6.0, 3.0, 3.0], 3, 1),
        ((2, 1, 0.0), [3.0, 2.0, 1.0], 2, 2),
    ],
)
def test_when_a_phase_stops(
    rule: tuple[int, int, float], series: list[float], length: int, best: int
) -> None:
    stopped = follow(StoppingRule(*rule), epochs_with(series))
    assert (len(stopped.epochs), stopped.best.epoch) == (length, best)
    at_its_end = StopReason.max_epochs if rule[0] == length else StopReason.patience
    assert stopped.reason is at_its_end


# ---------------------------------------------------------------------------------------------
# What trains


@pytest.mark.parametrize("experiment", experiments())
def test_the_trainable_set_is_the_optimizers_in_every_phase(experiment: str) -> None:
    for planned_phase in plan(config(f"experiment={experiment}", "model.dim=16"), 50):
        phase = planned_phase.train
        model = _empty(phase)
        optimizer = build_optimizer(model, phase)
        in_optimizer = {id(p) for group in optimizer.param_groups for p in group["params"]}
        trainable = {id(p) for p in model.parameters() if p.requires_grad}
        assert in_optimizer == trainable
        frozen = {
            name.rsplit(".", 1)[0] if name.count(".") == 1 else ".".join(name.split(".")[:2])
            for name, p in model.named_parameters()
            if not p.requires_grad
        }
        assert frozen == set(phase.frozen)
        for group in optimizer.param_groups:
            assert group["lr"] == getattr(phase.rates, group["role"])
            assert all(role_of(name, phase) is group["role"] for name in group["names"])


def test_frozen_tensors_do_not_move_by_a_bit_and_trained_ones_all_do() -> None:
    """Weight decay, momentum and left-over gradients are what moves frozen weights elsewhere."""
    overrides = ("freeze=gradual", "optimizer.weight_decay=0.5")
    model = build(planned(*overrides)[0])
    for phase in planned(*overrides):
        model = grow(model, phase)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trained(phase, model)
        trainable = set(set_trainable(model, phase))
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert moved == trainable
        # As if a step had left gradients behind on everything:
        for p in model.parameters():
            p.grad = torch.ones_like(p)


def test_a_compiled_body_trains_as_the_plain_one_in_every_phase(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where other layers train than in the phase that was compiled before it."""
    # All of the compiler but its last stage, which takes half a minute for each phase.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    models = [build(planned()[0]) for _ in range(2)]
    for phases in zip(planned(), planned("compile=true"), strict=True):
        models = [grow(model, phase) for model, phase in zip(models, phases, strict=True)]
        for model, phase in zip(models, phases, strict=True):
            trained(phase, model)
        for plain, compiled in zip(*(model.parameters() for model in models), strict=True):
            assert plain.requires_grad == compiled.requires_grad
            torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------
# The loop


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("model_name", ["standard", "deep_supervision"])
def test_training_is_the_plain_loop(model_name: str, norm: str) -> None:
    """The slow, obvious twin: all logits, PyTorch's own loss, the same order of windows."""
    from proglayer.training.build import stream

    phase = planned(f"model={model_name}", f"model.norm={norm}", "phase.batch_size=7")[0]
    training = begun(phase)
    training.train_epoch()
    mean_loss, _ = training.finish_epoch()

    model = build(phase)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.01)
    order = torch.randperm(len(CORPUS.train), generator=stream(phase.seed, "order", 0, 1))
    total, tokens = 0.0, 0
    for rows in order.split(7):
        windows = torch.from_numpy(CORPUS.train[rows.numpy()]).long()
        optimizer.zero_grad()
        loss = torch.zeros(())
        for weight, hidden in zip(phase.exit_weights, model(windows[:, :-1]), strict=True):
            logits = model.head(model.norm(hidden))
            loss = loss + weight * F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item() * windows[:, 1:].numel()
        tokens += windows[:, 1:].numel()
    assert mean_loss == pytest.approx(total / tokens, rel=1e-5)
    for ours, plain in zip(training.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-4, atol=2e-5)


def test_evaluation_is_the_mean_over_all_tokens() -> None:
    phase = planned("phase.batch_size=7")[0]
    model = build(phase)
    results = evaluate(model, phase, CORPUS, CPU, range(3))
    windows = torch.from_numpy(CORPUS.validation.copy()).long()
    for result, hidden in zip(results, model(windows[:, :-1]), strict=True):
        logits, target = model.head(hidden).flatten(0, 1), windows[:, 1:].flatten()
        assert result.loss == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-5)
        assert result.accuracy == pytest.approx((logits.argmax(-1) == target).double().mean())
    # The batch plays no part beyond rounding.
    (alone,) = evaluate(model, planned("phase.batch_size=40")[0], CORPUS, CPU, [2])
    assert alone.loss == pytest.approx(results[2].loss, rel=1e-6)
    assert alone.accuracy == results[2].accuracy


def test_every_window_is_seen_once_an_epoch_in_a_new_order() -> None:
    phase = planned()[0]
    training = begun(phase)
    seen: list[list[int]] = []
    batch = training.windows.batch

    def spy(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen[-1] += rows.tolist()
        return batch(rows)

    training.windows.batch = spy  # type: ignore[method-assign]
    for _ in range(2):
        seen.append([])
        training.train_epoch()
        training.finish_epoch()
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(len(CORPUS.train)))
    assert seen[0] != seen[1]


def test_what_is_frozen_and_has_nothing_that_trains_below_records_no_gradients() -> None:
    for phase in planned("model=deep_supervision", "freeze=gradual"):
        training = begun(phase, _empty(phase))
        hidden_entd = training.model(torch.zeros(2, 8, dtype=torch.long))
        lowest = 0 if phase.rates.embedding is not None else min(phase.trained_layers)
        assert [hidden.requires_grad for hidden in hidden_entd] == [
            layer >= lowest for layer in range(phase.layers)
        ]
        # All that the top exit keeps for its gradient leads to what trains.
        kept, seen = [hidden_entd[-1].grad_fn], set()
        while kept:
            node = kept.pop()
            if node is not None and node not in seen:
                seen.add(node)
                kept += [below for below, _ in node.next_functions]
        leaves = {id(node.variable) for node in seen if hasattr(node, "variable")}
        body = {name: p for name, p in training.model.named_parameters() if name != "head.weight"}
        assert [id(p) in leaves for p in body.values()] == [p.requires_grad for p in body.values()]


def test_bfloat16_trains_close_to_float32_and_keeps_float32_weights() -> None:
    losses = {}
    for precision in ("float32", "bfloat16"):
        phase = planned(f"precision={precision}", "model=deep_supervision")[0]
        training = begun(phase)
        training.train_epoch()
        losses[precision], _ = training.finish_epoch()
        assert {p.dtype for p in training.model.parameters()} == {torch.float32}
        (last,) = evaluate(training.model, phase, CORPUS, CPU, [2])
        assert last.loss < 4
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.01)


def test_a_loss_that_is_not_a_number_stops_training_and_names_the_rate() -> None:
    phase = planned("optimizer.clip_norm=null", "lr.base=1e15")[0]
    training = begun(phase)
    with pytest.raises(Diverged, match=r"phase 1, epoch \d.*lower lr.base"):
        for _ in range(5):
            training.train_epoch()
            training.finish_epoch()


@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize("model", ["standard", "deep_supervision"])
def test_a_batch_in_parts_is_the_same_training_within_rounding(parts: int, model: str) -> None:
    own = f"model={model}"
    whole, in_parts = begun(planned(own)[0]), begun(planned(own, f"phase.accumulate={parts}")[0])
    for training in (whole, in_parts):  # 40 windows: the last batch of 16 is one of 8
        training.train_epoch()
    assert in_parts.steps_per_epoch == whole.steps_per_epoch == 3
    assert in_parts.mean_loss() == pytest.approx(whole.mean_loss(), rel=1e-6)
    for p, q in zip(in_parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_activations_formed_again_give_the_same_bits(norm: str) -> None:
    own = f"model.norm={norm}"
    kept, again = (
        begun(planned(own, f"model.checkpoint_activations={value}")[0])
        for value in ("false", "true")
    )
    calls: list[Training] = []
    for training in (kept, again):
        layer = training.model.layers[0].ffn.w1
        layer.register_forward_hook(lambda *_, own=training: calls.append(own))
        training.train_epoch()
    assert (calls.count(kept), calls.count(again)) == (3, 6)
    for p, q in zip(kept.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)


def _empty(phase: TrainSpec) -> torch.nn.Module:
    from proglayer.training.transformer import Transformer

    return Transformer(phase.layers, phase.architecture)


# ---------------------------------------------------------------------------------------------
# What it costs


@pytest.mark.parametrize("model", ["standard", "deep_supervision"])
@pytest.mark.parametrize("experiment", ["original", "gradual_unfreezing", "control_head_only"])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_the_plan_counts_the_products_of_the_body_that_a_step_forms(
    experiment: str, model: str, norm: str
) -> None:
    network = None
    for phase in planned(f"experiment={experiment}", f"model={model}", f"model.norm={norm}"):
        network = build(phase) if network is None else grow(network, phase)
        training = begun(phase, network)
        rows = torch.arange(phase.batch_size)
        with FlopCounterMode(display=False) as counter:
            training.loss(*training.windows.batch(rows)).backward()
        formed = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
        # Attention is no plain product: forward in every layer, twice that backward.
        seq_len = training.windows.seq_len
        scores = 4 * len(rows) * seq_len * seq_len * phase.architecture.dim
        layers = range(max(e for e, weight in enumerate(phase.exit_weights) if weight) + 1)
        backward = [layer for layer in layers if layer >= min(phase.trained_layers, default=99)]
        if phase.rates.embedding is not None:
            backward = list(layers)
        counted = training_flops(phase, seq_len, len(rows)).body
        assert formed == counted - scores * (len(layers) + 2 * len(backward))


def test_the_schedule_reaches_the_optimizer() -> None:
    phase = planned("lr.schedule=linear", "lr.warmup_steps=2", "phase.max_epochs=2")[0]
    training = begun(phase)
    rates = []
    training.train_epoch(lambda _: rates.append(training.optimizer.param_groups[0]["lr"]))
    assert rates == pytest.approx([0.005, 0.01, 0.01])


@pytest.mark.parametrize("model", [(), ("model.norm=pre",), LLAMA])
def test_a_plan_says_what_layers_keep_for_the_backward_pass(model: tuple[str, ...]) -> None:
    if model is LLAMA:
        pytest.importorskip("transformers")
    kept, said = [], []
    for layers in (2, 4):
        (spec, _) = planned(*model, f"initial_layers={layers}", "model.dim=64")
        training = begun(spec)
        weights = {parameter.data_ptr() for parameter in training.model.parameters()}
        saved: dict[int, int] = {}

        def keep(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = training.model(training.windows.batch(torch.arange(8))[0])
        kept.append(sum(size for place, size in saved.items() if place not in weights))
        said.append(memory(spec, 8, processes=2)["activations"])
        assert hidden
    assert said[1] - said[0] == pytest.approx(kept[1] - kept[0], rel=0.05)
