"""The transformer and its growth."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

from proglayer.training.build import build, restored
from proglayer.training.cost import parameter_counts
from proglayer.training.plan import plan
from proglayer.training.transformer import Transformer, rotary_tables

from ..helpers import config, experiments
from .tiny import planned


def tokens(windows: int = 3, length: int = 8, vocab_size: int = 30) -> torch.Tensor:
    return torch.randint(vocab_size, (windows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("experiment", experiments())
def test_the_counted_parameters_are_the_models(experiment: str, norm: str) -> None:
    from proglayer.training.optim import set_trainable

    for planned_phase in plan(config(f"experiment={experiment}", f"model.norm={norm}"), 100):
        phase = planned_phase.train
        with torch.device("meta"):
            model = Transformer(phase.layers, phase.architecture)
        trainable = set_trainable(model, phase)
        counts = parameter_counts(phase)
        assert sum(p.numel() for p in model.parameters()) == counts.total
        assert sum(p.numel() for p in trainable.values()) == counts.trainable


def test_a_model_of_stored_tensors_is_those_tensors_and_draws_nothing() -> None:
    phase = planned()[0]
    stored = build(phase).state_dict()
    before = torch.get_rng_state()
    model = restored(phase.layers, asdict(phase.architecture), stored)
    assert torch.equal(torch.get_rng_state(), before)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == {
        name: tensor.data_ptr() for name, tensor in stored.items()
    }
    with pytest.raises(RuntimeError, match="layers.3"):
        restored(4, asdict(phase.architecture), stored)


def test_a_word_is_never_predicted_from_what_follows_it() -> None:
    model = build(planned()[0])
    before = tokens()
    after = before.clone()
    after[:, 5:] = (after[:, 5:] + 1) % 30
    for old, new in zip(model(before), model(after), strict=True):
        assert torch.equal(old[:, :5], new[:, :5])
        assert not torch.equal(old[:, 5:], new[:, 5:])


def test_attention_is_the_textbook_one() -> None:
    """Scaled dot products under a causal mask, rotated queries and keys, in the plainest form."""
    model = build(planned()[0]).double()
    attention = model.layers[0].attention
    x = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cos, sin = (t.double() for t in rotary_tables(5, 4, 10_000.0, x.device))
    out = torch.zeros_like(x)
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        q = (x @ attention.q.weight.T)[..., part]
        k = (x @ attention.k.weight.T)[..., part]
        v = (x @ attention.v.weight.T)[..., part]
        turned_q, turned_k = torch.zeros_like(q), torch.zeros_like(k)
        for t in range(5):
            for i in range(2):
                angle = torch.tensor(t * 10_000.0 ** (-2 * i / 4), dtype=torch.float64)
                c, s = angle.cos(), angle.sin()
                for turned, y in ((turned_q, q), (turned_k, k)):
                    turned[:, t, i] = y[:, t, i] * c - y[:, t, i + 2] * s
                    turned[:, t, i + 2] = y[:, t, i + 2] * c + y[:, t, i] * s
        scores = turned_q @ turned_k.transpose(1, 2) * 4**-0.5
        mask = torch.ones(5, 5).tril().bool()
        out[..., part] = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
    expected = out @ attention.o.weight.T
    # The tables are float32, as in training: hence the tolerance.
    torch.testing.assert_close(attention(x, cos, sin), expected, rtol=1e-5, atol=1e-6)


def test_a_layer_is_post_norm() -> None:
    model = build(planned()[0])
    layer = model.layers[0]
    x = torch.randn(2, 5, 8)
    cos, sin = rotary_tables(5, 4, 10_000.0, x.device)
    y = F.rms_norm(x + layer.attention(x, cos, sin), (8,), layer.norm1.weight, 1e-6)
    gated = layer.ffn.w2(F.silu(layer.ffn.w1(y)) * layer.ffn.w3(y))
    torch.testing.assert_close(
        layer(x, cos, sin), F.rms_norm(y + gated, (8,), layer.norm2.weight, 1e-6)
    )


def test_models_of_different_depth_share_what_they_have_in_common() -> None:
    shallow = build(planned("phase=from_scratch", "added_layers=0")[0]).state_dict()
    deep = build(planned("phase=from_scratch", "added_layers=2")[0]).state_dict()
    assert all(torch.equal(shallow[name], deep[name]) for name in shallow)
    assert not torch.equal(deep["layers.3.attention.q.weight"], deep["layers.4.attention.q.weight"])
