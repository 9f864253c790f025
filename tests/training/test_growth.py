"""What each growth operator keeps of the model that it grows, in float32, and bit for bit."""

from __future__ import annotations

import functools
import itertools
import re
from dataclasses import asdict, replace

import pytest
import torch

from proglayer.config import ConfigError
from proglayer.training.build import build, grow, restored
from proglayer.training.cost import parameter_counts, training_flops
from proglayer.training.growth import OPERATORS, gate_value, layer_sources
from proglayer.training.model import Model
from proglayer.training.plan import TrainSpec
from proglayer.training.trainer import evaluate, set_gate

from .tiny import CORPUS, CPU, begun, pattern, planned, trained

BOTH_NORMS = pytest.mark.parametrize("norm", ["post", "pre"])


@functools.cache
def trained_once(spec: TrainSpec) -> Model:
    return trained(spec).model


def grown(norm: str, *overrides: str) -> tuple[Model, Model, TrainSpec]:
    """A trained model of 3 layers, what it grew into, and the phase that begins there."""
    first, second, *_ = planned(f"model.norm={norm}", *overrides)
    old = trained_once(first)
    return old, grow(old, second), second


def tokens() -> torch.Tensor:
    return torch.from_numpy(CORPUS.validation[:, :-1].copy()).long()


def logits(model: Model) -> list[torch.Tensor]:
    """At every exit."""
    with torch.no_grad():
        return [model.head(model.read(hidden)) for hidden in model(tokens())]


@BOTH_NORMS
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("growth=random",), "012rrr"),
        (("growth=copy",), "012222"),
        (("growth=copy", "growth.position=interleave"), "001122"),
        (("growth=copy", "growth.position=bottom"), "000012"),
        (("growth=random", "growth.position=interleave"), "0r1r2r"),
        (("growth=random", "growth.position=bottom"), "rrr012"),
        (("growth=stack",), "012012"),
        (("growth=middle",), "011112"),
        (("growth=last",), "012222"),
        (("growth=lidas", "growth.block=2"), "010102"),
        (("growth.layers=[0,1,2,1,null,2]",), "0121r2"),
        (("growth.layers=[2,0]",), "20"),
        (("growth=gate",), "012222"),
        (("growth=zero",), "012rrr"),
    ],
)
def test_where_layers_come_from(norm: str, overrides: tuple[str, ...], expected: str) -> None:
    old, new, phase = grown(norm, "added_layers=3", *overrides)
    assert pattern(old, new) == expected
    assert phase.growth is not None
    new_layers = tuple(i for i, s in enumerate(layer_sources(3, phase.growth)) if s.new)
    assert new_layers == phase.new_layers


def sources(layers: int, *overrides: str) -> list[int | None]:
    """The list that settings give for a model of so many layers."""
    phase = planned(f"initial_layers={layers}", *overrides)[1]
    return [source.layer for source in layer_sources(layers, phase.growth)]


