"""What a start leaves behind, and what a sweep says and does before and after its jobs."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from omegaconf import ListConfig

from proglayer.config import ConfigError, DataConfig
from proglayer.console import LogFile
from proglayer.data.corpus import Corpus, Notify, open_corpus
from proglayer.files import sole_writer
from proglayer.launch.job import train as train_command
from proglayer.launch.sweep import expand

from ..helpers import (
    ROOT,
    SHORT,
    Command,
    at_work,
    contents,
    experiments,
    is_running,
    results,
    start,
    until,
)

# One epoch of a run that takes a moment.
QUICK = (*SHORT, "phase.max_epochs=1")


@pytest.mark.parametrize("given", ["plan=true", "model.num_heads=3", "data.samples=1000000"])
def test_a_start_that_trains_nothing_takes_away_only_what_it_made(
    train: Command, tmp_path: Path, given: str
) -> None:
    (tmp_path / "other.log").write_text("a user's own")
    train(*QUICK[1:], given, "hydra.run.dir=.")
    assert list(contents(tmp_path)) == ["other.log"]
    # Nor does it take a folder that was there and empty.
    (tmp_path / "empty").mkdir()
    train(*QUICK[1:], given, "hydra.run.dir=empty")
    train(*QUICK[1:], given, "hydra.run.dir=new")
    assert (tmp_path / "empty").is_dir()
    assert not (tmp_path / "new").exists()


def test_a_plan_needs_no_folder_that_can_be_written(train: Command) -> None:
    done = train(*QUICK, "plan=true", "hydra.run.dir=/proc/nowhere")
    assert (done.status, done.err) == (0, "")
    assert "1 initial" in done.out


def test_an_error_that_nobody_foresaw_leaves_no_folder_of_a_run_that_did_not_begin(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("proglayer.run.run.run", fails)
    with pytest.raises(ZeroDivisionError):
        train(*QUICK, "hydra.run.dir=run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("jobs", [(), ("-m", "seed=1,2")])
def test_a_command_whose_output_nobody_reads_goes_on_and_says_so(
    tmp_path: Path, jobs: tuple[str, ...]
) -> None:
    command = [sys.executable, str(ROOT / "train.py"), *jobs, *QUICK]
    with subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    broken = "warning: the output cannot be written any more (Broken pipe): going on without it\n"
    assert (process.returncode, said) == (0, broken)
    assert {r["state"] for r in results(tmp_path)} == {"completed"}
    assert len(results(tmp_path)) == (2 if jobs else 1)


def test_jobs_of_joblib_store_their_state_when_stopped_and_are_skipped_once_complete(
    train: Command, tmp_path: Path
) -> None:
    pytest.importorskip("joblib")
    jobs = (
        *SHORT, "phase=from_scratch", "phase.max_epochs=40", "phase.patience=40", "seed=1,2,3",
        "hydra.sweep.dir=s", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2",
    )  # fmt: skip
    process = start(tmp_path, "-m", *jobs)
    until(lambda: len(at_work(tmp_path / "s")) == 2, process)
    # A terminal tells every process of the command, `kill` only the first: so one worker is told by
    # both, the other by the first process alone.
    worker, _ = at_work(tmp_path / "s").values()
    assert worker != process.pid
    os.kill(worker, signal.SIGINT)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "Traceback" not in out
    assert [r["reason"] for r in results(tmp_path / "s")] == ["stopped by SIGINT"] * 2
    assert "2 interrupted, 1 waiting" in out
    process = start(tmp_path, "-m", *jobs)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 0, out
    records = results(tmp_path / "s")
    assert [r["state"] for r in records] == ["completed"] * 3
    assert all(r["phases"][0]["work"]["epochs_reused"] >= 1 for r in records[:2])
    # Threads that the launcher shared out are no other setting.
    assert "3 jobs in s, 3 finished before" in train("-m", *jobs).out


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGKILL"])
def test_workers_of_joblib_store_their_state_whatever_ends_the_command(
    tmp_path: Path, name: str
) -> None:
    pytest.importorskip("joblib")
    jobs = (
        *SHORT, "phase=from_scratch", "phase.max_epochs=400", "phase.patience=400", "seed=1,2,3",
        "hydra.sweep.dir=s", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2",
    )  # fmt: skip
    process = start(tmp_path, "-m", *jobs)
    until(lambda: len(at_work(tmp_path / "s")) == 2, process)
    workers = [*at_work(tmp_path / "s").values()]
    process.send_signal(getattr(signal, name))
    # The pipe of its output is closed only once its workers have ended, too.
    out, _ = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if name == "SIGKILL" else 130), out
    assert not list(filter(is_running, workers))
    stopped_by = "SIGTERM" if name == "SIGKILL" else name
    assert [r["reason"] for r in results(tmp_path / "s")] == [f"stopped by {stopped_by}"] * 2
    assert [r["state"] for r in results(tmp_path / "s")] == ["interrupted"] * 2


def test_a_folder_has_one_writer(train: Command, tmp_path: Path) -> None:
    for setting, jobs in ("hydra.run.dir", ()), ("hydra.sweep.dir", ("-m", "seed=1,2")):
        (folder := tmp_path / setting).mkdir()
        with sole_writer(folder, setting), pytest.MonkeyPatch.context() as patch:
            patch.setattr("proglayer.launch.job.LOCK_WAIT_S", 0)
            done = train(*jobs, *QUICK, f"{setting}={folder}")
        assert done.status == 1
        assert f"{setting}={folder}: another command is at work in this folder" in done.err
        if jobs:
            assert not list(folder.rglob("run.json"))
        else:
            assert not list(folder.iterdir())


def test_settings_edited_while_jobs_of_joblib_wait_change_none(tmp_path: Path) -> None:
    pytest.importorskip("joblib")
    rates = tmp_path / "mine/lr/mine.yaml"
    rates.parent.mkdir(parents=True)
    rates.write_text((ROOT / "conf/lr/reduced.yaml").read_text())
    process = start(
        tmp_path, "-m", "--config-dir", "mine", "lr=mine", *QUICK, "seed=range(1,5)",
        "hydra.sweep.dir=s", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2",
    )  # fmt: skip
    until(lambda: at_work(tmp_path / "s"), process)
    # Half done: no job could be composed from this.
    rates.write_text(rates.read_text().replace("factor:", "factors:"))
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 0, out
    assert [r["config"]["lr"]["base"] for r in results(tmp_path / "s")] == [1e-3] * 4


def test_a_device_that_is_not_here_ends_no_sweep_whose_jobs_run_elsewhere(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from hydra.core.plugins import Plugins

    Plugins.instance()  # loads the launcher's module a second time
    from hydra_plugins.proglayer_engines import ProglayerBasicLauncher

    submitted: list[list[str]] = []

    def submit(_: object, job_overrides: list[list[str]], initial_job_idx: int) -> list[JobReturn]:
        submitted.extend(job_overrides)
        return [JobReturn(status=JobStatus.COMPLETED) for _ in job_overrides]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ProglayerBasicLauncher, "launch", submit)
    jobs = ("-m", *QUICK, "seed=1,2", "device=cuda", "hydra.sweep.dir=s")
    here = train(*jobs)
    assert here.err.startswith("error: device=cuda is not available here")
    assert not submitted
    assert not (tmp_path / "s").exists()
    monkeypatch.setattr(ProglayerBasicLauncher, "jobs_run_elsewhere", True, raising=False)
    assert "what is stored for the machines that run them is not known here" in train(*jobs).out
    assert len(submitted) == 2


def test_a_sweep_counts_as_shared_what_is_trained_once(train: Command, tmp_path: Path) -> None:
    done = train("-m", *QUICK, "freeze=existing,none", "hydra.sweep.dir=s")
    assert "4 phases planned: 3 distinct phases, 0 of them stored" in done.out
    work = [phase["work"] for record in results(tmp_path / "s") for phase in record["phases"]]
    assert sum(bool(w["epochs_trained"]) for w in work) == 3


def test_problems_of_every_kind_in_every_job_are_told_at_once(
    train: Command, tmp_path: Path
) -> None:
    done = train(
        "-m", *QUICK, "seed=soon,1", "growth=random,clone", "lr.base=1e-3,-1", "hydra.sweep.dir=s"
    )
    assert done.status == 1
    lines = done.err.splitlines()
    for message in (
        "seed=soon should be a valid integer",
        "growth has no choice clone",
        "lr.base=-1 should be greater than 0",
    ):
        assert sum(message in line for line in lines) == 1, done.err
    assert all(line.startswith("error: ") for line in lines)
    assert not (tmp_path / "s").exists()


def test_a_file_that_cannot_be_read_is_not_called_unwritable(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert train_command(lambda: Path("nowhere/at-all").read_text()) == 1
    assert capsys.readouterr().err.startswith(
        "error: cannot read or write nowhere/at-all (No such file or directory): if results go"
    )


def test_a_full_disk_costs_the_log_one_line_on_the_screen(
    capsys: pytest.CaptureFixture[str],
) -> None:
    handler = LogFile("/dev/full")
    for number in range(3):
        handler.handle(logging.makeLogRecord({"msg": f"line {number}"}))
    with contextlib.suppress(OSError):
        handler.close()
    assert capsys.readouterr().err == (
        "warning: /dev/full cannot be written (No space left on device): "
        "lines of the log are lost\n"
    )


def test_a_log_holds_no_colours(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert train(*QUICK, "hydra.run.dir=run").status == 0
    assert "\x1b" not in (tmp_path / "run/train.log").read_text()


@pytest.mark.parametrize(
    ("end", "status", "reported"),
    [(ConfigError("the launcher gave up"), 1, True), (KeyboardInterrupt(), 130, False)],
)
def test_a_sweep_whose_launcher_fails_leaves_a_report_and_a_stopped_one_none(
    train: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    end: BaseException,
    status: int,
    reported: bool,
) -> None:
    from proglayer.launch import sweep

    launch = sweep.launch

    def launch_one(sweeper: Sweeper, listed: Any, jobs: list[Any], at_once: int | None) -> None:
        launch(sweeper, listed, jobs[:1], at_once)
        raise end

    monkeypatch.setattr(sweep, "launch", launch_one)
    done = train("-m", *QUICK, "report=true", "seed=1,2", "hydra.sweep.dir=s")
    assert done.status == status
    assert "1 completed, 1 waiting" in done.out
    assert (tmp_path / "s/report/index.html").exists() == reported


def test_a_long_preparation_of_the_corpus_is_told_before_the_jobs_are_planned(
    train: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(data: DataConfig, notify: Notify) -> Corpus:
        notify("counting words")
        return open_corpus(data)

    monkeypatch.setattr("proglayer.data.corpus.open_corpus", slowly)
    monkeypatch.setattr("proglayer.launch.sweep.open_corpus", slowly)
    for given in (["seed=1"], ["-m", "seed=1,2"]):
        progress, planned = train(*given, *QUICK, "plan=true").out.split("\n", 1)
        assert progress.endswith("counting words")
        # Of two jobs with one corpus, once.
        assert "counting words" not in planned


def expanded(*arguments: str, **settings: Any) -> list[str]:
    """The jobs of a sweep with these settings, by their overrides."""
    asked: dict[str, Any] = {"params": None, "pairs": [], "blocks": [], "filter": None}
    context = SimpleNamespace(config_loader=None)
    sweeper: Any = SimpleNamespace(hydra_context=context, **asked | settings)
    return [" ".join(job) for job in expand(sweeper, list(arguments))]


SWEPT = ("data.samples=64", "initial_layers=1,2,3", "model=standard,deep_supervision")


def test_blocks_are_several_sweeps_in_one() -> None:
    blocks = [
        {"model.dim": "8,16", "seed": "1,2"},
        {"initial_layers": 3, "model.dim": 8, "seed": 1},
        {"model.dim": 8, "seed": "1,3"},  # one of these is there already
    ]
    only = {"params": {"initial_layers": 2}, "blocks": blocks}
    assert expanded("added_layers=1", **only, filter="seed == 1 or model.dim == 8") == [
        "initial_layers=2 model.dim=8 seed=1 added_layers=1",
        "initial_layers=2 model.dim=8 seed=2 added_layers=1",
        "initial_layers=2 model.dim=16 seed=1 added_layers=1",
        "initial_layers=3 model.dim=8 seed=1 added_layers=1",
        "initial_layers=2 model.dim=8 seed=3 added_layers=1",
    ]
    with pytest.raises(ConfigError, match="blocks gives seed, and so does the command line"):
        expanded("seed=1", **only)
    with pytest.raises(ConfigError, match="seed is a list"):
        expanded(blocks=[{"seed": ListConfig([1, 2])}])


def test_paired_values_go_together_in_the_blocks_that_have_them() -> None:
    pairs = [["seed", "initial_layers"]]
    # In the place of the first of them.
    given = ("model=a,b", "seed=1,2", "added_layers=1", "initial_layers=2,3")
    assert expanded(*given, pairs=pairs) == [
        f"model={model} seed={n} initial_layers={n + 1} added_layers=1"
        for model in "ab"
        for n in (1, 2)
    ]
    blocks = [{"seed": "1,2", "initial_layers": "2,3"}, {"added_layers": "1,2,3"}]
    assert len(expanded(pairs=pairs, blocks=blocks)) == 5
    for wrong, problem in (
        ([["seed", "lr.base"]], "names lr.base, which has no values here"),
        ([["seed", "model", "initial_layers"]], "model has 3, initial_layers has 2"),
        ([["seed", "initial_layers"], ["initial_layers", "added_layers"]], "layers twice: put"),
    ):
        with pytest.raises(ConfigError, match=f"^hydra.sweeper.pairs .*{problem}"):
            expanded("model=a,b,c", *given[1:], pairs=wrong)


def test_the_founding_study_is_one_sweep(train: Command) -> None:
    founding = ("-m", "plan=true", "hydra/sweeper=founding", *SHORT)
    named = re.compile(r"^\d+_[0-9a-f]{6}: experiment=(\S+)", re.MULTILINE)
    titles = named.findall(train(*founding).out)
    assert len(titles) == 2 * len(experiments()) + 4 + 4
    assert set(titles) == {*experiments(), "recipe/loss_by_phase"}
    only = 'hydra.sweeper.filter=\'experiment == "original" and growth == "copy"\''
    assert named.findall(train(*founding, only).out) == ["original"]
