"""The store's own command, and runs that are killed at any moment."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proglayer.run.record import (
    RunRecord,
    RunState,
    SweepJob,
    SweepRecord,
    write_record,
    write_sweep,
)
from proglayer.run.run import run
from proglayer.store import __main__ as command
from proglayer.store import stages
from proglayer.store.__main__ import main
from proglayer.store.listing import contents_of, prunable, verify
from proglayer.store.marker import open_store
from proglayer.store.stages import Stage, stage_key

from ..helpers import config

RUN = (
    "data.samples=96",
    "data.validation_samples=32",
    "data.max_vocab=100",
    "model.dim=8",
    "model.num_heads=2",
    "phase.max_epochs=2",
    "phase.batch_size=16",
    "experiment=gradual_unfreezing",
    "threads=1",
)


def stage(
    store: Path, called: str, size: int, age_days: float, parent: Stage | None = None
) -> Stage:
    """A stage in a store, with a state of `size` bytes."""
    description = {
        "called": called,
        "parent": {"key": parent.key, "epoch": 1} if parent else "fresh",
    }
    open_store(store)
    made = Stage(store, stage_key(description))
    made.write_json("stage", description)
    made.write("state-0001-000000", "safetensors", b"x" * size)
    then = time.time() - age_days * 86_400
    for path in made.folder.iterdir():
        os.utime(path, (then, then))
    return made


def run_folder(folder: Path, status: str | None, *stages: Stage) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if status:
        write_record(folder, RunRecord(state=RunState(status)))
    for made in stages:
        times = {path: path.stat().st_mtime for path in made.folder.iterdir()}
        made.mark_used(folder)
        for path in made.folder.rglob("*"):
            then = times.get(path, min(times.values()))
            os.utime(path, (then, then))
    return folder


def test_listing_names_size_age_and_users(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = stage(tmp_path / "store", "a", 2_000_000, 3)
    run_folder(tmp_path / "sweep" / "0_abcdef", "completed", old)
    assert main(["list", "--dir", str(tmp_path / "store")]) == 0
    out = capsys.readouterr().out
    for text in (old.key[:12], "2.0", "3 d", "sweep/0_abcdef", "1 stages"):
        assert text in out


def test_who_reads_a_stage_is_not_among_its_files(tmp_path: Path) -> None:
    kept = stage(tmp_path / "store", "a", 10, 1)
    before = sorted(kept.folder.iterdir())
    runs = [run_folder(tmp_path / f"sweep/{number}_abcdef", "completed", kept) for number in (0, 1)]
    runs[0].joinpath("run.json").unlink()
    # A thousand runs may: each look for a file would list them all.
    assert sorted(kept.folder.iterdir()) == sorted([*before, kept.folder / "used"])
    (listed,), _ = contents_of(tmp_path / "store")
    assert sorted(listed.users) == runs
    assert listed.stage.needed
    note = next((kept.folder / "used").iterdir())
    note.write_bytes(note.read_bytes()[:-1])
    assert len(verify(kept)) == 1
    (listed,), _ = contents_of(tmp_path / "store")
    assert len(listed.users) == 1


def test_verifying_finds_damage_and_sets_it_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = stage(tmp_path, "a", 10, 1), stage(tmp_path, "b", 10, 1)
    assert verify(good) == []
    path = bad.path("state-0001-000000")
    assert path is not None
    path.write_bytes(b"y" * 10)
    assert main(["verify", "--dir", str(tmp_path)]) == 1
    assert "2 stages read, 1 damaged" in capsys.readouterr().out
    assert bad.path("state-0001-000000") is None
    assert main(["verify", "--dir", str(tmp_path)]) == 0


def test_pruning_takes_the_oldest_and_leaves_what_unfinished_runs_need(tmp_path: Path) -> None:
    store = tmp_path / "store"
    root = stage(store, "a", 1000, 9)
    child = stage(store, "b", 1000, 8, parent=root)
    done, free, young = (stage(store, k, 1000, d) for k, d in (("c", 7), ("d", 6), ("e", 1)))
    run_folder(tmp_path / "unfinished", None, child)
    run_folder(tmp_path / "finished", "completed", done)

    def pruned(size: int | None, days: float | None) -> list[str]:
        age = None if days is None else days * 86_400
        found = prunable(contents_of(store)[0], size, age)
        return [kept.description["called"] for kept in found]

    assert pruned(None, 5) == ["c", "d"]
    assert pruned(10**6, None) == []
    total = sum(kept.size for kept in contents_of(store)[0])
    assert pruned(total - 1, None) == ["c"]
    assert pruned(0, None) == ["c", "d", "e"]
    assert main(["prune", "--dir", str(store), "--max-age", "5d", "--dry-run"]) == 0
    assert done.names("")
    assert main(["prune", "--dir", str(store), "--max-age", "5d"]) == 0
    assert not done.names("")
    assert not free.names("")
    assert root.names("")
    assert young.names("")


def test_who_may_come_back_for_a_stage(tmp_path: Path) -> None:
    def needed(name: str, age_days: float, status: str | None, seen: bool = True) -> bool:
        kept = stage(tmp_path / "store", name, 10, age_days)
        folder = run_folder(tmp_path / name / "0_abcdef", status, kept)
        if not seen:
            shutil.rmtree(folder)
        return kept.needed

    assert not needed("completed", 1, "completed")
    assert needed("running", 99, None)
    assert needed("interrupted", 99, "interrupted")
    # What failed, or is on another machine's disk, is waited for, but not for ever.
    assert needed("failed", 29, "failed")
    assert not needed("failed-long-ago", 31, "failed")
    assert needed("elsewhere", 29, None, seen=False)
    assert not needed("gone", 31, None, seen=False)
    # A sweep whose other jobs have not begun.
    jobs = [SweepJob(folder=f"{number}_abcdef", overrides=[]) for number in (0, 1)]
    write_sweep(tmp_path / "sweep", SweepRecord(jobs=jobs))
    assert needed("sweep", 1, "completed")
    write_record(tmp_path / "sweep/1_abcdef", RunRecord(state=RunState.completed))
    assert not needed("sweep", 1, "completed")
    # A list that cannot be read may list any job.
    (tmp_path / "sweep/sweep.json").write_text('{"0_abcdef": []}')
    assert needed("sweep", 1, "completed")


def test_pruning_asks_again_before_it_deletes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = stage(tmp_path / "store", "a", 10, 9)
    chosen = command.prunable

    def then_a_run_begins(*arguments: Any) -> Any:
        found = chosen(*arguments)
        run_folder(tmp_path / "run", None, kept)
        return found

    monkeypatch.setattr(command, "prunable", then_a_run_begins)
    assert main(["prune", "--dir", str(tmp_path / "store"), "--max-size", "0"]) == 0
    assert kept.names("state")


def test_files_that_a_job_replaces_meanwhile_are_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = stage(tmp_path, "a", 10, 1)
    real = Stage.names

    def then_they_go(self: Stage, prefix: str) -> list[str]:
        found = real(self, prefix)
        kept.remove("state-0001-000000")
        return found

    monkeypatch.setattr(Stage, "names", then_they_go)
    assert verify(kept) == []


def test_a_store_of_another_version_is_looked_over_and_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(stages, "FORMAT", 1)
        description = {"format": 1, "parent": "fresh"}
        open_store(tmp_path)
        old = Stage(tmp_path, stage_key(description))
        old.write_json("stage", description)
        run_folder(tmp_path / "run", None, old)
    before = sorted(tmp_path.rglob("*"))
    for action in ("list", "verify"):
        assert main([action, "--dir", str(tmp_path)]) == 0
    assert "1 stages of another version left unread" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    assert old.needed


def test_pruning_leaves_a_stage_that_is_being_written(tmp_path: Path) -> None:
    busy = stage(tmp_path, "a", 10, 9)
    assert busy.lock(0)
    assert main(["prune", "--dir", str(tmp_path), "--max-size", "0"]) == 0
    assert busy.names("state")
    busy.unlock()


@pytest.mark.parametrize(
    "arguments",
    [
        ["prune"],
        ["prune", "--max-size", "much"],
        ["prune", "--max-size", "20"],
        ["prune", "--max-size", "1.2.3GB"],
        ["prune", "--max-age", "30"],
        ["burn"],
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--dir", str(tmp_path)])
    assert end.value.code == 2


def test_a_store_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--dir", str(tmp_path / "none")]) == 2
    assert "--dir" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 0.3 MB; skips where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a file system")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], capture_output=True
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_ends_a_run_that_goes_on_when_there_is_room(
    tmp_path: Path, small_disk: Path
) -> None:
    run_once(tmp_path / "whole", tmp_path / "ample", "standard")
    expected = record(tmp_path / "whole")
    run_once(tmp_path / "run", small_disk / "stages", "standard")
    failed = json.loads((tmp_path / "run/run.json").read_text())
    assert failed["state"] == "failed"
    assert "No space left on device" in failed["reason"]
    assert "make room there or point stages.dir elsewhere" in failed["reason"]
    assert failed["traceback"] is None
    assert 0 < len(failed["phases"]) < len(expected)
    assert not list(small_disk.rglob(".tmp-*"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    run_once(tmp_path / "run", small_disk / "stages", "standard")
    assert record(tmp_path / "run") == expected
    one, two = (tmp_path / r / "weights.safetensors" for r in ("whole", "run"))
    assert one.read_bytes() == two.read_bytes()


# ---------------------------------------------------------------------------------------------
# SIGKILL


def run_once(folder: Path, store: Path, model: str) -> None:
    """A run in a process of its own, as train.py would make it."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = config(*RUN, f"model={model}", f"stages.dir={store}", "checkpoint_every_s=0.02")
    run(settings, folder)