@pytest.mark.parametrize("layers", [3, 4, 6, 8, 12, 32])
def test_lists_are_those_of_the_papers(layers: int) -> None:
    every = list(range(layers))
    twice = sources(layers, "growth=middle", "growth.block=1", "added_layers=2")
    middle = (layers - 1) // 2
    assert twice == [*every[:middle], *[middle] * 3, *every[middle + 1 :]]
    assert sources(layers, "growth=stack", f"added_layers={layers}") == every + every
    for groups in (g for g in range(1, layers + 1) if layers % g == 0):
        # The loop of LLaMA Pro's script: a copy behind the last layer of each group.
        size, expected = layers // groups, list[int]()
        for layer in every:
            expected += [layer, layer] if (layer + 1) % size == 0 else [layer]
        pro = ("growth=zero", "growth.position=groups", f"added_layers={groups}")
        assert sources(layers, *pro) == expected
    for overlap in range(layers // 2):
        added = f"added_layers={layers - 2 * overlap}"
        expected = every[: layers - overlap] + every[overlap:]
        assert sources(layers, "growth=solar", added) == expected
    for block in (b for b in (1, 2, 3, 4) if layers % b == 0):
        blocks = [every[first : first + block] for first in range(0, layers, block)]
        again = (f"growth.block={block}", f"added_layers={block}")
        middle = -(-len(blocks) // 2)
        expected = [*blocks[:middle], blocks[middle - 1], *blocks[middle:]]
        assert sources(layers, "growth=middle", *again) == list(itertools.chain(*expected))
        assert sources(layers, "growth=last", *again) == every + blocks[-1]


@pytest.mark.parametrize(
    "overrides",
    [
        ("growth=solar", "added_layers=2"),
        ("growth=middle", "growth.block=2"),
        ("growth=last", "growth.block=4"),
        ("growth=copy", "growth.position=groups", "added_layers=2"),
        ("growth.layers=[0,3]",),
        ("growth.layers=[]",),
        ("growth=stack", "growth.layers=[0]"),
        ("growth.layers=[0,0]", "phase=one_at_a_time"),
        ("growth.layers=[0,1]", "freeze=new_layers"),
        ("growth.layers=[0,1,2]",),
        ("growth=stack", "growth.share=true"),
        *(
            (*each, "growth.share=true", "freeze=none")
            for each in (
                ("growth=random",),
                ("growth=zero",),
                ("growth=stack", "growth.noise=0.1"),
                ("growth=copy", "model.norm=pre", "model.residual_scale=layernorm"),
            )
        ),
    ],
)
def test_a_list_that_cannot_be_is_refused(overrides: tuple[str, ...]) -> None:
    line = "of 3 layers: take one of 1, 3, or" if "groups" in str(overrides) else "growth|nothing"
    with pytest.raises(ConfigError, match=line):
        planned(*overrides)


@pytest.mark.parametrize(
    "operator",
    [
        ("growth=copy", "growth.position=interleave"),
        ("growth=stack", "growth.noise=0.3"),
        ("growth=middle",),
        ("growth=zero", "growth.position=groups"),
        ("growth=gate", "growth.position=bottom"),
        ("growth=random", "growth.position=interleave"),
    ],
    ids=" ".join,
)
def test_an_operator_is_a_name_for_its_list(operator: tuple[str, ...]) -> None:
    old, named, phase = grown("pre", "added_layers=3", *operator)
    listed = [source.layer for source in layer_sources(3, phase.growth)]
    text = ",".join("null" if layer is None else str(layer) for layer in listed)
    change = "growth=copy" if phase.growth.init in ("stack", "middle") else operator[0]
    how = [each for each in operator[1:] if "interleave" not in each and "groups" not in each]
    given = planned("model.norm=pre", change, *how, f"growth.layers=[{text}]")[1]
    assert given.new_layers == phase.new_layers
    new = grow(old, given)
    assert all(map(torch.equal, named.state_dict().values(), new.state_dict().values()))


@BOTH_NORMS
@pytest.mark.parametrize(
    ("init", "position"),
    [
        *((each, "top") for each in OPERATORS),
        ("copy", "groups"),
        *((init, place) for init in ("random", "copy") for place in ("interleave", "bottom")),
    ],
)
def test_exits_below_the_growth_stay_bit_for_bit(norm: str, init: str, position: str) -> None:
    old, new, phase = grown(norm, f"growth={init}", f"growth.position={position}", "added_layers=3")
    lowest = phase.new_layers[0]
    assert (lowest > 0) is (position != "bottom")
    for before, after in list(zip(logits(old), logits(new), strict=False))[:lowest]:
        assert torch.equal(before, after)
    assert torch.equal(old.embedding.weight, new.embedding.weight)
    assert torch.equal(old.head.weight, new.head.weight)
    pointers = [p.data_ptr() for model in (old, new) for p in model.parameters()]
    assert len(pointers) == len(set(pointers))


@pytest.mark.parametrize("position", ["top", "bottom", "interleave"])
def test_zero_keeps_a_pre_norm_model_exactly(position: str) -> None:
    old, new, _ = grown("pre", "growth=zero", f"growth.position={position}", "added_layers=3")
    assert torch.equal(logits(old)[-1], logits(new)[-1])


def test_zero_on_top_of_a_post_norm_model_keeps_every_most_likely_word() -> None:
    old, new, _ = grown("post", "growth=zero", "added_layers=3")
    before, after = logits(old)[-1], logits(new)[-1]
    assert torch.equal(before.argmax(-1), after.argmax(-1))
    # Each token's logits are scaled by one positive factor, no more.
    factor = (before * after).sum(-1, keepdim=True) / before.square().sum(-1, keepdim=True)
    assert (factor > 0).all()
    torch.testing.assert_close(after, factor * before, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, after)


@BOTH_NORMS
def test_the_first_gradient_of_zero_layers_is_of_what_was_set_to_zero(norm: str) -> None:
    _, new, phase = grown(norm, "growth=zero", "added_layers=2", "freeze=none")
    training = begun(phase, new)
    training.loss(*training.windows.batch(torch.arange(8))).backward()
    moved = {
        name.split(".", 2)[2]
        for name, p in new.named_parameters()
        if name.startswith("layers.4") and p.grad is not None and p.grad.any()
    }
    gains = {"norm1.weight", "norm2.weight"} if norm == "post" else set()
    assert moved == {"attention.o.weight", "ffn.w2.weight"} | gains


@BOTH_NORMS
@pytest.mark.parametrize("position", ["top", "bottom", "interleave"])
def test_a_closed_gate_keeps_the_model_exactly_and_an_open_one_is_no_gate(
    norm: str, position: str
) -> None:
    old, new, phase = grown(norm, "growth=gate", f"growth.position={position}", "added_layers=3")
    set_gate(new, phase, 0, 9)
    assert torch.equal(logits(old)[-1], logits(new)[-1])
    (before,), (after,) = (
        evaluate(model, phase, CORPUS, CPU, [layers - 1])
        for model, layers in ((old, 3), (new, phase.layers))
    )
    assert (before.loss, before.accuracy) == (after.loss, after.accuracy)
    new.gate = torch.ones(())
    opened = logits(new)
    set_gate(new, phase, 100, 9)
    assert new.gate is None
    assert all(map(torch.equal, opened, logits(new)))


def test_a_gate_opens_by_equal_parts_over_its_steps() -> None:
    growth = planned("growth=gate", "growth.gate_steps=4")[1].growth
    assert [gate_value(growth, step, 9) for step in range(6)] == [0, 0.25, 0.5, 0.75, None, None]
    # At the latest at the end of the first epoch.
    assert [gate_value(growth, step, 2) for step in range(4)] == [0, 0.5, None, None]
    assert gate_value(planned("growth=copy")[1].growth, 0, 9) is None


@BOTH_NORMS
def test_a_gate_is_gone_when_its_epoch_ends(norm: str) -> None:
    """And while it opens, the model that trains is not the one without it."""
    _, new, phase = grown(norm, "growth=gate", "growth.gate_steps=2")
    gates = []
    training = begun(phase, new)
    training.train_epoch(lambda _: gates.append(None if new.gate is None else float(new.gate)))
    assert gates == [0.0, 0.5, None]
    assert new.gate is None
    assert new.state_dict().keys() == build(replace(phase, growth=None)).state_dict().keys()


@BOTH_NORMS
@pytest.mark.parametrize("init", ["stack", "copy", "middle", "zero", "gate"])
def test_noise_of_a_share_of_the_tensors_own_scale(norm: str, init: str) -> None:
    size = ("added_layers=3", "model.dim=64")
    _, plain, phase = grown(norm, f"growth={init}", *size)
    _, noisy, _ = grown(norm, f"growth={init}", "growth.noise=0.2", *size)
    _, again, _ = grown(norm, f"growth={init}", "growth.noise=0.2", *size)
    for name, tensor in plain.named_parameters():
        other = noisy.get_parameter(name)
        assert torch.equal(other, again.get_parameter(name))
        number = int(name.split(".")[1]) if name.startswith("layers") else -1
        if number not in phase.new_layers or "norm" in name or not tensor.any():
            assert torch.equal(tensor, other), name
        else:
            noise = other - 0.8 * tensor
            assert (noise.norm() / tensor.norm()).item() == pytest.approx(0.2, rel=0.05), name
            assert abs(torch.corrcoef(torch.stack([noise.flatten(), tensor.flatten()]))[0, 1]) < 0.1


@BOTH_NORMS
def test_noise_draws_from_a_stream_of_its_own(norm: str) -> None:
    """Each new layer another noise."""
    _, noisy, _ = grown(norm, "growth=copy", "growth.noise=1", "added_layers=2")
    a, b = (noisy.layers[i].attention.q.weight for i in (3, 4))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("position", ["top", "interleave"])
@pytest.mark.parametrize("init", ["zero", "gate"])
def test_what_was_zero_or_behind_a_gate_trains(init: str, position: str) -> None:
    _, new, phase = grown(
        "pre", f"growth={init}", f"growth.position={position}", "growth.gate_steps=2"
    )
    before = {name: p.detach().clone() for name, p in new.named_parameters()}
    trained(phase, new, epochs=2)
    moved = {name for name, p in new.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in new.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("overrides", "patterns"),
    [
        (("phase=one_at_a_time", "added_layers=2"), ("0120", "01201")),
        # 3 to 6 to 12 (Gong et al. 2019).
        (("added_layers=[3,6]",), ("012012", "012012012012")),
    ],
)
def test_growths_in_a_row_grow_what_the_last_one_left(
    overrides: tuple[str, ...], patterns: tuple[str, ...]
) -> None:
    phases = planned("growth=stack", *overrides)
    model = first = build(phases[0])
    for phase, expected in zip(phases[1:], patterns, strict=True):
        model = grow(model, phase)
        assert pattern(first, model) == expected
    (whole,) = planned("growth=stack", *overrides[-1:], "phase=from_scratch")
    assert whole.layers == phases[-1].layers


def test_each_growth_has_settings_of_its_own() -> None:
    own = (
        "growths=[{added_layers: 2, growth: {init: copy}, lr: {base: 0.5}},"
        "{growth: {init: zero, position: bottom}, phase: {grown: {batch_size: 3}}}]"
    )
    first, second, third = planned(own, "freeze=none")
    assert [phase.layers for phase in (first, second, third)] == [3, 5, 6]
    assert (second.growth.init, third.growth.init) == ("copy", "zero")
    assert (first.rates.new, second.rates.new) == (third.rates.new * 10, 0.05)
    assert (second.batch_size, third.batch_size) == (first.batch_size, 3)
    for bad, line in {
        "[{seed: 3}]": "growths[0].seed is one for all growths",
        "[{}, {growth: {init: foo}}]": "growths[1].growth.init=foo",
        "[{growth: {init: stack, position: bottom}}]": "growth.position=bottom does not go with",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(line)):
            planned(f"growths={bad}")


# ---------------------------------------------------------------------------------------------
# Pre-norm


def test_an_exit_of_a_pre_norm_model_is_read_through_the_final_norm() -> None:
    model = build(planned("model.norm=pre")[0])
    with torch.no_grad():
        model.norm.weight.copy_(torch.linspace(0.5, 2, 8))
    hidden = model(tokens())[1]
    expected = torch.nn.functional.rms_norm(hidden, (8,), model.norm.weight, 1e-6)
    assert torch.equal(model.read(hidden), expected)
    post = build(planned()[0])
    assert post.read(hidden) is hidden


def test_a_layer_is_pre_norm_where_that_is_asked_for() -> None:
    from proglayer.training.transformer import rotary_tables

    layer = build(planned("model.norm=pre")[0]).layers[0]
    x = torch.randn(2, 5, 8)
    cos, sin = rotary_tables(5, 4, 10_000.0, CPU)
    y = x + layer.attention(layer.norm1(x), cos, sin)
    assert torch.equal(layer(x, cos, sin), y + layer.ffn(layer.norm2(y)))


@pytest.mark.parametrize("scale", ["depth", "layernorm", "layerscale"])
def test_branches_are_scaled_by_depth(scale: str) -> None:
    from proglayer.training.transformer import rotary_tables

    first, second = planned("model.norm=pre", f"model.residual_scale={scale}", "freeze=none")
    model = build(first)
    assert parameter_counts(first).total == sum(p.numel() for p in model.parameters())
    layer, x = model.layers[2], torch.randn(2, 5, 8)
    cos, sin = rotary_tables(5, 4, 10_000.0, CPU)
    inner = 3**-0.5 if scale == "layernorm" else 1
    outer = {"depth": 6**-0.5, "layernorm": 1.0, "layerscale": 0.1}[scale]
    y = x + outer * layer.attention(inner * layer.norm1(x), cos, sin)
    torch.testing.assert_close(layer(x, cos, sin), y + outer * layer.ffn(inner * layer.norm2(y)))
    training = trained(second, grow(model, second))
    assert all(p.grad is not None for p in training.model.parameters())
    state = training.model.state_dict()
    again = restored(4, asdict(second.architecture), state)
    assert torch.equal(again.logits(tokens()), training.model.logits(tokens()))
    with pytest.raises(ConfigError, match="take model.norm=pre"):
        planned(f"model.residual_scale={scale}")


def test_the_final_norm_trains_and_is_frozen_with_the_head() -> None:
    initial, grown_phase = planned(
        "model.norm=pre", "freeze.steps=[{existing: 0, embedding: false, head: false}]"
    )
    model = trained(initial).model
    assert not torch.equal(model.norm.weight, torch.ones(8))
    new = grow(model, grown_phase)
    training = begun(grown_phase, new)
    training.train_epoch()
    assert torch.equal(new.norm.weight, model.norm.weight)
    assert torch.equal(new.head.weight, model.head.weight)


@BOTH_NORMS
def test_layers_that_share_train_as_one_whose_gradient_is_the_sum(norm: str) -> None:
    overrides = ("growth=stack", "added_layers=3", "freeze=none", "optimizer.carry=existing")
    _, apart, _ = grown(norm, *overrides)
    _, model, spec = grown(norm, *overrides, "growth.share=true")
    assert spec.architecture.ties == (0, 1, 2, 0, 1, 2)
    for ours, plain in zip(logits(model), logits(apart), strict=True):
        assert torch.equal(ours, plain)
    counts = parameter_counts(spec)
    assert counts == (sum(p.numel() for p in model.parameters()),) * 2
    assert training_flops(spec, 8, 40) == training_flops(planned(*overrides)[1], 8, 40)
    training, other = begun(spec, model), begun(spec, apart)
    for each in (training, other):
        each.backward(torch.arange(8), spec.exit_weights)
    for name, p in model.named_parameters():
        expected = apart.get_parameter(name).grad
        if name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            expected = expected + apart.get_parameter(f"layers.{int(number) + 3}.{rest}").grad
        torch.testing.assert_close(p.grad, expected, msg=name)
    # One that shares stays so in a later growth; a copy of it has tensors of its own.
    growths = "growths=[{growth: {share: true}}, {added_layers: 1, growth: {init: copy}}]"
    deeper = planned(*overrides[:1], "freeze=none", growths)[-1]
    assert deeper.architecture.ties == (0, 1, 2, 0, 4)
    grown_again = grow(
        grow(build(planned()[0]), planned("growth=stack", "freeze=none", "growth.share=true")[1]),
        deeper,
    )
    assert pattern(grown_again, grown_again)[-1] == "0"
    freed = restored(5, asdict(deeper.architecture), grown_again.state_dict())
    assert torch.equal(freed.logits(tokens()), grown_again.logits(tokens()))
