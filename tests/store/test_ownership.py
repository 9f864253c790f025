"""A store is a folder that says so; what in it, or in a run's folder, is not ours stays."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from proglayer.config import ConfigError
from proglayer.errors import StoreError
from proglayer.run.experiment import run
from proglayer.store.__main__ import main
from proglayer.store.marker import delete_private, open_store, private_store
from proglayer.store.record import BestEpoch, RunState, read_jobs, read_record
from proglayer.store.stages import MARKER, Stage
from proglayer.training.trainer import Training

from ..helpers import ROOT, SHORT, Command, config, results
from .test_stages import run_folder, stage

EARLIER = ROOT / "tests" / "fixtures" / "earlier" / "stages"
PRUNE = ("prune", "--max-size", "0")
QUICK = (*SHORT, "threads=1")


def tree(folder: Path) -> dict[str, tuple[int, bytes | str]]:
    """Everything below a folder: inode, and content or where a link leads."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = os.readlink(path) if path.is_symlink() else b""
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
        found[path.relative_to(folder).as_posix()] = (path.lstat().st_ino, content)
    return found


def users_own(folder: Path) -> Path:
    """A folder of a user's files, some of which look a little like ours."""
    for name in (
        "corpora/enwik8.tar.gz",
        "corpora/a.b.c",
        "thesis/chapter.final.tex",
        "lock",
        "stage.json",
        "used/1f3a9c2b4d5e.json",
        f"{'a' * 32}/notes.2024.txt",
        f"{'b' * 32}/epoch-0001.{'c' * 32}.json",
        f"{'d' * 32}/stage.{'e' * 32}.json",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}" if name.endswith("json") else "mine")
    (folder / "link").symlink_to(folder / "corpora")
    return folder


# --- what makes a folder a store ------------------------------------------------------------------


@pytest.mark.parametrize("made", [True, False])
def test_a_new_or_empty_folder_becomes_a_store(tmp_path: Path, made: bool) -> None:
    store = tmp_path / "store"
    if made:
        store.mkdir()
    open_store(store)
    marker = json.loads((store / MARKER).read_text())
    assert marker == {"proglayer": "a store of trained phases", "format": 1}
    assert main([*PRUNE, "--dir", str(store)]) == 0


