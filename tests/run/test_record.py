"""The record of a run: what is written comes back, and its state is told by it and its age."""

from __future__ import annotations

import csv
import json
import math
import os
import time
from pathlib import Path

import pytest

from proglayer.config import ConfigError
from proglayer.run import record
from proglayer.run.record import (
    LOST_AFTER_S,
    CorpusRecord,
    RecordError,
    RunRecord,
    RunState,
    Score,
    SweepJob,
    SweepRecord,
    change_state,
    read_record,
    state_of,
    write_record,
)

from .. import synthetic
from ..synthetic import aged


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    folder = synthetic.run(tmp_path / "run", "original", "standard", 1, shock=0.3)
    before = read_record(folder)
    assert before.phases[1].growth is not None
    write_record(tmp_path / "copy", before)
    assert read_record(tmp_path / "copy") == before
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(before.epochs)
    losses = [row.validation.loss for row in before.epochs]
    assert [float(row["validation_loss"]) for row in rows] == losses


def test_a_figure_that_is_none_is_valid_json_and_comes_back(tmp_path: Path) -> None:
    folder = synthetic.run(
        tmp_path / "run", "control_from_scratch", "standard", 1, losses=[[math.inf, 5.0]]
    )
    text = (folder / "run.json").read_text()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert [row.validation.loss for row in read_record(folder).epochs] == [math.inf, 5.0]
    score = Score(loss=800.0, accuracy=0.1)
    corpus = read_record(folder).corpus
    assert corpus is not None
    assert corpus.figures(score)["validation_perplexity"] is None


@pytest.mark.parametrize("content", ["", "{", "null", '{"format": 99}', '{"state": "exploded"}'])
def test_a_damaged_record_is_one_line_with_its_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RecordError) as error:
        read_record(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'run.json'}: ")
    assert "\n" not in str(error.value)


def states(sweep: Path, *jobs: str) -> list[RunState]:
    return [state_of(sweep / job).state for job in jobs]


def test_a_state_is_told_by_the_record_and_its_age(tmp_path: Path) -> None:
    names = ("0", "1", "2", "3", "4")
    jobs = [SweepJob(folder=name, overrides=[]) for name in names]
    write_record(tmp_path, SweepRecord(jobs=jobs))
    for name, state in zip(names, ("completed", "running", "pending", "waiting"), strict=False):
        write_record(tmp_path / name, RunRecord(state=RunState(state)))
    assert states(tmp_path, *names) == ["completed", "running", "pending", "waiting", "waiting"]
    aged(tmp_path, LOST_AFTER_S + 5)
    assert states(tmp_path, *names) == [
        *("completed", "lost", "pending", "not started", "not started")
    ]
    assert str(state_of(tmp_path / "1").reason).startswith("no sign of life since ")
    # The command that runs the sweep shows life for those that wait.
    os.utime(tmp_path / "sweep.json")
    assert states(tmp_path, "1", "3", "4") == ["lost", "waiting", "waiting"]
    change_state(tmp_path / "2", RunState.lost, "its time was up", (RunState.pending,))
    change_state(tmp_path / "0", RunState.lost, "its time was up", (RunState.pending,))
    assert states(tmp_path, "0", "2") == ["completed", "lost"]
    assert state_of(tmp_path / "2").reason == "its time was up"


def test_a_run_shows_life_while_it_lasts(tmp_path: Path) -> None:
    write_record(tmp_path, RunRecord(state=RunState.running))
    with record.sign_of_life(tmp_path / "run.json", every_s=0.01):
        aged(tmp_path, 600)
        until = time.monotonic() + 20
        while state_of(tmp_path).state is not RunState.running:
            assert time.monotonic() < until
            time.sleep(0.01)
    aged(tmp_path, 600)
    assert state_of(tmp_path).state is RunState.lost


def test_an_objective_that_the_text_cannot_give_is_refused() -> None:
    corpus = CorpusRecord(
        name="a", fingerprint="f", vocab_size=9, seq_len=8, train_windows=1, validation_windows=1
    )
    record.check_objective("validation_loss", corpus)
    for objective in ("test_loss", "validation_bits_per_byte"):
        with pytest.raises(ConfigError, match=f"objective={objective}: "):
            record.check_objective(objective, corpus)
