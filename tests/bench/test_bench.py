"""The bench: its floor does all the work that it claims, and its parts are the trainer's step."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from proglayer.bench import bench
from proglayer.bench.__main__ import outside_bounds, study_jobs
from proglayer.bench.bound import Blocking, BodyProducts, HeadProducts, Need, blockings, step_needs
from proglayer.bench.estimate import distinct_phases, estimate
from proglayer.bench.measure import (
    PARTS,
    Case,
    DenseTraining,
    in_chunks,
    made_up_corpus,
    new_training,
    train,
    train_by_part,
)
from proglayer.bench.overhead import ALONE, measure_sweep
from proglayer.config import ConfigError
from proglayer.training.loss import _Block, _Rows
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
def test_the_floor_of_the_head_has_the_products_that_the_plan_counts(
    overrides: tuple[str, ...],
) -> None:
    for phase in planned(*overrides):
        needs = step_needs(phase, SEQ_LEN)
        products = sum(need.rows * (1 + need.to_hidden + need.to_head) for need in needs)
        counted = training_flops(phase, SEQ_LEN, phase.batch_size).head
        assert counted == 2 * products * phase.architecture.vocab_size * phase.architecture.dim


@pytest.mark.parametrize("words_first", [True, False])
@pytest.mark.parametrize(("rows", "words", "parts"), [(16, 64, 2), (7, 33, 1), (64, 101, 1)])
def test_the_floor_multiplies_what_it_says(
    words_first: bool, rows: int, words: int, parts: int
) -> None:
    torch.manual_seed(0)
    head_vd = torch.randn(101, 6)
    needs = [Need(20, True, True), Need(20, False, True), Need(20, True, True)]
    products = HeadProducts(needs, head_vd, Blocking(rows, words, words_first, parts))
    for _ in range(2):  # the second time over what the first left
        products()
    assert [need.rows for need in products.groups] == [40, 20]
    whole = torch.zeros_like(head_vd)
    for need, hidden_md, grad_md in zip(
        products.groups, products.hidden, products.hidden_grads, strict=True
    ):
        logits = hidden_md @ head_vd.t()
        whole += logits.t() @ hidden_md
        if need.to_hidden:
            torch.testing.assert_close(grad_md, logits @ head_vd)
    torch.testing.assert_close(products.head_grad_vd, whole)


def test_the_rules_chunks_are_those_that_training_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks_of_a_chunk = _Rows.blocks
    used: set[str] = set()

    def blocks(self: _Rows, rows: int, keep: bool) -> list[_Block]:
        found = blocks_of_a_chunk(self, rows, keep)
        used.add(f"{found[0].last} x {rows}")
        return found

    monkeypatch.setattr(_Rows, "blocks", blocks)
    for phase in planned("model=deep_supervision"):
        training = new_training(Training, phase, SEQ_LEN, 1, CPU)
        used.clear()
        train(training)
        rule, *_ = tasks = in_chunks(training)
        assert rule in used
        gradients = []
        for loss in tasks.values():
            loss()
            gradients.append(training.model.head.weight.grad)
        assert len(gradients) > 1
        for gradient in gradients[1:]:
            torch.testing.assert_close(gradient, gradients[0])


def test_every_blocking_fits_the_vocabulary() -> None:
    for vocab, threads in itertools.product((50, 8192, 69830), (1, 3)):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            assert all(0 < cut.words <= vocab for cut in blockings(CPU, vocab, 4))
        finally:
            torch.set_num_threads(before)


def test_the_floor_of_the_body_is_three_products_a_matrix_where_all_trains() -> None:
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
def test_a_step_by_part_is_the_trainers_step_bit_for_bit(model: str) -> None:
    for phase in planned(f"model={model}", "lr.warmup_steps=3"):
        whole, parted = (new_training(Training, phase, SEQ_LEN, 1, CPU) for _ in range(2))
        # The trainer shuffles the windows; a batch of all of them in their order is the same sum
        # only up to rounding, so both are given the order 0, 1, 2, ...
        batch = whole.windows.batch
        whole.windows.batch = lambda rows, b=batch: b(rows.sort().values)  # type: ignore[method-assign]
        for _ in range(2):
            train(whole)
            seconds = train_by_part(parted)
            parted.epoch += 1
        assert tuple(seconds) == PARTS
        for a, b in zip(whole.trainable, parted.trainable, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("model", ["standard", "deep_supervision"])
def test_the_dense_twin_is_the_same_training(model: str) -> None:
    for phase in planned(f"model={model}"):
        ours = new_training(Training, phase, SEQ_LEN, 2, CPU)
        dense = new_training(DenseTraining, phase, SEQ_LEN, 2, CPU)
        for training in (ours, dense):
            training.train_epoch()
        assert ours.finish_epoch()[0] == pytest.approx(dense.finish_epoch()[0], rel=1e-6)
        for a, b in zip(ours.trainable, dense.trainable, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_the_made_up_corpus_follows_zipf() -> None:
    corpus = made_up_corpus(1000, 32, 300, 10)
    assert corpus.train.shape == (300, 33)
    assert corpus.validation.shape == (10, 33)
    assert corpus.train.min() >= 0
    assert corpus.train.max() < 1000
    counts = torch.bincount(torch.from_numpy(corpus.train.ravel()), minlength=1000).double()
    # Rank r has the weight 1 / (r + 2.7): the first ten ranks against the next ninety.
    weights = 1 / (torch.arange(1, 1001) + 2.7)
    expected = float(weights[:10].sum() / weights[10:100].sum())
    assert float(counts[:10].sum() / counts[10:100].sum()) == pytest.approx(expected, rel=0.1)


def test_a_study_counts_shared_phases_once(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{i * i % 50}" for i in range(3000)))
    jobs = study_jobs(
        [*TINY, "data=text", f"data.files=[{text}]", "data.samples=40", "seed=1,2",
         "added_layers=1,2", "phase.max_epochs=2"]
    )  # fmt: skip
    assert len(jobs) == 4
    # Of each seed one initial phase and two grown ones.
    assert len(distinct_phases(jobs)) == 6
    shapes = estimate(jobs, 5, CPU)
    assert sorted((shape.phases, shape.epochs) for shape in shapes) == [(2, 2)] * 3
    for shape in shapes:
        assert shape.steps == 3
        assert shape.seconds > 2 * 2 * 3 * shape.step


def test_the_short_form_measures_everything_and_judges_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # At this size a step is all overhead; only what is measured is looked at here.
    for bound in ("STEP_TO_FLOOR", "TO_BEST", "EVALUATION_TO_PRODUCT", "MEMORY_TO_DENSE"):
        monkeypatch.setattr(bench, f"MOST_{bound}", 1e9)
    monkeypatch.setattr(bench, "LEAST_DENSE_TO_STEP", 0.0)
    monkeypatch.setattr(bench, "SHORT", replace(bench.SHORT, repeats=1, windows=20, evaluations=1))
    kept = tmp_path / "figures.json"
    arguments = ["--short", "--json", str(kept), *TINY_SHAPE, "model=deep_supervision"]
    assert bench.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "step / floor" in printed
    figures = json.loads(kept.read_text())
    assert [case["phase"] for case in figures["cases"]] == ["initial", "grown"]
    grown = figures["cases"][1]
    assert set(grown["memory_mb"]) == {"ours", "dense"}
    assert all(mb > 50 for mb in grown["memory_mb"].values())
    assert {len(taken) for taken in grown["parts"].values()} == {1}
    assert len(grown["chunks"]) > 1
    assert grown["step_to_floor"] == pytest.approx(
        grown["step"][0] / (grown["head"][0] + grown["body"][0])
    )

    monkeypatch.setattr(bench, "MOST_STEP_TO_FLOOR", 1e-9)
    assert bench.main([*arguments, "--no-memory"]) == 1
    assert "a step takes" in capsys.readouterr().err


def test_the_bounds_look_at_each_ratio() -> None:
    good = Case(
        model="standard", phase="initial", layers=3, exits=1, square=[1.0], square_flops=1,
        head=[0.9], head_flops=1, body=[0.1], blocking="", step=[1.2], dense=[4.0], parts={},
        chunks={"rule": [1.0], "other": [0.9]},
        evaluation=[1.1], product=[1.0], product_blocking="", windows=1,
        memory_mb={"ours": 1.0, "dense": 4.0},
    )  # fmt: skip
    assert outside_bounds([good]) == []
    for change in (
        {"step": [9.0], "dense": [40.0]},
        {"dense": [1.0]},
        {"chunks": {"rule": [1.0], "other": [0.1]}},
        {"evaluation": [9.0]},
        {"memory_mb": {"ours": 3.0, "dense": 2.0}},
    ):
        assert len(outside_bounds([good, replace(good, **change)])) == 1


def test_a_misspelt_setting_is_told_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(["model.dims=8"])
    assert ended.value.code == 1
    assert "did you mean model.dim?" in capsys.readouterr().err


@pytest.mark.slow
def test_what_a_sweep_costs_is_told_for_each_command(tmp_path: Path) -> None:
    spent, left = measure_sweep(4, tmp_path, ["data.samples=32"])
    assert [row.command for row in spent] == list(ALONE)
    assert all(0 < row.cpu_seconds < 100 and 50 < row.peak_mb < 5000 for row in spent)
    assert left.files == sum(path.is_file() for path in (tmp_path / "first").rglob("*"))
    # Four experiments share their initial phase.
    assert len(list((tmp_path / "stages").glob("*/stage.*.json"))) == left.locks == 5
    more = [replace(row, jobs=8, seconds=row.seconds + 1) for row in spent]
    rows = list(bench.spent_table([*spent, *more]).columns[4].cells)
    assert rows == ["", "250"] * len(spent)
    with pytest.raises(ConfigError, match="--sweep: the sweep: error: there is no setting modle"):
        measure_sweep(4, tmp_path, ["modle.dim=8"])
