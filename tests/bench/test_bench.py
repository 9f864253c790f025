"""The bench: its matmul bound does all the work that it claims; its twin is the same training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from proglayer.bench import __main__ as command
from proglayer.bench.bound import (
    Blocking,
    BodyProducts,
    HeadProducts,
    Products,
    blockings,
    step_products,
)
from proglayer.bench.harness import (
    PARTS,
    DenseTraining,
    Measurement,
    new_training,
    parts_of_a_step,
    synthetic_corpus,
)
from proglayer.training.plan import Phase, plan, training_flops
from proglayer.training.trainer import Training

from ..helpers import TINY, config

CPU = torch.device("cpu")
SEQ_LEN = 8
TINY_SHAPE = (*TINY, "model.vocab_size=300", f"data.seq_len={SEQ_LEN}")


def planned(*overrides: str) -> tuple[Phase, ...]:
    return plan(config(*TINY_SHAPE, *overrides), 300)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model=deep_supervision",),
        ("model=deep_supervision", "freeze=gradual"),
        ("model=deep_supervision", "growth.position=bottom"),
        ("model.exit_weights=[0,1,2,1]", "freeze.steps=[{existing:0,embedding:false,head:false}]"),
        ("phase=keep_training", "freeze.steps=[{existing:1,embedding:false,head:true}]"),
    ],
    ids=" ".join,
)
def test_the_bound_of_the_head_has_the_products_that_the_plan_counts(
    overrides: tuple[str, ...],
) -> None:
    for phase in planned(*overrides):
        needs = step_products(phase, SEQ_LEN)
        products = sum(need.rows * (1 + need.to_hidden + need.to_head) for need in needs)
        counted = training_flops(phase, SEQ_LEN, phase.batch_size).head
        assert counted == 2 * products * phase.architecture.vocab_size * phase.architecture.dim


@pytest.mark.parametrize(("rows", "entries", "parts"), [(16, 64, 2), (7, 33, 1), (64, 101, 1)])
def test_the_bound_multiplies_what_it_says(rows: int, entries: int, parts: int) -> None:
    torch.manual_seed(0)
    head_vd = torch.randn(101, 6)
    needs = [Products(20, True, True), Products(20, False, True), Products(20, True, True)]
    products = HeadProducts(needs, head_vd, Blocking(rows, entries, parts))
    for _ in range(2):  # the second time over what the first left
        products()
    whole = torch.zeros_like(head_vd)
    exits = zip(needs, products.hidden, products.hidden_grads, strict=True)
    for need, hidden_md, grad_md in exits:
        logits = hidden_md @ head_vd.t()
        whole += logits.t() @ hidden_md
        if need.to_hidden:
            torch.testing.assert_close(grad_md, logits @ head_vd)
    torch.testing.assert_close(products.head_grad_vd, whole)


@pytest.mark.parametrize("vocab", [50, 8192, 69830])
def test_every_blocking_fits_the_vocabulary(vocab: int) -> None:
    assert all(0 < cut.entries <= vocab for cut in blockings(CPU, vocab, 4))


def test_the_bound_of_the_body_is_three_products_a_matrix_where_all_trains() -> None:
    initial, grown = planned()
    for phase in (initial, grown):
        products = BodyProducts(phase, SEQ_LEN, torch.float32, CPU)
        products()
        flops = sum(2 * left.numel() * right.shape[2] for left, right, _ in products.products)
        shape = phase.architecture
        tokens, squares = phase.batch_size * SEQ_LEN, shape.dim**2
        scores = 4 * tokens * SEQ_LEN * shape.dim
        layer = 2 * tokens * (4 + 3 * shape.ffn_multiple) * squares
        if phase is initial:
            assert flops == 3 * phase.layers * (layer + scores)
        else:
            # Frozen layers only run forward; in the new one nothing below its input trains.
            no_input = 2 * tokens * 3 * squares
            assert flops == phase.layers * (layer + scores) + 2 * (layer + scores) - no_input


@pytest.mark.parametrize("model", ["standard", "deep_supervision"])
def test_the_dense_twin_is_the_same_training(model: str) -> None:
    for phase in planned(f"model={model}"):
        ours, dense = (
            new_training(kind, phase, SEQ_LEN, 2, CPU) for kind in (Training, DenseTraining)
        )
        for training in (ours, dense):
            training.train_epoch()
        assert ours.finish_epoch()[0] == pytest.approx(dense.finish_epoch()[0], rel=1e-6)
        for a, b in zip(ours.trainable, dense.trainable, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_the_trainer_marks_every_part_of_a_step() -> None:
    for phase in planned("optimizer.clip_norm=1"):
        parts = parts_of_a_step(new_training(Training, phase, SEQ_LEN, 1, CPU))
        assert set(parts) == set(PARTS)
        assert min(parts.values()) > 0


def test_the_synthetic_corpus_follows_zipf() -> None:
    corpus = synthetic_corpus(1000, 32, 300)
    assert corpus.train.shape == corpus.validation.shape == (300, 33)
    assert corpus.train.min() >= 0
    assert corpus.train.max() < 1000
    counts = torch.bincount(torch.from_numpy(corpus.train.ravel()), minlength=1000).double()
    # Rank r has the weight 1 / (r + 2.7): the first ten ranks against the next ninety.
    weights = 1 / (torch.arange(1, 1001) + 2.7)
    expected = float(weights[:10].sum() / weights[10:100].sum())
    assert float(counts[:10].sum() / counts[10:100].sum()) == pytest.approx(expected, rel=0.1)


def test_the_short_form_measures_everything_and_judges_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # At this size a step is all overhead; only what is measured is looked at here.
    for name, value in {"REPEATS_SHORT": 1, "WINDOWS_SHORT": 20, "BOUNDS": ()}.items():
        monkeypatch.setattr(command, name, value)
    kept = tmp_path / "figures.json"
    arguments = ["--short", "--json", str(kept), *TINY_SHAPE, "model=deep_supervision"]
    assert command.main([*arguments, "precision=float32,bfloat16"]) == 0
    assert "step to bound" in capsys.readouterr().out
    measured = json.loads(kept.read_text())["measured"]
    assert [(row["phase"], row["precision"]) for row in measured] == [
        (phase, precision)
        for phase in ("initial", "grown")
        for precision in ("float32", "bfloat16")
    ]
    for row in measured:
        assert row["memory_mb"] > 50
        assert row["dense_memory_mb"] > 50
        assert {len(seconds) for seconds in row["seconds"].values()} == {1}
        assert set(row["parts"]) == set(PARTS)


def test_the_bounds_look_at_each_ratio() -> None:
    def measurement(**changes: float) -> Measurement:
        seconds = {"step": 1.2, "head": 0.9, "body": 0.1, "dense": 4.0}
        seconds |= {"evaluation": 1.1, "logits": 1.0}
        memory = {"memory_mb": 1.0, "dense_memory_mb": 4.0}
        memory |= {name: value for name, value in changes.items() if name in memory}
        times = {n: [changes.get(n, value)] for n, value in seconds.items()}
        return Measurement("standard", "initial", "float32", "", 1, 100.0, times, {}, **memory)

    assert command.outside_bounds([measurement()]) == []
    for changes in (
        {"step": 9.0, "dense": 40.0},
        {"dense": 1.0},
        {"evaluation": 9.0},
        {"memory_mb": 3.9},
    ):
        assert len(command.outside_bounds([measurement(), measurement(**changes)])) == 1


def test_a_misspelt_setting_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["model.dims=8"]) == 1
    assert "did you mean model.dim?" in capsys.readouterr().err