@pytest.mark.parametrize("action", [PRUNE, (*PRUNE, "--dry-run"), ("verify",)])
def test_a_folder_that_is_no_store_is_refused_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], action: tuple[str, ...]
) -> None:
    folder = users_own(tmp_path / "mine")
    before = tree(tmp_path)
    assert main([*action, "--dir", str(folder)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {folder} does not say that it is a store")
    assert err.count("\n") == 1
    assert tree(tmp_path) == before


def test_listing_a_folder_that_is_no_store_names_what_is_foreign(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = users_own(tmp_path / "mine")
    before = tree(tmp_path)
    assert main(["list", "--dir", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "0 stages" in out
    for name in ("corpora", "thesis", "lock", "stage.json", "link", "a" * 32, "b" * 32, "d" * 32):
        assert f"  {folder / name}" in out
    assert tree(tmp_path) == before


def test_a_store_of_an_earlier_version_is_marked_by_a_run_and_by_no_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    shutil.copytree(EARLIER, store)
    # What a deleted stage leaves, what was set aside, and a stage that a run is at.
    (store / ("a" * 32) / "used").mkdir(parents=True)
    (store / ("a" * 32) / "lock").write_text("")
    (store / ".damaged" / ("a" * 32)).mkdir(parents=True)
    assert main(["verify", "--dir", str(store)]) == 2
    before = tree(store)
    open_store(store)
    after = tree(store)
    assert after.pop(MARKER)
    assert after == before
    capsys.readouterr()
    assert main(["verify", "--dir", str(store)]) == 0
    assert capsys.readouterr().out == "4 stages read, 0 damaged files set aside\n"


@pytest.mark.parametrize("spoiled", ["file", "folder", "in a stage", "link", "no description"])
def test_a_folder_with_other_things_is_used_and_not_marked(tmp_path: Path, spoiled: str) -> None:
    store = tmp_path / "store"
    shutil.copytree(EARLIER, store)
    one = min(store.iterdir())
    (tmp_path / "elsewhere").mkdir()
    other = {
        "file": store / "notes.txt",
        "folder": store / "corpora" / "text.tar.gz",
        "in a stage": one / "my.own.json",
    }.get(spoiled)
    if other:
        other.parent.mkdir(exist_ok=True)
        other.write_text("mine")
    elif spoiled == "link":
        other = store / ("f" * 32)
        other.symlink_to(tmp_path / "elsewhere")
    else:
        other = store / ("f" * 32) / f"epoch-0001.{'c' * 32}.json"
        other.parent.mkdir()
        other.write_text("{}")
    before = tree(store)
    open_store(store)
    assert tree(store) == before
    # Once that lies elsewhere, the next run marks the store.
    other.unlink()
    if spoiled == "folder":
        other.parent.rmdir()
    open_store(store)
    assert (store / MARKER).exists()


def test_a_run_adds_to_a_folder_of_other_things_and_touches_none(
    train: Command, tmp_path: Path
) -> None:
    folder = users_own(tmp_path / "mine")
    before = tree(folder)
    done = train(*QUICK, "stages.dir=mine", "hydra.run.dir=run")
    assert done.status == 0, done.err
    after = tree(folder)
    assert {name: after[name] for name in before} == before
    stored = {phase["stage"] for phase in results(tmp_path / "run")[0]["phases"]}
    assert {name.split("/")[0] for name in after.keys() - before} == stored
    assert main([*PRUNE, "--dir", str(folder)]) == 2
    assert tree(folder) == after


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"proglayer": "a store of trained phases", "format": 99}', "of a later version"),
        ('{"name": "shop"}', "does not say that its folder is a store"),
        ("[1]", "does not say that its folder is a store"),
        ("", "does not say that its folder is a store"),
    ],
)
def test_a_marker_of_another_kind_is_refused_by_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    kept = stage(tmp_path, "a", 10, 9)
    (tmp_path / MARKER).write_text(content)
    before = tree(tmp_path)
    for action in (PRUNE, ("verify",)):
        assert main([*action, "--dir", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(StoreError, match=message):
        open_store(tmp_path)
    assert tree(tmp_path) == before
    assert kept.names("state")


# --- what is foreign in a store -------------------------------------------------------------------


def test_nothing_foreign_in_a_store_is_deleted_moved_or_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, elsewhere = tmp_path / "store", tmp_path / "elsewhere"
    ours = [stage(store, name, 10, 9) for name in "abc"]
    run_folder(tmp_path / "run", "completed", ours[0])
    users_own(store)
    # Another store's stage: whole, and reached by a link.
    linked = stage(elsewhere, "linked", 10, 9)
    (store / linked.key).symlink_to(linked.folder)
    # Within stages of ours: names that are nearly ours, links, folders, notes.
    state = ours[0].path("state-0001-000000")
    assert state
    digest = state.name.split(".")[1]
    for name in ("report.v2.pdf", f"state-0001-000000.{digest}.tar", f"X.{digest}.json"):
        (ours[0].folder / name).write_text("mine")
    (ours[0].folder / "used" / "a.b.json").write_text("mine")
    outside = tmp_path / "outside.json"
    outside.write_text("mine")
    (ours[1].folder / f"epoch-0001.{digest}.json").symlink_to(outside)
    (ours[1].folder / f"epoch-0002.{digest}.json").mkdir()
    (ours[2].folder / "used").symlink_to(elsewhere)
    # The description of one stage in the folder of another's name.
    copied = store / ("e" * 32)
    shutil.copytree(ours[1].folder, copied, symlinks=True)
    # One that is damaged, and whose hash nothing in the folder has.
    before = tree(tmp_path)
    mine = {
        name
        for name in before
        if not any(
            Path("store") / made.key / path.name == Path(name)
            for made in ours
            for path in made._files("")
        )
    } - {f"store/{ours[0].key}/used/{path.name}" for path in ours[0].notes._files("")}
    assert main(["verify", "--dir", str(store)]) == 0
    out = capsys.readouterr().out
    assert "3 stages read, 0 damaged" in out
    assert tree(tmp_path).keys() - before.keys() <= {f"store/{o.key}/lock" for o in ours}
    assert main([*PRUNE, "--dir", str(store)]) == 0
    after = tree(tmp_path)
    assert {name: after[name] for name in mine} == {name: before[name] for name in mine}
    assert not any(made._files("") for made in ours)
    assert "store/.damaged" not in after
    for name in ("corpora", linked.key, "e" * 32, f"{ours[0].key}/report.v2.pdf"):
        assert str(store / name) in out
    assert "foreign files and folders, left as they are" in capsys.readouterr().out


def test_a_run_follows_no_link_into_another_folder(tmp_path: Path) -> None:
    store, elsewhere = tmp_path / "store", tmp_path / "elsewhere"
    elsewhere.mkdir()
    open_store(store)
    made = Stage(store, "a" * 32)
    made.folder.symlink_to(elsewhere)
    for act in (lambda: made.lock(0), lambda: made.write_json("stage", {})):
        with pytest.raises(StoreError, match="is a link"):
            act()
    assert made.names("") == []
    made.folder.unlink()
    made.folder.mkdir()
    (made.folder / "lock").symlink_to(tmp_path / "made by a lock")
    with pytest.raises(StoreError, match="left as it is"):
        made.lock(0)
    assert not (tmp_path / "made by a lock").exists()
    (made.folder / "used").symlink_to(elsewhere)
    with pytest.raises(StoreError, match="is a link"):
        made.mark_used(tmp_path / "run")
    # Nor is anything set aside by way of one.
    path = made.write("epoch-0001", "json", b"{}")
    path.write_bytes(b"[]")
    (store / ".damaged").symlink_to(elsewhere)
    assert made.read("epoch-0001") is None
    assert path.read_bytes() == b"[]"
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("change", ['"format": 7,', "cut short"])
def test_a_description_that_is_changed_is_damage_where_other_files_prove_the_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    proven = stage(tmp_path, "a", 10, 9)
    path = proven.path("stage")
    assert path
    whole = path.read_text()
    path.write_text(whole[:-3] if change == "cut short" else "{" + change + whole[1:])
    assert main([*PRUNE, "--dir", str(tmp_path)]) == 0
    assert proven.names("") == ["stage", "state-0001-000000"]
    assert main(["verify", "--dir", str(tmp_path)]) == 1
    assert "1 stages read, 1 damaged" in capsys.readouterr().out
    assert proven.names("") == ["state-0001-000000"]
    # Where nothing proves it, it is nobody's.
    state = proven.path("state-0001-000000")
    assert state
    state.write_bytes(b"other bytes")
    assert main(["verify", "--dir", str(tmp_path)]) == 0
    assert "1 foreign" in capsys.readouterr().out
    assert state.read_bytes() == b"other bytes"


# --- unfinished sweeps ----------------------------------------------------------------------------


def test_pruning_keeps_what_waiting_jobs_of_a_real_sweep_need(
    train: Command, tmp_path: Path
) -> None:
    jobs = ("-m", *QUICK, "added_layers=1,3", "hydra.sweep.dir=s")
    assert train(*jobs).status == 0
    first, second = results(tmp_path / "s")
    shared, own = (phase["stage"] for phase in first["phases"])
    # As it was before the second job began.
    waiting = next((tmp_path / "s").glob("1_*"))
    assert [job.folder for job in read_jobs(tmp_path / "s")][1] == waiting.name
    shutil.rmtree(waiting)
    store = tmp_path / "stages"
    assert main([*PRUNE, "--dir", str(store)]) == 0
    assert Stage(store, shared).names("epoch-")
    assert Stage(store, own).names("epoch-")
    assert train(*jobs).status == 0
    again = results(tmp_path / "s")[1]
    assert again["phases"][0]["work"]["epochs_trained"] == 0
    assert main([*PRUNE, "--dir", str(store)]) == 0
    assert not Stage(store, shared).names("")
    assert second["phases"][0]["stage"] == shared


# --- runs that reuse nothing ----------------------------------------------------------------------


def test_a_run_that_reuses_nothing_leaves_a_folder_called_stages(
    train: Command, tmp_path: Path
) -> None:
    users_own(tmp_path / "run" / "stages")
    before = tree(tmp_path / "run" / "stages")
    assert train(*QUICK, "reuse=false", "hydra.run.dir=run").status == 0
    assert tree(tmp_path / "run" / "stages") == before
    assert not list((tmp_path / "run").glob(".stages*"))


def test_a_run_that_reuses_nothing_leaves_the_store_that_lies_in_its_folder(
    train: Command, tmp_path: Path
) -> None:
    assert train(*QUICK, "stages.dir=X/stages", "hydra.run.dir=first").status == 0
    before = tree(tmp_path / "X")
    assert before
    given = ("stages.dir=X/stages", "hydra.run.dir=X", "reuse=false")
    assert train(*QUICK, *given).status == 0
    after = tree(tmp_path / "X")
    assert {name: after[name] for name in before} == before
    assert not list((tmp_path / "X").glob(".stages*"))


def interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that reuses nothing, stopped in its second epoch; gives its private store."""
    loss = Training.loss

    def told_to_stop(training: Training, *batch: object) -> object:
        if training.epoch == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(training, *batch)  # type: ignore[arg-type]

    folder.mkdir()
    before = set(folder.glob(".stages-*"))
    with monkeypatch.context() as patch:
        patch.setattr(Training, "loss", told_to_stop)
        assert run(config(*QUICK, "reuse=false"), folder).status is RunState.interrupted
    (private,) = set(folder.glob(".stages-*")) - before
    return private


def trained(folder: Path) -> list[tuple[Any, BestEpoch]]:
    record = read_record(folder)
    assert record
    return [(phase.work.epochs_trained, phase.best) for phase in record.phases]


def test_an_interrupted_run_that_reuses_nothing_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(*QUICK, "reuse=false")
    assert run(settings, tmp_path / "whole").status is RunState.completed
    folder = tmp_path / "run"
    private = interrupted(folder, monkeypatch)
    # A user put something beside what is stored, and copied the run's folder.
    (private / "why.txt").write_text("mine")
    shutil.copytree(folder, tmp_path / "copy")
    copied = tree(tmp_path / "copy" / private.name)
    assert run(settings, folder).status is RunState.completed
    whole, on = trained(tmp_path / "whole"), trained(folder)
    assert [best for _, best in on] == [best for _, best in whole]
    assert on[0][0] == whole[0][0] - 1
    assert tree(private).keys() == {"why.txt"}
    # In the copy it trains again, as what lies there was made by another.
    assert run(settings, tmp_path / "copy").status is RunState.completed
    assert trained(tmp_path / "copy")[0][0] == whole[0][0]
    assert tree(tmp_path / "copy" / private.name) == copied


def test_a_private_store_is_nobody_elses(tmp_path: Path) -> None:
    private = private_store(tmp_path / "run")
    assert private_store(tmp_path / "run") == private
    with pytest.raises(StoreError, match=r"private to the run in .*/run.*stages\.dir"):
        open_store(private)
    # One that only looks like it, by its name or its marker, is not taken.
    for name in (".stages-mine", ".stages-0123456789abcdef"):
        (tmp_path / "other" / name).mkdir(parents=True)
        (tmp_path / "other" / name / "letter").write_text("mine")
    shutil.copy(private / MARKER, tmp_path / "other" / ".stages-mine")
    (tmp_path / "other" / ".stages-link").symlink_to(private)
    before = tree(tmp_path / "other")
    delete_private(private_store(tmp_path / "other"))
    assert tree(tmp_path / "other") == before


# --- a run's folder -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("result.json", '{"accuracy": 1.0}'),
        ("metrics.csv", "step,loss\n1,2.0\n"),
        ("weights.safetensors", '\x10\0\0\0\0\0\0\0{"lm_head.weight"'),
    ],
)
def test_a_run_writes_over_no_file_of_a_user(
    train: Command, tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    before = tree(tmp_path)
    done = train(*QUICK, "hydra.run.dir=.")
    assert done.status == 1
    assert done.err.startswith(f"error: {tmp_path / name} is there and was not written by")
    assert "hydra.run.dir" in done.err
    assert done.err.count("\n") == 1
    after = tree(tmp_path)
    assert {path: after[path] for path in before} == before
    with pytest.raises(ConfigError, match="left as it is"):
        run(config(*QUICK), tmp_path)


def test_a_run_in_its_own_folder_writes_over_what_it_left(tmp_path: Path) -> None:
    settings = config(*QUICK, f"stages.dir={tmp_path / 'store'}")
    for damage in (None, "weights.safetensors", "metrics.csv"):
        if damage:
            (tmp_path / "run" / damage).write_text("overwritten")
        assert run(settings, tmp_path / "run").status is RunState.completed
    assert (tmp_path / "run" / "weights.safetensors").stat().st_size > 1000
    # Empty files, as a crash of the machine may leave them, stand in nobody's way.
    for name in ("result.json", "metrics.csv", "weights.safetensors", "heartbeat.json"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
        (tmp_path / "run" / name).write_text("")
    assert run(settings, tmp_path / "run").status is RunState.completed
