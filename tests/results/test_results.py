"""Results: from piles of made-up records to tables."""

from __future__ import annotations

import copy
import functools
import io
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from proglayer.results.__main__ import main
from proglayer.results.columns import SETTINGS
from proglayer.results.read import Results, load
from proglayer.results.show import print_results
from proglayer.results.variants import NOT_THE_EXPERIMENT, PLACE_OF_TEXT, experiment_key
from proglayer.run.record import FORMAT, RunRecord, RunState, SweepRecord, read_record, write_record

from .. import synthetic
from ..helpers import config
from ..synthetic import STARTED


def settings(*overrides: str) -> dict[str, Any]:
    return config(*overrides).model_dump(mode="json")


def with_setting(plain: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """A copy of the settings with one changed, whatever its name."""
    plain = copy.deepcopy(plain)
    *sections, last = name.split(".")
    functools.reduce(lambda part, section: part[section], sections, plain)[last] = value
    return plain


def write_run(
    folder: Path,
    seed: int = 1,
    model: str = "standard",
    *overrides: str,
    perplexities: tuple[float, ...] = (980.0, 970.0),
    reused: int = 0,
    **extra: Any,
) -> Path:
    """A run's folder as the tool leaves it: of three epochs a phase the second is the best."""
    losses = [[math.log(p) + more for more in (0.1, 0.0, 0.01)] for p in perplexities]
    experiment = "original" if perplexities[1:] else "control_from_scratch"
    synthetic.run(folder, experiment, model, seed, *overrides, losses=losses, **extra)
    record = read_record(folder)
    for row in record.epochs:
        row.reused = row.epoch <= reused
    write_record(folder, record)
    return folder


def ends(results: Results) -> dict[str, str]:
    return dict(zip(results.runs["run"], results.runs["status"], strict=True))


def row(results: Results, run: str) -> dict[str, Any]:
    return results.runs.set_index("run").loc[run].to_dict()


def waits(folder: Path, seed: int) -> None:
    """A job that was submitted and has not begun."""
    record = RunRecord(
        state=RunState.waiting,
        overrides=[f"seed={seed}", "model=standard"],
        choices={"model": "standard"},
        config=settings("model=standard") | {"seed": seed},
    )
    write_record(folder, record)


# --- what is read ---------------------------------------------------------------------------------


def test_a_run_is_a_row_of_what_it_recorded(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "sweep" / "0_abc", seed=7, model="deep_supervision", reused=2)
    write_record(tmp_path / "sweep", SweepRecord(jobs=[]))
    run, rows = row(load(tmp_path), "sweep/0_abc"), read_record(folder).epochs
    assert run["sweep"] == "sweep"
    assert (run["status"], run["model"]) == ("completed", "deep_supervision")
    assert run["experiment"] == "original"
    assert (run["seed"], run["first_layers"], run["last_layers"]) == (7, 3, 4)
    ends = run["first_validation_perplexity"], run["last_validation_perplexity"]
    assert ends == pytest.approx((980.0, 970.0))
    assert run["validation_loss_change_nats"] == pytest.approx(math.log(970 / 980))
    assert run["validation_accuracy_change_points"] == pytest.approx(5 * math.log(980 / 970))
    assert math.isnan(run["last_test_loss"])
    # two of each phase's epochs were read from the store
    seconds = [each.train_seconds + each.evaluation_seconds for each in rows]
    saved = [own for own, each in zip(seconds, rows, strict=True) if each.reused]
    assert (run["seconds"], run["seconds_saved"]) == pytest.approx((sum(seconds), sum(saved)))
    assert (run["epochs"], run["epochs_reused"], run["tokens"]) == (6, 4, 6 * 3_000 * 32)
    body = sum(each.train_flops_body for each in rows)
    assert run["flops_without_head"] == pytest.approx(body)
    assert run["flops"] == pytest.approx(body + sum(each.train_flops_head for each in rows))
    assert run["validation_tokens"] == 16_000
    assert run["config.lr.base"] == 0.001
    assert run["config.model.exit_weights"] == "uniform"
    assert run["started"] == pd.Timestamp(STARTED)
    assert Path(run["folder"]) == folder


def test_phases_epochs_and_exits_have_a_row_each(tmp_path: Path) -> None:
    write_run(tmp_path / "a", seed=1)
    write_run(tmp_path / "b", seed=2, perplexities=(900.0,))
    results = load(tmp_path)
    found = results.phases[["run", "phase", "layers"]].to_numpy().tolist()
    assert found == [["a", 1, 3], ["a", 2, 4], ["b", 1, 4]]
    assert results.phases["rate_existing"].isna().tolist() == [False, True, False]
    frozen = "embedding, layers.0, layers.1, layers.2"
    assert results.phases["frozen"].tolist() == ["", frozen, ""]
    assert len(results.epochs) == 9
    kept = results.epochs[results.epochs["best"]]
    assert kept["validation_perplexity"].tolist() == pytest.approx([980.0, 970.0, 900.0])
    assert results.exits.groupby(["run", "phase"]).size().tolist() == [3, 4, 4]


def test_types_depend_on_the_runs_only_in_that_integers_are_plain_where_none_is_missing(
    tmp_path: Path,
) -> None:
    full, none = tmp_path / "full", tmp_path / "none"
    none.mkdir()
    write_run(full / "a", seed=1)
    write_run(full / "b", seed=2, status="failed")
    write_run(full / "c", seed=3, status="running")
    plain = {"Int64": "int64", "boolean": "bool"}
    for name in ("runs", "phases", "epochs", "exits", "left_out"):
        many, nothing = getattr(load(full), name), getattr(load(none), name)
        for column in [column for column in many if not column.startswith("choice.")]:
            own = str(many[column].dtype)
            assert str(nothing[column].dtype) == plain.get(own, own), column
            assert own not in plain or many[column].hasnans
    runs = load(full).runs
    assert runs["seed"].dtype == "int64"
    assert str(runs["last_layers"].dtype) == "Int64"
    assert runs["seconds"].dtype == "float64"
    assert str(runs["started"].dtype) == "datetime64[us, UTC]"


def test_runs_are_in_the_order_of_their_numbers(tmp_path: Path, no_fsync: None) -> None:
    for number in (10, 2, 1):
        write_run(tmp_path / f"{number}_abc", seed=number)
    results = load(tmp_path)
    assert results.runs["seed"].tolist() == [1, 2, 10]
    assert results.epochs["run"].unique().tolist() == ["1_abc", "2_abc", "10_abc"]


def test_folders_that_overlap_are_read_once_and_several_are_told_apart(tmp_path: Path) -> None:
    write_run(tmp_path / "x" / "0_abc", seed=1)
    write_run(tmp_path / "y" / "0_abc", seed=2)
    x, y = tmp_path / "x", tmp_path / "y"
    assert ends(load(x)).keys() == {"0_abc"}
    assert ends(load(x / "0_abc")).keys() == {"0_abc"}
    assert ends(load(x, y)).keys() == {"x/0_abc", "y/0_abc"}
    assert ends(load(tmp_path, x, x / "0_abc")).keys() == {"x/0_abc", "y/0_abc"}
    assert load().runs.empty


# --- piles of all sorts ---------------------------------------------------------------------------


def test_a_killed_sweep_with_failures_waiting_jobs_and_other_settings(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    write_run(sweep / "0_abc", seed=0)
    write_run(sweep / "1_abc", seed=1, status="failed")
    write_run(sweep / "2_abc", seed=2, status="interrupted")
    write_run(sweep / "3_abc", seed=3, status="running", reused=0)
    waits(sweep / "4_abc", 4)
    write_record(sweep, SweepRecord(jobs=[]))
    other = settings("model.dim=128", "seed=9") | {"new_idea": {"strength": 3}}
    write_run(tmp_path / "single", seed=9, config=other)
    results = load(tmp_path)
    states = "completed", "failed", "interrupted", "running", "waiting"
    jobs = {f"sweep/{number}_abc": state for number, state in enumerate(states)}
    assert ends(results) == jobs | {"single": "completed"}
    assert results.left_out.empty
    assert row(results, "sweep/1_abc")["reason"] == "the loss became NaN"
    # failed in its second phase: the first one's metrics, the epochs of both, no change
    failed = row(results, "sweep/1_abc")
    assert (failed["first_layers"], failed["epochs"]) == (3, 6)
    assert pd.isna(failed["last_validation_perplexity"])
    assert pd.isna(failed["validation_accuracy_change_points"])
    running = row(results, "sweep/3_abc")
    assert (running["seed"], running["model"], running["config.model.dim"]) == (3, "standard", 64)
    assert (running["experiment"], running["epochs"]) == ("original", 6)
    assert running["last_sign"] > pd.Timestamp(STARTED)
    waiting = row(results, "sweep/4_abc")
    assert (waiting["seed"], waiting["model"], waiting["sweep"]) == (4, "standard", "sweep")
    assert pd.isna(waiting["epochs"])
    assert row(results, "single")["config.new_idea.strength"] == "3"
    assert results.varied == ["config.seed", "config.model.dim", "config.new_idea.strength"]


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    pile = tmp_path / "pile"
    write_run(pile / "good")
    (pile / "numbers").mkdir()
    (pile / "numbers" / "run.json").write_text("[1, 2]")
    write_run(pile / ".store" / "x")
    edit(write_run(pile / "future", seed=2), format=FORMAT + 1)
    edit(write_run(pile / "bad_phase", seed=4), phases=["one"])
    short = write_run(pile / "short", seed=5) / "run.json"
    short.write_bytes(short.read_bytes()[:-100])
    (pile / "link").symlink_to(pile / "good")
    results = load(pile)
    assert ends(results) == {"good": "completed"}
    records = {"numbers", "future", "bad_phase", "short"}
    assert set(results.left_out["folder"]) == records
    assert "left out: numbers: " in printed(results, 160)


def edit(folder: Path, **changed: Any) -> None:
    result = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(result | changed))


# --- the same run twice ---------------------------------------------------------------------------


def test_of_runs_with_the_same_settings_the_newest_completed_one_counts(tmp_path: Path) -> None:
    elsewhere = ("store.dir=elsewhere", "threads=4", "checkpoint_every_s=5")
    write_run(tmp_path / "a", ended="2026-03-01T10:00:00+00:00")
    write_run(tmp_path / "b", 1, "standard", *elsewhere, ended="2026-03-02T10:00:00+00:00")
    write_run(tmp_path / "c", status="failed", ended="2026-03-03T10:00:00+00:00")
    write_run(tmp_path / "d", seed=2)
    write_run(tmp_path / "e", 1, "standard", "phase.patience=5")
    results = load(tmp_path)
    counts = dict(zip(results.runs["run"], results.runs["duplicate_of"].fillna("-"), strict=True))
    assert counts == {"a": "b", "b": "-", "c": "b", "d": "-", "e": "-"}
    distinct = results.distinct()
    for frame in (distinct.runs, distinct.phases, distinct.epochs, distinct.exits):
        assert set(frame["run"]) == {"b", "d", "e"}
    assert len(results.runs) == 5


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_every_setting_makes_another_experiment_or_is_named_as_aside(name: str) -> None:
    plain = settings()
    value = functools.reduce(lambda part, key: part[key], name.split("."), plain)
    kind = SETTINGS[name]
    if kind == "bool":
        value = not value
    elif kind == "text":
        value = f"{value}1"
    else:
        value = (value or 0) + 1
    other = with_setting(plain, name, value)
    aside = (*NOT_THE_EXPERIMENT, *PLACE_OF_TEXT)
    assert (experiment_key(plain, "f") == experiment_key(other, "f")) == (name in aside)
    # where the text lies counts unless its fingerprint is known
    assert (experiment_key(plain, None) == experiment_key(other, None)) == (
        name in NOT_THE_EXPERIMENT
    )
    assert experiment_key(plain, "f") != experiment_key(other, "g")


# --- to files -------------------------------------------------------------------------------------


def test_parquet_gives_back_what_was_written(tmp_path: Path) -> None:
    write_run(tmp_path / "pile" / "a", seed=1, overrides=["=1+1"])
    write_run(tmp_path / "pile" / "b", seed=2, status="failed")
    (tmp_path / "pile" / "empty").mkdir()
    results = load(tmp_path / "pile")
    results.to_parquet(tmp_path / "parquet")
    for name in ("runs", "phases", "epochs", "exits", "left_out"):
        back = pd.read_parquet(tmp_path / "parquet" / f"{name}.parquet")
        pd.testing.assert_frame_equal(back, getattr(results, name), check_dtype=False)


# --- the table ------------------------------------------------------------------------------------


def printed(results: Results, width: int) -> str:
    out = Console(file=io.StringIO(), width=width)
    print_results(results, out)
    return out.file.getvalue()


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    sweep = tmp_path / "sweep"
    reason = "the loss became NaN " * 20
    write_run(sweep / "0_abcdef", seed=0, reused=2)
    write_run(sweep / "1_abcdef", seed=1, model="deep_supervision", status="failed", reason=reason)
    write_run(sweep / "2_abcdef", seed=2, status="interrupted", reason="SIGTERM\n\x1b[31mred\x07")
    write_run(sweep / "3_abcdef", seed=3, status="running", perplexities=(980.0, 950.0))
    waits(sweep / "4_abcdef", 4)
    write_record(sweep, SweepRecord(jobs=[]))
    return sweep


@pytest.mark.parametrize("width", [40, 60, 80, 100, 160])
def test_the_table_fits_and_no_status_is_cut(mixed: Path, width: int) -> None:
    text = printed(load(mixed), width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    for status in ("completed", "failed", "interrupted", "running", "waiting"):
        assert f" {status} " in text
    # why a run failed takes one line, however long the reason is
    assert sum("NaN" in line for line in lines) == 1
    assert "\x1b" not in text
    assert "\x07" not in text


def test_the_table_tells_what_varied_and_how_it_went(mixed: Path) -> None:
    text = printed(load(mixed), 160)
    assert "980.00 → 970.00" in text
    assert "16.06 → 16.11" in text
    assert "950.00 (phase 2, epoch 3)" in text
    assert "deep_supervision" in text
    assert "interrupted 2_abcdef: SIGTERM  [31mred" in text
    assert "5 runs: 1 completed, 1 failed, 1 interrupted, 1 running, 1 waiting" in text
    for title in ("model", "seed", "layers", "change, points", "reused", "saved"):
        assert title in text


# --- the command ----------------------------------------------------------------------------------


def test_the_command_ends_with_what_happened(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "good" / "0")
    assert main([str(tmp_path / "good")]) == 0
    tables = ["--csv", str(tmp_path / "csv"), "--parquet", str(tmp_path / "parquet")]
    assert main([str(mixed), *tables]) == 1
    for form in ("csv", "parquet"):
        written = {path.stem for path in (tmp_path / form).glob(f"*.{form}")}
        assert written == {"runs", "phases", "epochs", "exits", "left_out"}
    capsys.readouterr()
    assert main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err == f"error: there is no folder {tmp_path / 'nowhere'}\n"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main([str(empty)]) == 2
    assert capsys.readouterr().err == f"error: no run in {empty}\n"
