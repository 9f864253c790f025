"""The command line, end to end: runs, sweeps, records, and what a mistake is answered."""

from __future__ import annotations

import csv
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from proglayer import load_run
from proglayer.config import Config
from proglayer.data.corpus import open_corpus
from proglayer.errors import ConfigError, StoreError
from proglayer.run import run as running
from proglayer.run import setup
from proglayer.run.record import RunRecord, RunState, write_record
from proglayer.training.plan import plan
from proglayer.training.trainer import Training, evaluate

from ..helpers import (
    ROOT,
    SHORT,
    Command,
    assert_same_bits,
    config,
    epochs,
    epochs_trained,
    results,
    start,
    until,
)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_run(folder).state_dict()


def test_a_run_leaves_its_record_and_its_model_which_scores_what_the_record_says(
    train: Command, tmp_path: Path
) -> None:
    done = train(*SHORT, "hydra.run.dir=run")
    assert done.status == 0, done.err
    (record,) = results(tmp_path)
    assert record["state"] == "completed"
    assert record["machine"]["torch"] == torch.__version__
    assert [p["layers"] for p in record["phases"]] == [3, 4]
    assert [len(p["exits"]) for p in record["phases"]] == [3, 4]
    for phase in record["phases"]:
        # The last exit is what selection read.
        assert phase["exits"][str(phase["layers"])] == phase["validation"]
    log = (tmp_path / "run/train.log").read_text()
    assert "phase 2/2 grown" in log
    growths = sum(phase["growth"] is not None for phase in record["phases"])
    assert log.count("validation loss") == growths + sum(epochs(record))
    with open(tmp_path / "run/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["phase"] for row in rows].count("1") == epochs(record)[0]
    best_rows = [row for row in rows if row["best"] == "True"]
    assert [int(row["epoch"]) for row in best_rows] == [p["best_epoch"] for p in record["phases"]]
    model = load_run(tmp_path / "run")
    assert model.logits(torch.zeros(1, 5, dtype=torch.long)).shape == (1, 5, 200)
    settings = Config.model_validate(record["config"])
    corpus = open_corpus(settings.data)
    phase = plan(settings, corpus.vocab_size)[-1]
    (last,) = evaluate(model, phase.train, corpus, torch.device("cpu"), [3])
    assert last.loss == record["phases"][-1]["validation"]["loss"]


def test_weights_that_are_not_the_runs_are_refused(tmp_path: Path) -> None:
    write_record(tmp_path, RunRecord(state=RunState.completed, weights_sha256="0" * 64))
    with pytest.raises(ConfigError, match="name the folder of one run that has trained"):
        load_run(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"of another")
    with pytest.raises(StoreError, match="is not what the run left there"):
        load_run(tmp_path)
    with pytest.raises(ConfigError, match=f"name one of {tmp_path.name}"):
        load_run(tmp_path.parent)


def test_a_sweep_shares_its_first_phase_and_changes_no_bit(train: Command, tmp_path: Path) -> None:
    done = train("-m", *SHORT, "added_layers=1,3", "hydra.sweep.dir=sweep")
    assert "4 phases planned: 3 distinct phases, 0 of them stored" in done.out
    one, three = results(tmp_path / "sweep")
    assert [p["layers"] for p in one["phases"]] == [3, 4]
    assert [p["layers"] for p in three["phases"]] == [3, 6]
    assert one["phases"][0]["trajectory"] == three["phases"][0]["trajectory"]
    assert [epochs(r, reused=False)[0] for r in (one, three)] == [2, 0]
    # Alone, in a store of its own, the second job comes to the same bits.
    assert train(*SHORT, "added_layers=3", "hydra.run.dir=alone", "store.dir=other").status == 0
    (alone,) = results(tmp_path / "alone")
    assert epochs(alone, reused=False)[0] == 2
    assert [p["validation"] for p in alone["phases"]] == [p["validation"] for p in three["phases"]]
    job = next((tmp_path / "sweep").glob("1_*"))
    ours, theirs = weights(job), weights(tmp_path / "alone")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_same_command_again_trains_nothing(train: Command, tmp_path: Path) -> None:
    command = ("-m", *SHORT, "model=standard,deep_supervision")
    assert train(*command, "hydra.sweep.dir=a").status == 0
    assert train(*command, "hydra.sweep.dir=b").status == 0
    for first, second in zip(results(tmp_path / "a"), results(tmp_path / "b"), strict=True):
        assert [p["validation"] for p in first["phases"]] == [
            p["validation"] for p in second["phases"]
        ]
        assert [p["exits"] for p in first["phases"]] == [p["exits"] for p in second["phases"]]
        assert sum(epochs(second, reused=False)) == 0
        assert second["epochs"][0]["train_seconds"] == first["epochs"][0]["train_seconds"]
    # In the same folder, finished jobs are not even started.
    before = (tmp_path / "b").stat().st_mtime_ns, results(tmp_path / "b")
    again = train(*command, "hydra.sweep.dir=b")
    assert again.status == 0
    assert "2 finished before" in again.out
    assert results(tmp_path / "b") == before[1]


@pytest.mark.parametrize(("on_error", "last"), [("go_on", "completed"), ("stop", "waiting")])
def test_a_failing_job_stops_the_others_where_it_is_to(
    train: Command, tmp_path: Path, on_error: str, last: str
) -> None:
    rates = ("lr.base=0.001,1e15,0.002", "optimizer.clip_norm=null", f"on_error={on_error}")
    done = train("-m", *SHORT, *rates, "hydra.sweep.dir=s")
    assert done.status == 1
    records = results(tmp_path / "s")
    assert [r["state"] for r in records] == ["completed", "failed", last]
    log = next((tmp_path / "s").glob("1_*/train.log")).read_text()
    assert all("lower lr.base" in text for text in (records[1]["reason"], done.out, log))
    assert "Traceback" not in done.err


@pytest.mark.parametrize(("part", "phases"), [("grow", 1), ("set_up", 0)])
def test_a_fault_of_ours_is_in_the_record_of_each_job_with_its_traceback(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, phases: int
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("CUDA start-up\nfailed")

    monkeypatch.setattr(running, part, broken)
    assert train("-m", *SHORT, "seed=1,2", "hydra.sweep.dir=s").status == 1
    records = results(tmp_path / "s")
    reason = "RuntimeError: CUDA start-up failed"
    assert [(r["state"], r["reason"]) for r in records] == [("failed", reason)] * 2
    assert all("in broken" in r["traceback"] for r in records)
    assert all("in broken" in log.read_text() for log in (tmp_path / "s").glob("*/train.log"))
    assert [len(r["phases"]) for r in records] == [phases] * 2


def test_a_run_that_its_search_gives_up_says_so_and_leaves_its_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROGLAYER_STORE", str(tmp_path / "stages"))
    seen: list[tuple[int, int]] = []

    def prune(record: RunRecord) -> str | None:
        last = record.epochs[-1]
        seen.append((last.phase, last.epoch))
        return "worse than the others" if last.phase == 2 else None

    settings = config(*SHORT)
    ended = running.run(settings, tmp_path / "run", prune=prune)
    assert ended.state is RunState.pruned
    assert ended.objective is None
    assert seen == [(1, 1), (1, 2), (2, 1)]
    (record,) = results(tmp_path / "run")
    assert (record["state"], record["reason"]) == ("pruned", "worse than the others")
    assert len(record["phases"]) == 1
    assert not (tmp_path / "run/weights.safetensors").exists()
    # Whoever wants it whole all the same trains the epochs that are missing.
    whole = running.run(settings, tmp_path / "run")
    assert whole.state is RunState.completed
    assert epochs(whole.model_dump(), reused=True) == [2, 1]


def test_a_signal_while_the_corpus_is_prepared_ends_the_run_at_once(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def preparing(_: object, say: Callable[[str], None]) -> None:
        say("preparing the [corpus]")
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
        pytest.fail("the signal was swallowed")

    monkeypatch.setattr(setup, "open_corpus", preparing)
    done = train(*SHORT, "hydra.run.dir=run")
    assert done.status == 130
    assert "preparing the [corpus]\n" in done.out
    assert "Traceback" not in done.err


def test_a_failed_try_leaves_nothing_of_the_one_before(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader would take the old weights and figures for those of the failed run."""
    assert train(*SHORT, "hydra.run.dir=run").status == 0

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(running, "Trajectory", broken)
    assert train(*SHORT, "hydra.run.dir=run").status == 1
    (record,) = results(tmp_path)
    assert (record["state"], record["epochs"]) == ("failed", [])
    assert not (tmp_path / "run/weights.safetensors").exists()
    assert not (tmp_path / "run/metrics.csv").exists()


def test_a_diverged_run_keeps_the_last_good_weights(train: Command, tmp_path: Path) -> None:
    done = train(
        *SHORT, "hydra.run.dir=run", "lr.factor.new=1e15", "lr.factor.head=1e15",
        "optimizer.clip_norm=null",
    )  # fmt: skip
    assert done.status == 1
    (record,) = results(tmp_path)
    assert "phase 2, epoch 1" in record["reason"]
    assert len(weights(tmp_path / "run")) == 2 + 3 * 9
    assert all(w.isfinite().all() for w in weights(tmp_path / "run").values())


def test_a_run_that_diverges_later_keeps_the_epoch_before(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = (*SHORT, "phase=from_scratch", "phase.max_epochs=1")
    assert train(*one, "hydra.run.dir=one", "store.dir=other").status == 0
    loss = Training.loss

    def in_epoch_2(training: Training, *batch: torch.Tensor) -> torch.Tensor:
        return loss(training, *batch) * (float("nan") if training.epoch == 1 else 1.0)

    monkeypatch.setattr(Training, "loss", in_epoch_2)
    done = train(*one, "phase.max_epochs=3", "hydra.run.dir=run")
    assert done.status == 1
    (record,) = results(tmp_path / "run")
    assert "the training loss became nan in phase 1, epoch 2" in record["reason"]
    kept, expected = weights(tmp_path / "run"), weights(tmp_path / "one")
    assert all(torch.equal(kept[name], expected[name]) for name in expected)
    # No state that holds numbers which are none.
    assert not list((tmp_path / "stages").glob("*/state-0001-0000[1-9]*"))


def test_planning_trains_nothing_and_leaves_nothing(train: Command, tmp_path: Path) -> None:
    done = train("plan=true", "experiment=gradual_unfreezing", "data.max_vocab=500")
    assert done.status == 0, done.err
    for text in ("4 unfreezing", "layers 1-2", "GFLOP", "(100.0%)"):
        assert text in done.out
    published = train("plan=true", "model.vocab_size=69830", "precision=auto").out
    published = published.replace("\n", " ")
    assert "precision=auto is " in published
    assert "9,135,232 / 9,135,232 (100.0%)" in published
    assert "4,534,784 / 9,200,896 (49.3%)" in published
    swept = train("-m", "plan=true", "added_layers=1,3", "data.max_vocab=500")
    assert swept.status == 0
    assert swept.out.count("│ 1 initial") == 2
    assert not list(tmp_path.rglob("*.json"))
    assert not list(tmp_path.rglob("*.log"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["freeze=gradual", "initial_layers=1"], "initial_layers=2 or more"),
        (["model.vocab_size=100"], "model.vocab_size=100 is smaller than the corpus's vocabulary"),
        (["model.exit_weights=[1,2]"], "has 2 weights for 3 layers"),
    ],
)
def test_a_mistake_gets_a_line_and_leaves_nothing(
    train: Command, tmp_path: Path, overrides: list[str], message: str
) -> None:
    done = train(*overrides)
    assert done.status == 1
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_disk_that_is_full_at_the_end_loses_nothing(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, record: RunRecord) -> None:
        if record.state is RunState.completed:
            raise StoreError("cannot write to run (No space left on device)")
        write_record(folder, record)

    with monkeypatch.context() as patch:
        patch.setattr(running.records, "write_record", full)
        done = train(*SHORT, "hydra.run.dir=run")
    assert done.status == 1
    assert done.err == "error: cannot write to run (No space left on device)\n"
    assert (tmp_path / "run/metrics.csv").exists()
    assert "phase 2/2" in (tmp_path / "run/train.log").read_text()
    assert train(*SHORT, "hydra.run.dir=run").status == 0
    (record,) = results(tmp_path)
    assert sum(epochs(record, reused=False)) == 0


def test_two_workers_train_nothing_twice_and_change_no_bit(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = "experiment=original,control_from_scratch,gradual_unfreezing,longer_training"
    jobs = ("-m", *SHORT, "threads=1", experiment, "model=standard,deep_supervision")
    workers = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    # Workers import the package by name, wherever they are started.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = train(*jobs, *workers, "hydra.sweep.dir=two", "store.dir=a")
    assert done.status == 0, done.err
    assert train(*jobs, "hydra.sweep.dir=one", "store.dir=b").status == 0
    two, one = results(tmp_path / "two"), results(tmp_path / "one")
    assert len(two) == 2 * 4
    assert [r["state"] for r in one] == ["completed"] * len(two)
    assert_same_bits(two, one)
    assert epochs_trained(two) == epochs_trained(one)
    states = [{p.name for p in (tmp_path / s).glob("*/weights-*")} for s in "ab"]
    assert states[0] == states[1]


def test_a_signal_ends_a_run_that_the_same_command_goes_on_with(
    train: Command, tmp_path: Path
) -> None:
    arguments = (*SHORT, "phase=from_scratch", "phase.max_epochs=12", "phase.patience=12",
                 "hydra.run.dir=run")  # fmt: skip
    process = start(tmp_path, *arguments)
    until((tmp_path / "run/metrics.csv").exists, process)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in out
    (record,) = results(tmp_path / "run")
    assert (record["state"], record["reason"]) == ("interrupted", "stopped by SIGUSR1")
    assert list((tmp_path / "stages").rglob("state-*"))
    # The same command goes on, and comes to the bits of a run that nobody stopped.
    assert train(*arguments).status == 0
    (on,) = results(tmp_path / "run")
    assert sum(epochs(on, reused=True)) > 0
    assert train(*arguments, "hydra.run.dir=whole", "store.dir=other").status == 0
    (whole,) = results(tmp_path / "whole")
    assert sum(epochs(whole, reused=True)) == 0
    assert_same_bits([on], [whole])
    files = [tmp_path / run / "weights.safetensors" for run in ("run", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()
