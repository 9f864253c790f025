"""Files of a user's that lie where commands write: each is left as it is, and named in a line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from proglayer.config import ConfigError
from proglayer.files import NotOursError
from proglayer.launch import snapshot
from proglayer.launch.slurm import OUTPUTS, _link_outputs
from proglayer.results import load
from proglayer.run.loggers import SUFFIX, TensorBoard
from proglayer.store import record
from proglayer.store.record import ListedJob, RunState, read_jobs, write_jobs

from . import synthetic
from .helpers import SHORT, Command, config


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A sweep of two runs."""
    return synthetic.sweep(tmp_path / "runs", ["original"], ["standard"], seeds=(1, 2))


# --- reports and tables ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["index.html", "report.md", "figures/mine.svg", "tables/runs.csv"])
def test_a_report_goes_into_no_folder_with_files_of_its_names(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    from proglayer.report.__main__ import main

    own = tmp_path / "out" / name
    own.parent.mkdir(parents=True)
    own.write_text("<html><title>My page</title>")
    assert main([str(runs), "-o", str(tmp_path / "out")]) != 0
    err = capsys.readouterr().err
    assert err.startswith(f"error: {tmp_path / 'out' / name.split('/')[0]} is there and was not")
    assert err.count("\n") == 1
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert files == [own]
    assert own.read_text() == "<html><title>My page</title>"


def test_a_report_goes_beside_other_files_and_over_one_that_was_cut_short(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from proglayer.report import write

    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.pdf").write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(write.page, "to_markdown", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write.write_report([runs], out, png=False)
    assert (out / "tables").exists()
    page = write.write_report([runs], out, png=False)
    assert "It is being written" not in page.read_text()
    assert (out / "thesis.pdf").read_text() == "mine"


def test_tables_are_written_over_tables_of_ours_alone(runs: Path, tmp_path: Path) -> None:
    results = load(runs)
    for _ in range(2):
        results.to_csv(tmp_path / "out")
        results.to_parquet(tmp_path / "out")
    for name, content in (("runs.csv", "name,distance\nmarathon,42\n"), ("runs.parquet", "PAR1")):
        (tmp_path / "out" / name).write_text(content)
        with pytest.raises(NotOursError, match=name):
            results.to_csv(tmp_path / "out")
            results.to_parquet(tmp_path / "out")
        assert (tmp_path / "out" / name).read_text() == content
        (tmp_path / "out" / name).unlink()


# --- a sweep's folder -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [("jobs.json", '{"printer": []}'), ("jobs.json", "[1]"), ("multirun.yaml", "lanes: 8\n")],
)
def test_a_sweep_writes_over_no_file_of_its_names(
    train: Command, tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / name).write_text(content)
    done = train("-m", *SHORT, "seed=1,2", "hydra.sweep.dir=s")
    assert done.status == 1
    assert f"s/{name} is there and was not written by proglayer" in done.err
    assert "Traceback" not in done.err
    assert (tmp_path / "s" / name).read_text() == content
    assert not list((tmp_path / "s").glob("*_*"))


def test_the_list_of_jobs_is_written_and_read_in_one_form(tmp_path: Path) -> None:
    jobs = [ListedJob("0_abcdef", ("seed=1", "a='b c'")), ListedJob("7", ())]
    write_jobs(tmp_path, jobs)
    assert read_jobs(tmp_path) == jobs
    write_jobs(tmp_path, [])  # over an earlier list
    assert read_jobs(tmp_path) == []
    write_jobs(tmp_path, jobs)
    plain = json.loads((tmp_path / "jobs.json").read_text())
    assert plain == [{"folder": job.folder, "overrides": list(job.overrides)} for job in jobs]


def test_notes_beside_a_sweep_are_not_taken_for_ours(tmp_path: Path) -> None:
    job = tmp_path / "0_abcdef"
    job.mkdir()
    for path in (tmp_path / record.FAILED_JOB, job / record.HEARTBEAT):
        path.write_text("a note")
    record.note_failed_job(job)
    record.write_heartbeat(job, RunState.running)
    record.remove_heartbeat(job)
    record.mark_lost(job, "it was killed")
    with record.Heartbeat(job):
        pass
    for path in (tmp_path / record.FAILED_JOB, job / record.HEARTBEAT):
        assert path.read_text() == "a note"


def test_files_called_like_what_slurm_prints_stay(tmp_path: Path) -> None:
    class Paths:
        stdout = tmp_path / "submitted" / "7_log.out"
        stderr = tmp_path / "submitted" / "7_log.err"

    folder = tmp_path / "job"
    folder.mkdir()
    (folder / OUTPUTS["stdout"]).write_text("mine")
    (folder / OUTPUTS["stderr"]).symlink_to("earlier")
    _link_outputs(folder, Paths)
    assert (folder / OUTPUTS["stdout"]).read_text() == "mine"
    assert (folder / OUTPUTS["stderr"]).readlink() == Path("../submitted/7_log.err")


def test_two_that_submit_the_same_at_once_share_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = snapshot.files.put_in_place

    def after_another(folder: Path, final: Path) -> None:
        final.mkdir()
        (final / "whole").write_text("")
        real(folder, final)

    with monkeypatch.context() as patch:
        patch.setattr(snapshot.files, "put_in_place", after_another)
        there = snapshot.snapshot_code(tmp_path)
    assert [path.name for path in there.iterdir()] == ["whole"]
    assert list(tmp_path.iterdir()) == [there]


# --- a run's folder and the cache -----------------------------------------------------------------


def test_event_files_of_other_tools_stay(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    others = {tmp_path / f"events.out.tfevents.1700000000.host.17{end}" for end in (".0", "")}
    others |= {tmp_path / f"notes{SUFFIX}"}
    for other in others:
        other.write_bytes(b"another tool's")
    for _ in range(2):
        TensorBoard(tmp_path).end(None)
        assert len(set(tmp_path.iterdir()) - others) == 1
    assert {other.read_bytes() for other in others} == {b"another tool's"}


def test_a_damaged_corpus_with_other_files_in_it_is_not_deleted(tmp_path: Path) -> None:
    from proglayer.data.corpus import open_corpus

    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g h i j\n" * 200)
    data: Any = config("data=text", f"data.files=[{text}]", f"data.cache_dir={tmp_path / 'c'}").data
    data = dataclasses.replace(data, samples=None, validation_samples=None)
    folder = open_corpus(data).folder
    (folder / "thesis.txt").write_text("mine")
    open_corpus(data)
    (folder / "vocabulary.txt").write_text("damaged")
    with pytest.raises(ConfigError, match=r"data\.cache_dir.*other files lie in it"):
        open_corpus(data)
    assert (folder / "thesis.txt").read_text() == "mine"
    # Nor is a folder taken that has the beginning of our name.
    other = folder.with_name(f"{folder.name}.partial-mine")
    other.mkdir()
    (other / "train.npy").write_text("mine")
    (folder / "thesis.txt").unlink()
    assert open_corpus(data).folder == folder
    assert (other / "train.npy").read_text() == "mine"
