"""What a start leaves behind, and what a sweep says and does before and after its jobs."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from proglayer.config import DataConfig
from proglayer.data.corpus import Corpus, Notify
from proglayer.errors import ConfigError
from proglayer.files import FolderKind, sole_writer
from proglayer.launch.ask import parse, setting
from proglayer.launch.engines import Engine
from proglayer.launch.job import Job
from proglayer.launch.product import ProductSettings, expand, is_kept, values_of

from ..helpers import (
    ROOT,
    SHORT,
    Command,
    at_work,
    contents,
    epochs,
    experiments,
    is_running,
    results,
    start,
    until,
)

# One epoch of a run that takes a moment.
QUICK = (*SHORT, "phase.max_epochs=1")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("plan=true", ""),
        ("model.num_heads=3", "error: model.num_heads=3"),
        ("data.samples=1000000", "error: data.samples=1000000"),
        ("phase.grown.samples=100", "error: phase.grown.samples=100 asks for more windows than"),
    ],
)
def test_a_start_that_trains_nothing_leaves_nothing(
    train: Command, tmp_path: Path, given: str, said: str
) -> None:
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "new"):
        assert train(*QUICK, given, f"hydra.run.dir={folder}").err.startswith(said)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert not list((tmp_path / "empty").iterdir())


def test_a_plan_needs_no_folder_that_can_be_written(train: Command) -> None:
    done = train(*QUICK, "plan=true", "hydra.run.dir=/proc/nowhere")
    assert (done.status, done.err) == (0, "")


@pytest.mark.parametrize("setting", ["hydra.run.dir", "hydra.sweep.dir"])
@pytest.mark.parametrize("name", ["notes.txt", ".hydra", "train.log", "result.json", "linked"])
def test_a_folder_that_is_not_ours_is_refused_before_anything_is_written(
    train: Command, tmp_path: Path, setting: str, name: str
) -> None:
    jobs = ("-m", "seed=1,2") if setting == "hydra.sweep.dir" else ()
    path = tmp_path / "there" / name
    (path if name == ".hydra" else path.parent).mkdir(parents=True)
    if name == "linked":
        path.symlink_to(tmp_path)
    elif name != ".hydra":
        path.write_text("a user's own")
    before = os.listdir(path.parent), contents(path.parent)
    done = train(*jobs, *QUICK, f"{setting}=there")
    assert done.status == 1
    assert f"error: {setting}=" in done.err
    assert (os.listdir(path.parent), contents(path.parent)) == before


def test_a_completed_run_is_not_written_over_whatever_configuration_asks_for_it(
    train: Command, tmp_path: Path
) -> None:
    assert train(*QUICK, "seed=0", "hydra.run.dir=A").status == 0
    before = contents(tmp_path / "A")
    again = ("--config-path", str(tmp_path / "A/.hydra"), "--config-name", "config")
    done = train(*again, "hydra.run.dir=A", "seed=1")
    assert done.status == 1
    assert "holds a completed run with seed=0, not 1: choose another folder" in done.err
    assert contents(tmp_path / "A") == before
    # With the same settings the run is shown as it is stored, and elsewhere it is repeated.
    for folder in ("A", "B"):
        assert train(*again, f"hydra.run.dir={folder}").status == 0
    first, second = results(tmp_path / "A") + results(tmp_path / "B")
    assert first["weights_sha256"] == second["weights_sha256"]
    # A sweep of it is one of ours, too.
    done = train("-m", *again, "seed=1,2", "hydra.sweep.dir=s")
    assert done.status == 0, done.err
    assert [r["config"]["seed"] for r in results(tmp_path / "s")] == [1, 2]


def test_a_path_is_quoted_for_hydra_whatever_its_name(train: Command, tmp_path: Path) -> None:
    name = tmp_path / "a (1), b=c & 'müller' \\" / '"d"'
    done = train(*QUICK, setting("hydra.run.dir", name), setting("store.dir", name / "s"))
    assert done.status == 0, done.err
    (record,) = results(name)
    assert record["config"]["store"]["dir"] == str(name / "s")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["hydra/launcher=joblib"], "is of sweeps: add -m"),
        (["hydra/sweeper=settle"], "is of sweeps: add -m"),
        (["hydra.sweep.dir=s"], "is of sweeps: add -m"),
        (["study=founding"], "is of sweeps: add -m"),
        (["-m", "seed=1,2", "hydra.run.dir=r"], "is of single runs"),
        (["-m", "seed=1,2", "hydra.sweep.subdir=x"], "has no effect"),
        (["-m", "seed=1,2", "hydra.launcher.engine=none"], "no engine none"),
        (["-m", "seed=1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=0"], "n_jobs=0"),
        (["-m", "seed=1,2", "hydra/launcher=joblib", "+hydra.launcher.prefer=x"], "prefer"),
        (["-m", "seed=1,2", "hydra.sweeper.design=none"], "it is one of single, product"),
        (["-m", "seed=1,2", "+hydra.sweeper.nope=1"], "hydra.sweeper.nope"),
        (["-m", "seed=1,2", "hydra.sweeper.pairs=5"], "hydra.sweeper.pairs=5"),
    ],
)
def test_a_setting_of_hydra_that_cannot_work_is_told(
    train: Command, tmp_path: Path, given: list[str], said: str
) -> None:
    done = train(*QUICK, *given)
    assert done.status == 1
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert not list(tmp_path.iterdir())


def test_settings_may_name_what_hydra_knows_of_a_job(train: Command, tmp_path: Path) -> None:
    place = "data.cache_dir=${hydra:runtime.cwd}/corpora"
    done = train("-m", *QUICK, place, "seed=${hydra:job.num}", "threads=1,2", "hydra.sweep.dir=s")
    assert done.status == 0, done.err
    settings = [record["config"] for record in results(tmp_path / "s")]
    assert [each["data"]["cache_dir"] for each in settings] == [str(tmp_path / "corpora")] * 2
    assert [each["seed"] for each in settings] == [0, 1]


def test_a_command_whose_output_nobody_reads_goes_on(tmp_path: Path) -> None:
    process = start(tmp_path, "-m", "seed=1,2", *QUICK)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=200) == 0
    assert [r["state"] for r in results(tmp_path)] == ["completed"] * 2


def test_jobs_of_joblib_store_their_state_when_stopped_and_are_skipped_once_complete(
    train: Command, tmp_path: Path
) -> None:
    pytest.importorskip("joblib")
    jobs = (
        *SHORT, "phase=from_scratch", "phase.max_epochs=40", "phase.patience=40", "seed=1,2,3",
        "precision=auto", "hydra.sweep.dir=s", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2",
    )  # fmt: skip
    process = start(tmp_path, "-m", *jobs)
    until(lambda: len(at_work(tmp_path / "s")) == 2, process)
    # A terminal tells every process of the command, `kill` only the first: so one worker is told by
    # both, the other by the first process alone.
    workers = [*at_work(tmp_path / "s").values()]
    assert process.pid not in workers
    os.kill(workers[0], signal.SIGINT)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert not list(filter(is_running, workers))
    assert "Traceback" not in out
    records = results(tmp_path / "s")
    assert [r["state"] for r in records] == ["interrupted", "interrupted", "waiting"]
    assert [r["reason"] for r in records[:2]] == ["stopped by SIGINT"] * 2
    # What a job runs is fixed from when it was submitted.
    assert records[2]["config"]["seed"] == 3
    process = start(tmp_path, "-m", *jobs)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    records = results(tmp_path / "s")
    assert [r["state"] for r in records] == ["completed"] * 3
    assert all(epochs(r, reused=True)[0] >= 1 for r in records[:2])
    # Threads that the launcher shared out, and a precision that is picked, are no other setting.
    assert "3 jobs in s, 3 finished before" in train("-m", *jobs).out


def test_workers_of_joblib_store_their_state_though_the_command_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("joblib")
    jobs = (
        *SHORT, "phase=from_scratch", "phase.max_epochs=400", "phase.patience=400", "seed=1,2,3",
        "hydra.sweep.dir=s", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2",
    )  # fmt: skip
    process = start(tmp_path, "-m", *jobs)
    until(lambda: len(at_work(tmp_path / "s")) == 2, process)
    workers = [*at_work(tmp_path / "s").values()]
    process.kill()
    # The pipe of its output is closed only once its workers have ended, too.
    process.communicate(timeout=60)
    assert not list(filter(is_running, workers))
    stopped = [(r["state"], r["reason"]) for r in results(tmp_path / "s")[:2]]
    assert stopped == [("interrupted", "stopped by SIGTERM")] * 2


def test_a_folder_has_one_writer(train: Command, tmp_path: Path) -> None:
    for kind, jobs in (FolderKind.run, ()), (FolderKind.sweep, ("-m", "seed=1,2")):
        folder = tmp_path / kind.name
        with sole_writer(folder, kind), pytest.MonkeyPatch.context() as patch:
            patch.setattr("proglayer.launch.job.LOCK_WAIT_S", 0)
            done = train(*jobs, *QUICK, f"{kind.setting}={folder}")
        assert done.status == 1
        assert f"{kind.setting}={folder}: another command is at work in this folder" in done.err
        assert not list(folder.rglob("*.json"))


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
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    assert [r["config"]["lr"]["base"] for r in results(tmp_path / "s")] == [1e-3] * 4


def test_a_device_that_is_not_here_ends_no_sweep_whose_jobs_run_elsewhere(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    submitted: list[Job] = []

    def submit(_: Engine, jobs: Sequence[Job], sweep: Path) -> Iterator[Job]:
        submitted.extend(jobs)
        yield from jobs

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Engine, "run", submit)
    jobs = ("-m", *QUICK, "seed=1,2", "device=cuda", "hydra.sweep.dir=s")
    assert "error: device=cuda is not available here" in train(*jobs).err
    assert not submitted
    monkeypatch.setattr(Engine, "elsewhere", True)
    assert "what is stored for the machines that run them is not known here" in train(*jobs).out
    assert len(submitted) == 2


def test_a_hub_that_cannot_be_reached_is_asked_once(
    train: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[DataConfig] = []

    def fails(data: DataConfig, notify: Notify) -> Corpus:
        asked.append(data)
        raise ConfigError("data.repository=a/b: no answer")

    monkeypatch.setattr("proglayer.run.setup.open_corpus", fails)
    hub = (*QUICK, "data=hub", "data.repository=a/b")
    assert train("-m", *hub, "seed=range(0,5)").err.count("no answer") == len(asked) == 1
    # What is wrong without a text is told before it is asked for.
    sizes = ("model=causal_lm", "model.family=gpt2", "data.tokenizer=words", "data.seq_len=32")
    assert train(*hub, *sizes, "model.max_positions=8").status == 1
    assert len(asked) == 1


def test_problems_of_every_kind_in_every_job_are_told_at_once(
    train: Command, tmp_path: Path
) -> None:
    done = train(
        "-m", *QUICK, "seed=soon,1", "growth=random,clone", "lr.base=1e-3,-1", "hydra.sweep.dir=s"
    )
    assert done.status == 1
    lines = done.err.splitlines()
    for name in ("seed=soon", "growth", "lr.base=-1"):
        assert sum(line.startswith(f"error: {name}") for line in lines) == 1, done.err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("end", "status", "reported"),
    [(ConfigError("the launcher gave up"), 1, True), (KeyboardInterrupt(), 130, False)],
)
def test_a_sweep_whose_engine_fails_leaves_a_report_and_a_stopped_one_none(
    train: Command, tmp_path: Path, end: BaseException, status: int, reported: bool
) -> None:
    run = Engine.run

    def run_one(engine: Engine, jobs: Sequence[Job], sweep: Path) -> Iterator[Job]:
        yield from run(engine, jobs[:1], sweep)
        raise end

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "run", run_one)
        done = train("-m", *QUICK, "report=true", "seed=1,2", "hydra.sweep.dir=s")
    assert done.status == status
    assert "1 completed, 1 waiting" in done.out
    assert (tmp_path / "s/report/index.html").exists() == reported


def expanded(*arguments: str, **settings: Any) -> list[str]:
    """The jobs of a sweep with these settings, by their overrides."""
    return [" ".join(job) for job in expand(ProductSettings(**settings), list(arguments), None)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed=range(0,1000000000)", "gives more than 10,000 values"),
        ("seed=range(5,0)", "gives no value"),
        ("lr.base=interval(0,1)", "it takes hydra/sweeper=optuna to search an interval"),
    ],
)
def test_values_that_cannot_be_run_are_refused_at_once(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        values_of(parse([text])[0])
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("expression", "kept"),
    [
        ("seed < 2 and model != 'a'", [False, True, False]),
        ("not seed in [1, 2]", [True, False, False]),
        ("lr.base == null or -1 < seed < 1", [True, False, True]),
    ],
)
def test_a_filter_holds_or_not_for_each_job(expression: str, kept: list[bool]) -> None:
    jobs = [
        {"seed": 0, "model": "a", "lr.base": 0.1}, {"seed": 1, "model": "b", "lr.base": 0.2},
        {"seed": 2, "model": "a"},
    ]  # fmt: skip
    assert is_kept(expression, jobs) == kept


@pytest.mark.parametrize(
    "expression",
    [
        "'%z' % seed", "'a' * 9999999999 == seed", "9**9**9**9 == seed", "seed.real == 1",
        "open('x')", "[s for s in seed]", "seed <", "sed == 1", "seed < 'a'", "seed > 5",
        "(" * 5000,
    ],
)  # fmt: skip
def test_a_filter_that_computes_or_cannot_be_read_is_refused(expression: str) -> None:
    with pytest.raises(ConfigError, match=r"^hydra.sweeper.filter="):
        is_kept(expression, [{"seed": 0}])


def test_blocks_are_several_sweeps_in_one() -> None:
    blocks = [
        {"model.dim": "8,16", "seed": "1,2"},
        {"initial_layers": 3, "model.dim": 8, "seed": 1},
        {"model.dim": 8, "seed": "1,3"},  # one of these is there already
    ]
    only: dict[str, Any] = {"params": {"initial_layers": 2}, "blocks": blocks}
    assert expanded("added_layers=1", **only, filter="seed == 1 or model.dim == 8") == [
        "initial_layers=2 model.dim=8 seed=1 added_layers=1",
        "initial_layers=2 model.dim=8 seed=2 added_layers=1",
        "initial_layers=2 model.dim=16 seed=1 added_layers=1",
        "initial_layers=3 model.dim=8 seed=1 added_layers=1",
        "initial_layers=2 model.dim=8 seed=3 added_layers=1",
    ]
    with pytest.raises(ConfigError, match="blocks gives seed, and so does the command line"):
        expanded("seed=1", **only)


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
        ([["seed", "lr.base"]], "lr.base has 0"),
        ([["lr.base", "optimizer.eps"]], "lr.base has 0"),
        ([["model", "model"]], "model has 3"),
        ([["seed", "model", "initial_layers"]], "model has 3 values, initial_layers has 2"),
        ([["seed", "initial_layers"], ["initial_layers", "added_layers"]], "initial_layers has 0"),
    ):
        with pytest.raises(ConfigError, match=f"^hydra.sweeper.pairs.*{problem}"):
            expanded("model=a,b,c", *given[1:], pairs=wrong)


def test_the_founding_study_is_one_sweep(train: Command) -> None:
    founding = ("-m", "plan=true", "study=founding", *SHORT)
    named = re.compile(r"^\d+_[0-9a-f]{6}: experiment=(\S+)", re.MULTILINE)
    titles = named.findall(train(*founding).out)
    assert len(titles) == 2 * len(experiments()) + 4 + 4
    assert set(titles) == {*experiments(), "recipe/loss_by_phase"}
    only = 'hydra.sweeper.filter=\'experiment == "original" and growth == "copy"\''
    assert named.findall(train(*founding, only).out) == ["original"]
