"""The store's entries and its command, and runs that are killed at any moment."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from proglayer.errors import ConfigError
from proglayer.run.record import (
    RunRecord,
    RunState,
    SweepJob,
    SweepRecord,
    read_record,
    write_record,
)
from proglayer.run.run import run
from proglayer.store.__main__ import main
from proglayer.store.entries import Entry, entries_of, key_of, open_store

from ..helpers import config

RUN = (
    "data.samples=96", "data.validation_samples=32", "data.max_vocab=100", "model.dim=8",
    "model.num_heads=2", "phase.max_epochs=2", "phase.batch_size=16",
    "experiment=gradual_unfreezing", "model=deep_supervision", "threads=1",
)  # fmt: skip


def entry(store: Path, called: str, size: int, age_days: float) -> Entry:
    """Make an entry with a state of `size` bytes that was written so long ago."""
    open_store(store)
    made = Entry(store, key_of({"called": called}))
    made.write("state-0001-000000", b"x" * size)
    grow_old(made, age_days)
    return made


def grow_old(made: Entry, age_days: float) -> None:
    then = time.time() - age_days * 86_400
    for path in made.folder.rglob("*"):
        os.utime(path, (then, then))


def run_folder(folder: Path, status: str | None, *read: Entry) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if status:
        write_record(folder, RunRecord(state=RunState(status)))
    for each in read:
        each.mark_used(folder)
    return folder


def stored(store: Path) -> set[str]:
    return {each.key for each in entries_of(store)}


def test_a_file_that_was_cut_short_or_altered_is_not_read_and_goes(tmp_path: Path) -> None:
    made = Entry(tmp_path, "a" * 32)
    whole = made.write("weights-0001", b"weights")
    assert made.read("weights-0001") == b"weights"
    for content in (b"", b"weight", b"wEights"):
        whole.write_bytes(content)
        assert made.read("weights-0001") is None
        assert not whole.exists()
        assert made.write("weights-0001", b"weights") == whole
    # The same bytes of another entry, or under another name.
    other = Entry(tmp_path, "b" * 32)
    other.folder.mkdir()
    shutil.copy(whole, other.folder)
    assert other.read("weights-0001") is None
    shutil.copy(whole, whole.with_name(whole.name.replace("0001", "0002")))
    assert made.read("weights-0002") is None
    assert made.read("weights-0001") == b"weights"


def test_a_folder_that_holds_other_things_does_not_become_a_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "letter").write_text("")
    with pytest.raises(ConfigError, match=r"store\.dir="):
        open_store(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter"]
    for folder in tmp_path, tmp_path / "none":
        assert main(["prune", "--dir", str(folder), "--max-gb", "0"]) == 2
        assert f"--dir={folder} is no store" in capsys.readouterr().err
    open_store(tmp_path / "new")
    (tmp_path / "new" / "letter").write_text("")
    open_store(tmp_path / "new")


def test_listing_names_size_age_and_users(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = entry(tmp_path / "store", "a", 2_000_000, 3)
    run_folder(tmp_path / "sweep" / "0_abcdef", "completed", old)
    grow_old(old, 3)
    assert main(["list", "--dir", str(tmp_path / "store")]) == 0
    out = capsys.readouterr().out
    for text in (old.key[:12], "2.0", "3.0", "sweep/0_abcdef", "1 trajectories"):
        assert text in out


def test_pruning_takes_the_oldest_and_leaves_what_unfinished_runs_need(tmp_path: Path) -> None:
    store = tmp_path / "store"
    made = {
        name: entry(store, name, 1000, age) for name, age in zip("abcd", (8, 7, 6, 1), strict=True)
    }
    run_folder(tmp_path / "unfinished", None, made["a"])
    run_folder(tmp_path / "finished", "completed", made["b"])
    grow_old(made["a"], 8)
    grow_old(made["b"], 7)
    prune = ["prune", "--dir", str(store)]
    assert main([*prune, "--max-days", "5", "--dry-run"]) == 0
    assert len(stored(store)) == 4
    assert main([*prune, "--max-gb", "3.1e-6"]) == 0
    assert stored(store) == {made[name].key for name in "acd"}
    assert main([*prune, "--max-days", "5"]) == 0
    assert stored(store) == {made[name].key for name in "ad"}
    assert main([*prune, "--max-gb", "0"]) == 0
    assert stored(store) == {made["a"].key}


def test_pruning_touches_nothing_but_entries_and_follows_no_link(tmp_path: Path) -> None:
    store = tmp_path / "store"
    old = entry(store, "a", 10, 9)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "letter").write_text("")
    (store / ("b" * 32)).symlink_to(tmp_path / "elsewhere")
    (store / ("c" * 32)).write_text("a file")
    (store / "letter").write_text("")
    (store / "folder" / ("d" * 32)).mkdir(parents=True)
    (old.folder / "link").symlink_to(tmp_path / "elsewhere")
    before = set(store.iterdir())
    assert main(["prune", "--dir", str(store), "--max-gb", "0"]) == 0
    assert set(store.iterdir()) == before - {old.folder}
    assert (tmp_path / "elsewhere" / "letter").exists()


def test_who_may_come_back_for_an_entry(tmp_path: Path) -> None:
    def needed(name: str, status: str | None, seen: bool = True) -> bool:
        kept = entry(tmp_path / "store", name, 10, 1)
        folder = run_folder(tmp_path / name / "0_abcdef", status, kept)
        if not seen:
            shutil.rmtree(folder)
        return kept.is_needed()

    assert not needed("completed", "completed")
    assert not needed("failed", "failed")
    assert needed("running", None)
    assert needed("interrupted", "interrupted")
    assert not needed("gone", None, seen=False)
    # A sweep whose other job has not begun.
    jobs = [SweepJob(folder=name, overrides=[]) for name in ("0_abcdef", "1_abcdef")]
    write_record(tmp_path / "sweep", SweepRecord(jobs=jobs))
    write_record(tmp_path / "sweep/1_abcdef", RunRecord(state=RunState.waiting))
    assert needed("sweep", "completed")
    write_record(tmp_path / "sweep/1_abcdef", RunRecord(state=RunState.completed))
    assert not needed("sweep", "completed")


def test_pruning_leaves_an_entry_that_is_being_written(tmp_path: Path) -> None:
    busy = entry(tmp_path, "a", 10, 9)
    assert busy.lock()
    assert main(["prune", "--dir", str(tmp_path), "--max-gb", "0"]) == 0
    assert busy.names("state")
    busy.unlock()


# ---------------------------------------------------------------------------------------------
# SIGKILL


def start(folder: Path, store: Path) -> Any:
    """A run in a process of its own, as train.py would make it."""
    settings = config(*RUN, f"store.dir={store}", "checkpoint_every_s=0.02")
    process = multiprocessing.get_context("fork").Process(target=run, args=(settings, folder))
    process.start()
    return process


def finished_files(store: Path) -> dict[Path, bytes]:
    """Every file of the trajectories whose selected epoch has been evaluated: those that ended."""
    return {
        path: path.read_bytes()
        for exits in store.glob("*/exits-*")
        for path in exits.parent.iterdir()
        if path.name.split("-")[0] in ("epoch", "weights", "exits")
    }


def test_killed_at_random_moments_is_the_uninterrupted_run(tmp_path: Path) -> None:
    began = time.monotonic()
    process = start(tmp_path / "whole", tmp_path / "a")
    process.join()
    assert process.exitcode == 0
    length = time.monotonic() - began
    whole, killed, store = tmp_path / "whole", tmp_path / "killed", tmp_path / "b"
    expected = read_record(whole).phases
    assert len(expected) == 4

    draw = random.Random(0)
    kills = 0
    for number in range(int(os.environ.get("PROGLAYER_TEST_KILLS", "10"))):
        before = finished_files(store)
        process = start(killed, store)
        process.join(draw.uniform(0, 0.7 * length))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        after = finished_files(store)
        assert {path: after.get(path) for path in before} == before
        if (killed / "run.json").exists() and read_record(killed).state is RunState.completed:
            assert read_record(killed).phases == expected
            (killed / "run.json").unlink()
            store = tmp_path / f"b{number}"
    process = start(killed, store)
    process.join()
    assert process.exitcode == 0
    assert kills
    assert read_record(killed).phases == expected
    one, two = ((folder / "weights.safetensors").read_bytes() for folder in (whole, killed))
    assert one == two
    # The optimizer's state as well, where one was left at the end of a phase: who is killed after
    # the phase's last epoch was recorded, and before its state, leaves one from within that epoch.
    one, two = ({p.name for p in s.glob("*/state-*-000000.*")} for s in (tmp_path / "a", store))
    assert len(one) == 4
    assert two <= one