def start(folder: Path, store: Path, model: str) -> Any:
    process = multiprocessing.get_context("fork").Process(
        target=run_once, args=(folder, store, model)
    )
    process.start()
    return process


def record(folder: Path) -> list[dict[str, Any]]:
    """The phases of a run's record, times and the account of who did what apart."""
    phases = json.loads((folder / "run.json").read_text())["phases"]
    for phase in phases:
        for name in ("work", "train_seconds", "evaluation_seconds", "tokens_per_second"):
            del phase[name]
    return phases


def finished_files(store: Path) -> dict[Path, bytes]:
    """Every file of the stages whose selected epoch has been evaluated: those that ended."""
    return {
        path: path.read_bytes()
        for exits in store.glob("*/exits-*")
        for path in exits.parent.iterdir()
        if path.name.split("-")[0] in ("epoch", "weights", "exits")
    }


@pytest.mark.parametrize("model", ["standard", "deep_supervision"])
def test_killed_at_random_moments_is_the_uninterrupted_run(tmp_path: Path, model: str) -> None:
    config(*RUN, f"model={model}", f"stages.dir={tmp_path / 'a'}", "checkpoint_every_s=0.02")
    began = time.monotonic()
    whole = start(tmp_path / "whole", tmp_path / "a", model)
    whole.join()
    assert whole.exitcode == 0
    length = time.monotonic() - began
    expected = record(tmp_path / "whole")
    assert len(expected) == 4

    rng = random.Random(model)
    kills = 0
    store = tmp_path / "b"
    for _ in range(int(os.environ.get("PROGLAYER_TEST_KILLS", "8"))):
        before = finished_files(store)
        process = start(tmp_path / "killed", store, model)
        process.join(rng.uniform(0, length))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        after = finished_files(store)
        assert {path: after.get(path) for path in before} == before
        if (tmp_path / "killed/run.json").exists():
            assert record(tmp_path / "killed") == expected
            (tmp_path / "killed/run.json").unlink()
            store = tmp_path / f"b{kills}"
    last = start(tmp_path / "killed", store, model)
    last.join()
    assert last.exitcode == 0
    assert kills
    assert record(tmp_path / "killed") == expected
    one, two = ((tmp_path / r / "weights.safetensors").read_bytes() for r in ("whole", "killed"))
    assert one == two
    # The optimizer's state as well, where one was left at the end of a phase: who is killed after
    # the phase's last epoch was recorded, and before its state, leaves one from within that epoch.
    ends = "*/state-*-000000.*"
    states = (
        {path.name for path in (tmp_path / "a").glob(ends)},
        {path.name for path in store.glob(ends)},
    )
    assert len(states[0]) == 4
    assert states[1] <= states[0]


def test_what_a_note_or_a_parent_should_not_hold_hides_no_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    junk: list[object] = [{}, [], True, 1, "", "\0", None, {"key": {}}, {"key": []}]
    for number, wrong in enumerate(junk):
        description = {"number": number, "parent": wrong, "format": stages.FORMAT}
        stage = Stage(store, stage_key(description))
        stage.write_json("stage", description)
        stage.notes.write_json(f"{number:012x}", {"run": wrong})
    open_store(store)
    for action in (["list"], ["verify"], ["prune", "--max-size", "1GB"]):
        assert main([*action, "--dir", str(store)]) == 0
        assert not capsys.readouterr().err
    assert main(["list", "--dir", str(store)]) == 0
    assert f"{len(junk)} stages" in capsys.readouterr().out
