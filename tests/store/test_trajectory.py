"""Stored trajectories: reused, resumed, continued or damaged, the bits stay the same."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from proglayer.errors import StoreError
from proglayer.store.entries import Machine
from proglayer.store.trajectory import Hooks, Interrupted, Trajectory, describe
from proglayer.training.build import build, grow, restored
from proglayer.training.model import Model
from proglayer.training.optim import carried_tensors
from proglayer.training.plan import Phase, plan
from proglayer.training.stopping import EpochMetrics, Stopped, StoppingRule, follow
from proglayer.training.trainer import evaluate

from ..helpers import TINY, config, tiny_corpus

CORPUS = tiny_corpus()
HERE = Machine("cpu", "a processor", torch.get_num_threads(), torch.__version__)


def planned(*overrides: str) -> Phase:
    return plan(config(*TINY, *overrides), CORPUS.vocab_size)[0]


class StopAt:
    """Asks to stop at the n-th look, as a signal would."""

    def __init__(self, look: int | None) -> None:
        self.left = look

    def __call__(self) -> str | None:
        if self.left is None:
            return None
        self.left -= 1
        return "SIGTERM" if self.left < 0 else None


def trajectory(
    store: Path,
    phase: Phase,
    stop_at: int | None = None,
    checkpoint_every_s: float = 1e9,
    start: Callable[[], Model] | None = None,
    **others: Any,
) -> Trajectory:
    hooks = Hooks(StopAt(stop_at), lambda progress: None, lambda text: None)
    start = start or (lambda: build(phase.train))
    return Trajectory(
        store, None, start, phase, CORPUS, torch.device("cpu"), HERE, checkpoint_every_s, hooks,
        **others,
    )  # fmt: skip


Followed = tuple[Stopped, dict[str, torch.Tensor], Trajectory]


def followed(store: Path, phase: Phase, **settings: Any) -> Followed:
    with trajectory(store, phase, **settings) as steps:  # type: ignore[arg-type]
        stopped = follow(phase.stop, steps.epochs())
        exits = steps.finish(stopped.best.epoch)
        assert [e.exit for e in exits] == list(range(phase.train.layers))
        return stopped, steps.weights(stopped.best.epoch), steps


def without_times(epochs: tuple[EpochMetrics, ...]) -> list[EpochMetrics]:
    return [replace(epoch, train_seconds=0, evaluation_seconds=0) for epoch in epochs]


def assert_same(one: Followed, two: Followed) -> None:
    assert without_times(one[0].epochs) == without_times(two[0].epochs)
    assert one[0].best.epoch == two[0].best.epoch
    assert one[1].keys() == two[1].keys()
    assert all(torch.equal(one[1][name], two[1][name]) for name in one[1])


def files(store: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_a_second_reader_trains_nothing_and_changes_no_file(tmp_path: Path) -> None:
    first = followed(tmp_path, planned())
    before = files(tmp_path)
    second = followed(tmp_path, planned())
    assert_same(first, second)
    assert len(first[2].trained) == 3
    assert not second[2].trained
    assert files(tmp_path) == before


def grown_phase(*overrides: str) -> tuple[Phase, Phase, Callable[[], Model]]:
    first, second = plan(config(*TINY, "phase.max_epochs=2", *overrides), CORPUS.vocab_size)
    return first, second, lambda: grow(build(first.train), second.train)


@pytest.mark.parametrize(
    ("number", "every", "overrides"),
    [
        (0, 1, ("model=standard",)),
        (0, 3, ("model=deep_supervision",)),
        # With where a gate, a curriculum and kept states of frozen layers stood.
        (1, 3, ("growth=gate", "growth.gate_steps=3")),
        (1, 3, ("model=deep_supervision", "loss.curriculum=rotate")),
        (1, 3, ("model=deep_supervision", "loss.curriculum=gradual", "loss.gradual_steps=5")),
        (1, 3, ("model=deep_supervision", "cache_frozen=true")),
        (1, 3, ("growth=stack", "growth.share=true", "freeze=none")),
    ],
)
def test_stopped_anywhere_and_resumed_is_the_uninterrupted_phase(
    tmp_path: Path, number: int, every: int, overrides: tuple[str, ...]
) -> None:
    first, second, grown = grown_phase(*overrides)
    phase, start = (second, grown) if number else (first, None)
    whole = followed(tmp_path / "whole", phase, start=start)
    assert not any("gate" in name for name in whole[1])
    # 2 epochs of 3 steps and 3 evaluation batches each, then the exits' evaluation.
    for look in range(0, 14, every):
        steps = trajectory(tmp_path / str(look), phase, stop_at=look, start=start)
        with steps, pytest.raises(Interrupted):
            stopped = follow(phase.stop, steps.epochs())
            steps.finish(stopped.best.epoch)
        again = followed(tmp_path / str(look), phase, start=start)
        assert_same(whole, again)
        if number:
            shares = again[2].gradient_shares() or []
            assert shares == whole[2].gradient_shares()
            assert len(shares) == 3
            assert all(0 <= share <= 1 for share in shares)


def test_the_exits_right_after_a_growth_are_those_of_the_model_it_starts_with(
    tmp_path: Path,
) -> None:
    _, second, start = grown_phase("growth=gate", "growth.gate_steps=2")
    with trajectory(tmp_path, second, start=start) as steps:
        before = steps.start_exits()
    model = build(grown_phase()[0].train)
    expected = evaluate(model, second.train, CORPUS, torch.device("cpu"), range(3))
    assert [exit.loss for exit in before] == [exit.loss for exit in (*expected, expected[-1])]
    with trajectory(tmp_path, second, start=lambda: pytest.fail("stored")) as steps:
        assert steps.start_exits() == before


def test_what_the_optimizer_carries_resumes_bit_for_bit(tmp_path: Path) -> None:
    first, second, _ = grown_phase("growth=stack", "freeze=none", "optimizer.carry=copy")
    parent = trajectory(tmp_path / "parent", first, keep_optimizer=True)
    with parent:
        selected = follow(first.stop, parent.epochs()).best.epoch
        parent.finish(selected)
        weights, kept = parent.weights(selected), parent.optimizer_state(selected)
    # Where it was not stored it is trained again.
    with trajectory(tmp_path / "bare", first) as bare:
        follow(first.stop, bare.epochs())
        again = bare.optimizer_state(selected)
    assert kept.keys() == again.keys()
    assert all(torch.equal(kept[name], again[name]) for name in kept)

    def start() -> Model:
        old = restored(first.train.layers, asdict(first.train.architecture), weights)
        return grow(old, second.train)

    settings = {"start": start, "carried": lambda: carried_tensors(kept, second.train, 3)}
    whole = followed(tmp_path / "whole", second, **settings)
    afresh = followed(tmp_path / "afresh", second, start=start)
    assert whole[0].epochs[0].train_loss != afresh[0].epochs[0].train_loss
    steps = trajectory(tmp_path / "cut", second, stop_at=2, **settings)
    with steps, pytest.raises(Interrupted):
        follow(second.stop, steps.epochs())
    assert_same(whole, followed(tmp_path / "cut", second, **settings))


def test_a_longer_patience_continues_and_a_shorter_one_reads(tmp_path: Path) -> None:
    base = planned("phase.max_epochs=50", "lr.base=0.1")
    patient = replace(base, stop=StoppingRule(50, 5, 0.0))
    alone = followed(tmp_path / "alone", patient)
    assert len(alone[0].epochs) > 3
    shared = tmp_path / "shared"
    short = followed(shared, base)
    assert len(short[0].epochs) < len(alone[0].epochs)
    long = followed(shared, patient)
    assert_same(alone, long)
    assert len(long[2].trained) == len(alone[0].epochs) - len(short[0].epochs)
    again = followed(shared, base)
    assert_same(short, again)
    assert not again[2].trained


def damage(file: Path, attempt: int, rng: random.Random) -> None:
    """Remove a file, cut it short, or flip one bit."""
    content = bytearray(file.read_bytes())
    if attempt == 0:
        file.unlink()
    elif attempt % 2:
        file.write_bytes(content[: rng.randrange(len(content))])
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)


def test_damage_is_found_and_trained_again(tmp_path: Path) -> None:
    phase = planned("phase.max_epochs=3")
    whole = followed(tmp_path / "whole", phase)
    rng = random.Random(0)
    names = list(files(tmp_path / "whole"))
    assert {Path(name).name.split("-")[0].split(".")[0] for name in names} == {
        "trajectory", "epoch", "exits", "weights", "state",
    }  # fmt: skip
    for name in names:
        for attempt in range(int(os.environ.get("PROGLAYER_TEST_DAMAGE", "3"))):
            store = tmp_path / f"{attempt}"
            shutil.copytree(tmp_path / "whole", store)
            damage(store / name, attempt, rng)
            assert_same(whole, followed(store, phase))
            shutil.rmtree(store)


def test_an_improvement_below_min_delta_keeps_both_epochs(tmp_path: Path) -> None:
    """The rule selects an epoch that is not the lowest: it is there, and the last state stays."""
    patient = replace(planned("phase.max_epochs=6"), stop=StoppingRule(6, 5, 10.0))
    short = replace(patient, stop=StoppingRule(6, 2, 10.0))
    alone = followed(tmp_path / "alone", patient)
    losses = [epoch.validation_loss for epoch in alone[0].epochs]
    assert losses[2] < losses[1] < losses[0]
    first = followed(tmp_path / "shared", short)
    assert (first[0].best.epoch, len(first[0].epochs)) == (1, 3)
    on = followed(tmp_path / "shared", patient)
    assert_same(alone, on)
    assert on[2].trained == {4, 5, 6}
    # Who goes by the lowest loss finds its weights too.
    lowest = followed(tmp_path / "shared", replace(patient, stop=StoppingRule(6, 1, 0.0)))
    assert not lowest[2].trained


def test_a_full_disk_is_told_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = planned()
    whole = followed(tmp_path / "whole", phase)
    real = os.fsync
    for good_writes in range(6):
        left = [good_writes]

        def full(file: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(file)

        store = tmp_path / str(good_writes)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(StoreError, match=r"No space left .* make room"):
                followed(store, phase)
        assert not list(store.rglob(".tmp-*"))
        assert_same(whole, followed(store, phase))


def test_checkpoints_on_the_way_change_nothing(tmp_path: Path) -> None:
    phase = planned()
    assert_same(
        followed(tmp_path / "a", phase), followed(tmp_path / "b", phase, checkpoint_every_s=0.0)
    )
    (entry,) = (path for path in (tmp_path / "b").iterdir() if path.is_dir())
    assert len(list(entry.glob("state-*"))) == 1


def test_the_key_covers_all_that_training_depends_on() -> None:
    phase = planned()
    key = describe(None, phase.train, CORPUS.fingerprint, HERE)
    # Settings that came later are left out where they are as before, so that keys stay.
    left_out = {"epoch_steps", "begun", "frozen_kinds", "layer_drop"}
    assert key["phase"].keys() | left_out == {field.name for field in fields(phase.train)}
    longer = planned("phase.epoch_steps=2")
    assert "epoch_steps" in describe(None, longer.train, CORPUS.fingerprint, HERE)["phase"]
    machines = [
        replace(HERE, **{name: value + 1 if isinstance(value, int) else value + "x"})
        for name, value in asdict(HERE).items()
    ]
    for parent, other, text, machine in (
        (None, planned("seed=1"), CORPUS.fingerprint, HERE),
        (("abc", 2), phase, CORPUS.fingerprint, HERE),
        (None, phase, "other text", HERE),
        *((None, phase, CORPUS.fingerprint, other) for other in machines),
    ):
        assert describe(parent, other.train, text, machine) != key


def test_exits_that_the_loss_does_not_read_are_evaluated_where_they_are_asked_for(
    tmp_path: Path,
) -> None:
    """In one entry, and in either order: what was evaluated first does not tell in the second."""
    asked = ("trained", "all", "trained"), ("all", "trained", "all")
    losses = set()
    for order in asked:
        for evaluated in order:
            phase = planned(f"model.evaluated_exits={evaluated}")
            with trajectory(tmp_path / order[0], phase) as steps:
                start = steps.start_exits()
                stopped = follow(phase.stop, steps.epochs())
                exits = steps.finish(stopped.best.epoch)
            layers = [2] if evaluated == "trained" else [0, 1, 2]
            assert [exit.exit for exit in exits] == [exit.exit for exit in start] == layers
            losses.add((evaluated, *(exit.loss for exit in (*start, *exits))))
            if evaluated == "trained":
                assert exits[0].loss == stopped.best.validation_loss
    assert len(losses) == 2
    frozen = "freeze.steps=[{existing: 0, embedding: false, head: false}]"
    lowest = ("model.exit_weights=[1,0,1,0]", "growth.position=bottom", frozen)
    _, second, _ = grown_phase("model.evaluated_exits=trained", *lowest)
    assert second.evaluate == (0, 2, 3)


def test_the_selected_epoch_is_evaluated_on_the_test_text_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the store's weights, under the same key, also where the phase was stored before."""
    phase = planned()
    before, state, _ = followed(tmp_path, phase)
    selected = before.best.epoch
    with trajectory(tmp_path, phase) as without:
        assert without.test(selected) is None
    other = tiny_corpus(seed=3)
    tested = replace(CORPUS, test=other.validation)
    monkeypatch.setattr(f"{__name__}.CORPUS", tested)
    with trajectory(tmp_path, phase) as steps:
        assert steps.key == without.key
        found = steps.test(selected)
    model = restored(phase.train.layers, asdict(phase.train.architecture), state)
    swapped = replace(CORPUS, validation=other.validation)
    [expected] = evaluate(
        model, phase.train, swapped, torch.device("cpu"), [phase.train.layers - 1]
    )
    assert found == expected
    monkeypatch.setattr("proglayer.store.trajectory.evaluate", None)
    with trajectory(tmp_path, phase) as again:
        assert again.test(selected) == expected
    # Another test text has a figure of its own under the same key.
    monkeypatch.undo()
    monkeypatch.setattr(f"{__name__}.CORPUS", replace(tested, test_fingerprint="1" * 64))
    with trajectory(tmp_path, phase) as others:
        assert others.key == steps.key
        others.test(selected)
        assert len(others.entry.names("test-")) == 2
