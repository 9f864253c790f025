"""Stored trajectories: reused, resumed, continued or damaged, the bits stay the same."""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from proglayer.growth import build
from proglayer.plan import Phase, StoppingRule, plan
from proglayer.stages import StoreError
from proglayer.trainer import EpochMetrics, Progress, Stopped, follow
from proglayer.trajectory import Interrupted, Machine, Trajectory, Watch, describe

from .helpers import TINY, config, tiny_corpus

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
    store: Path, phase: Phase, stop_at: int | None = None, checkpoint_every_s: float = 1e9
) -> Trajectory:
    watch = Watch(StopAt(stop_at), lambda progress: None, lambda text: None)
    return Trajectory(
        store, None, lambda: build(phase), phase, CORPUS, torch.device("cpu"), HERE,
        checkpoint_every_s, watch,
    )  # fmt: skip


def followed(
    store: Path, phase: Phase, **settings: float | None
) -> tuple[Stopped, dict[str, torch.Tensor], Trajectory]:
    with trajectory(store, phase, **settings) as steps:  # type: ignore[arg-type]
        stopped = follow(phase.stop, steps.epochs())
        exits = steps.finish(stopped.best.epoch)
        assert [e.exit for e in exits] == list(range(phase.layers))
        return stopped, steps.weights(stopped.best.epoch), steps


def without_times(epochs: tuple[EpochMetrics, ...]) -> list[EpochMetrics]:
    return [replace(epoch, train_seconds=0, evaluation_seconds=0) for epoch in epochs]


def assert_same(
    one: tuple[Stopped, dict[str, torch.Tensor], Trajectory],
    two: tuple[Stopped, dict[str, torch.Tensor], Trajectory],
) -> None:
    assert without_times(one[0].epochs) == without_times(two[0].epochs)
    assert one[0].best.epoch == two[0].best.epoch
    assert one[1].keys() == two[1].keys()
    assert all(torch.equal(one[1][name], two[1][name]) for name in one[1])


def files(store: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def test_a_second_reader_trains_nothing_and_changes_no_file(tmp_path: Path) -> None:
    first = followed(tmp_path, planned())
    before = files(tmp_path)
    second = followed(tmp_path, planned())
    assert_same(first, second)
    assert len(first[2].work.trained) == 3
    assert not second[2].work.trained
    assert files(tmp_path) == before


def test_stopped_anywhere_and_resumed_is_the_uninterrupted_run(tmp_path: Path) -> None:
    for model in ("standard", "deep_supervision"):
        phase = planned(f"model={model}", "phase.max_epochs=2")
        whole = followed(tmp_path / model / "whole", phase)
        # 2 epochs of 3 steps and 3 evaluation batches each, then the exits' evaluation.
        for look in range(14):
            store = tmp_path / model / str(look)
            with trajectory(store, phase, stop_at=look) as steps, pytest.raises(Interrupted):
                stopped = follow(phase.stop, steps.epochs())
                steps.finish(stopped.best.epoch)
            assert_same(whole, followed(store, phase))


def test_stopped_again_and_again_is_the_uninterrupted_run(tmp_path: Path) -> None:
    phase = planned()
    whole = followed(tmp_path / "whole", phase)
    store = tmp_path / "pieces"
    for _ in range(100):
        try:
            result = followed(store, phase, stop_at=4)
            break
        except Interrupted:
            continue
    else:
        pytest.fail("no progress between interruptions")
    assert_same(whole, result)


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
    assert len(long[2].work.trained) == len(alone[0].epochs) - len(short[0].epochs)
    again = followed(shared, base)
    assert_same(short, again)
    assert not again[2].work.trained


def test_weights_that_no_one_kept_are_trained_again(tmp_path: Path) -> None:
    phase = planned()
    with trajectory(tmp_path / "a", phase) as steps:
        for metrics in steps.epochs():
            if metrics.epoch == 1:
                kept = steps.weights(1)
            if metrics.epoch == 3:
                break
    with trajectory(tmp_path / "a", phase) as steps:
        assert steps.weights_path(1) is None
        again = steps.weights(1)
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def damaged(content: bytes, cut: bool, rng: random.Random) -> bytes:
    """Cut short, or with one bit flipped."""
    if cut:
        return content[: rng.randrange(len(content))]
    flipped = bytearray(content)
    flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def test_damage_is_set_aside_and_trained_again(tmp_path: Path) -> None:
    phase = planned("phase.max_epochs=3")
    whole = followed(tmp_path / "whole", phase)
    rng = random.Random(0)
    names = list(files(tmp_path / "whole"))
    assert {Path(name).name.split("-")[0].split(".")[0] for name in names} == {
        "stage", "epoch", "exits", "weights", "state",
    }  # fmt: skip
    for name in names:
        for attempt in range(int(os.environ.get("PROGLAYER_TEST_DAMAGE", "4"))):
            store = tmp_path / f"{attempt}"
            shutil.copytree(tmp_path / "whole", store)
            (store / name).write_bytes(damaged((store / name).read_bytes(), attempt % 2 == 0, rng))
            assert_same(whole, followed(store, phase))
            if not name.split("/")[1].startswith(("state", "stage")):
                assert list((store / ".damaged").rglob("*.*.*")), name
            shutil.rmtree(store)


def test_a_removed_file_is_made_again(tmp_path: Path) -> None:
    phase = planned()
    whole = followed(tmp_path / "whole", phase)
    for name in files(tmp_path / "whole"):
        store = tmp_path / "holed"
        shutil.copytree(tmp_path / "whole", store)
        (store / name).unlink()
        assert_same(whole, followed(store, phase))
        shutil.rmtree(store)


def test_a_full_disk_is_told_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    phase = planned()
    whole = followed(tmp_path / "whole", phase)
    real = os.fsync
    for good_writes in range(6):
        left = [2 * good_writes]

        def full(file: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(file)

        store = tmp_path / str(good_writes)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(StoreError, match=r"No space left .* stages.dir"):
                followed(store, phase)
        assert not list(store.rglob(".tmp-*"))
        assert_same(whole, followed(store, phase))


def test_checkpoints_on_the_way_change_nothing(tmp_path: Path) -> None:
    phase = planned()
    assert_same(
        followed(tmp_path / "a", phase), followed(tmp_path / "b", phase, checkpoint_every_s=0.0)
    )
    (stage,) = (path for path in (tmp_path / "b").iterdir() if path.is_dir())
    assert len(list(stage.glob("state-*"))) == 1


def test_the_key_covers_all_but_the_stopping_rule() -> None:
    phase = planned()
    key = describe(None, phase, CORPUS.fingerprint, HERE)
    assert (
        describe(None, replace(phase, stop=StoppingRule(9, 9, 0.9)), CORPUS.fingerprint, HERE)
        == key
    )
    other = planned("seed=1")
    for field in asdict(phase):
        if field != "stop":
            assert field in key["phase"]
    assert describe(None, other, CORPUS.fingerprint, HERE) != key
    assert describe(("abc", 2), phase, CORPUS.fingerprint, HERE) != key
    assert describe(None, phase, "other text", HERE) != key
    for field, value in asdict(HERE).items():
        different = value + 1 if isinstance(value, int) else value + "x"
        assert describe(None, phase, CORPUS.fingerprint, replace(HERE, **{field: different})) != key


def test_progress_is_shown(tmp_path: Path) -> None:
    seen: list[Progress] = []
    phase = planned()
    steps = trajectory(tmp_path, phase)
    steps._watch.on_step = seen.append
    with steps:
        next(steps.epochs())
    assert [(p.step, p.steps) for p in seen] == [(1, 3), (2, 3), (3, 3)]
