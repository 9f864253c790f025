"""What the command line's overrides are refused for, and what a user is told to write instead."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from proglayer.errors import ConfigError
from proglayer.launch.overrides import check_arguments, unreadable

from ..helpers import ROOT, SHORT, Command, config, results

QUICK = (*SHORT, "phase.max_epochs=1")


@pytest.fixture(autouse=True)
def script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py")])


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("+foo=1", "there is no setting foo"),
        ("++model.dimm=8", "there is no setting model.dimm; did you mean model.dim?"),
        ("+model.dimm=8", "there is no setting model.dimm; did you mean model.dim?"),
        ("+learning_rate=8", "there is no setting learning_rate; did you mean lr.base?"),
        ("+seed=3", "+seed=3: seed is there already: write seed=3"),
        ("+experiment=original", "experiment is there already: write experiment=original"),
        ("~seed", "~seed: nothing can be deleted"),
        ("~seed=42", "~seed=42: nothing can be deleted"),
        ("~model.dim", "nothing can be deleted"),
        ("~experiment", "nothing can be deleted"),
        ("model@other=standard", "a group cannot be put elsewhere: write model=standard"),
        ("+model@model.x=standard", "a group cannot be put elsewhere: write model=standard"),
        ("model=null", "model takes one of its choices (causal_lm, deep_supervision, standard)"),
        ("phase=[]", "phase takes one of its choices (from_scratch, "),
        ("phase=7", "phase takes one of its choices (from_scratch, "),
        ("lr=[{}]", "lr takes one of its choices"),
        ("lr=1e-3", "lr takes one of its choices (constant, reduced, split), or lr.base=0.001"),
        ("logger=null", "for no logger write 'logger=[]'"),
        ("experiment=null", "for no experiment leave it out"),
        ("experiment=conf/experiment/original.yaml", "write experiment=original"),
        ("experiment=original.yaml", "write experiment=original"),
        ("freeze={}", "freeze={} sets nothing: leave it out"),
        ("local=null", "conf/local/default.yaml is read wherever there is one"),
        ("hydra.launcher=joblib", "chosen with a slash: hydra/launcher=joblib"),
        ("hydra.sweeper=optuna", "chosen with a slash: hydra/sweeper=optuna"),
        ("seed=1,2 seed=3,4", "seed is given twice (seed=1,2, seed=3,4): keep one"),
        ("seed=1,2 seed=3", "seed is given twice (seed=1,2, seed=3): keep one"),
        ("lr.factor={new:0.5} lr.factor={head:0.7}", "lr.factor is given twice"),
        ("model=standard model=deep_supervision", "model is given twice"),
        ("-m --cfg job", "-m shows nothing of --cfg or --info"),
        ("--verbose", "there is no option --verbose"),
    ],
)
def test_what_would_have_no_effect_or_two_meanings_is_refused(given: str, line: str) -> None:
    for arguments in (shlex.split(given), ["seq=1", *shlex.split(given)]):
        with pytest.raises(ConfigError) as refused:
            check_arguments(arguments)
        assert line in str(refused.value)


@pytest.mark.parametrize(
    "given",
    [
        "seed=1 seed=2", "++seed=3", "logger=[]", "logger=[mlflow,tensorboard]", "lr={base:1}",
        "+hydra.job.env_set.A=1", "hydra/launcher=joblib", "model=standard,deep_supervision",
        "experiment=glob(*)", "lr.factor={new:0.5}", "data.files=['a=1.txt']", "~hydra.callbacks",
    ],
)  # fmt: skip
def test_what_has_a_meaning_is_left_alone(given: str) -> None:
    assert check_arguments(given.split()) == given.split()


def test_options_may_stand_anywhere() -> None:
    assert check_arguments(["seed=1", "-m", "lr.base=2", "--config-dir", "x"]) == [
        "-m", "--config-dir", "x", "seed=1", "lr.base=2"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--resolve"], "--resolve flag can only be used"),
        (["--run", "-m"], "Only one of --run, --multirun"),
        (["--shell-completion"], "Expecting one subcommand"),
        (["--experimental-rerun=words.pickle"], "--experimental-rerun is not taken"),
        (["--config-dir=nowhere"], "not found"),
    ],
)
def test_options_that_mean_nothing_are_refused_in_a_line(
    train: Command, options: list[str], said: str
) -> None:
    done = train(*options, "plan=true")
    assert done.status == 1
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert said in done.err


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("data.files=[a=1.txt]", 'data.files=["a=1.txt"]'),
        ("data.files=[~/a.txt,b=2]", 'data.files=["~/a.txt","b=2"]'),
        ("data.path=~/x", 'data.path="~/x"'),
        ("data.path=a=b", 'data.path="a=b"'),
        ("seed==1", "seed=1"),
        ("'seed=1'", "seed=1"),
        ("added_layers=1,", "added_layers=1"),
        ("model.exit_weights=(1,2)", "model.exit_weights=[1,2]"),
        ("freeze.steps[0].existing=1", "freeze.steps.0.existing=1"),
    ],
)
def test_a_hint_for_what_cannot_be_read_can_be_composed(typed: str, hint: str) -> None:
    assert unreadable(typed) == f"{typed}: Hydra cannot read this; write {shlex.quote(hint)}"
    config(hint)


@pytest.mark.parametrize("typed", ["seed", "=", "seed=", "existing: 1"])
def test_what_is_no_setting_at_all_is_told_the_form_of_one(typed: str) -> None:
    with pytest.raises(ConfigError, match="name=value, without blanks"):
        check_arguments([typed, "=", "1"])


def test_long_and_many_overrides_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="1,000,010 characters"):
        check_arguments(["data.path=" + "a" * 1_000_000])
    with pytest.raises(ConfigError, match="4000 overrides are more than 500"):
        check_arguments([f"+hydra.job.env_set.A{n}=1" for n in range(4000)])


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("experiment=glob(nope*)", "experiment=glob(nope*) matches no choice (choices: control_"),
        ("seed=range(0,1000000000)", "these are more than 10,000 jobs"),
        ("seed=range(0,1000) initial_layers=range(1,1000)", "these are more than 10,000 jobs"),
        ("lr.base=interval(0,1)", "it takes hydra/sweeper=optuna to search an interval"),
        ("hydra.sweep.dir=x/${seed} seed=1,2", "hydra.sweep.dir=x/1 is another folder than x/42"),
        ("hydra.sweep.subdir=a seed=1,2", "hydra.sweep.subdir=a: folders of jobs are named by"),
        ("+hydra.job.env_set.A=${nope}", "hydra.job.env_set.A: Interpolation key 'nope' not"),
        ("+hydra.job.env_set.A=${oc.env:NOPE_}", "hydra.job.env_set.A: KeyError raised"),
        ("objective=validation_los", "objective=validation_los"),
        ("hydra/launcher=joblib hydra.launcher.n_jobs=0", "hydra.launcher.n_jobs=0 runs nothing"),
        ("hydra.sweeper.n_trials=5", "there is no setting hydra.sweeper.n_trials with the sweeper"),
    ],
)
def test_a_sweep_that_cannot_work_is_refused_before_it_leaves_anything(
    train: Command, tmp_path: Path, given: str, line: str
) -> None:
    arguments = given.split()
    if not any(text.startswith("hydra.sweep.dir") for text in arguments):
        arguments.append("hydra.sweep.dir=s")
    done = train("-m", *QUICK, *arguments)
    assert done.status == 1
    assert all(text.startswith("error: ") for text in done.err.splitlines()), done.err
    assert line in done.err
    assert not {"s", "x", "multirun"} & {path.name for path in tmp_path.iterdir()}


def test_a_launcher_named_in_a_swept_experiment_is_refused(train: Command, tmp_path: Path) -> None:
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/far.yaml").write_text(
        "# @package _global_\nhydra:\n  sweeper:\n    max_batch_size: 1\n"
    )
    done = train(
        "--config-dir", str(tmp_path / "mine"), "-m", *QUICK, "experiment=original,far",
        "hydra.sweep.dir=s",
    )  # fmt: skip
    assert done.status == 1
    assert "hydra.sweeper: one job has other settings of it than the sweep" in done.err


def test_jobs_have_the_number_of_their_folder_and_relative_paths_mean_that_of_the_command(
    train: Command, tmp_path: Path
) -> None:
    (tmp_path / "words.txt").write_text("one two three four five six seven\n" * 4000)
    done = train(
        "-m", *QUICK, "data=text", "data.files=[words.txt]", "phase=from_scratch", "seed=1,2",
        "initial_layers=1,2", "hydra.sweep.dir=s", "hydra.job.chdir=true",
        "+hydra.job.env_set.NUMBER=${hydra:job.num}",
    )  # fmt: skip
    assert done.status == 0, done.err
    assert len(results(tmp_path / "s")) == 4
    folders = [path for path in (tmp_path / "s").iterdir() if (path / ".hydra").exists()]
    for folder in folders:
        hydra = (folder / ".hydra/hydra.yaml").read_text()
        assert f"num: {folder.name.split('_')[0]}\n" in hydra
    assert "stages" not in {path.name for path in (tmp_path / "s").rglob("*")}


def test_a_completed_run_is_not_overwritten_by_another(train: Command, tmp_path: Path) -> None:
    assert train(*QUICK, "hydra.run.dir=run").status == 0
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    before = [path.read_bytes() for path in files]
    for other, why in (
        ("seed=5", "holds a completed run with other settings (seed)"),
        ("model.num_heads=3", "does not divide"),
    ):
        done = train(*QUICK, other, "hydra.run.dir=run")
        assert done.status == 1
        assert why in done.err
        assert [path.read_bytes() for path in files] == before
    assert train(*QUICK, "report=true", "hydra.run.dir=run").status == 0


@pytest.mark.parametrize(
    ("before", "status", "err"),
    [
        ("exec >&-;", 0, ""),
        ("exec 2>&-;", 0, ""),
        ("mkdir gone; cd gone; rmdir ../gone;", 1, "error: the folder of this command was deleted"),
    ],
)
def test_closed_output_and_a_deleted_folder(
    tmp_path: Path, before: str, status: int, err: str
) -> None:
    command = shlex.join([sys.executable, str(ROOT / "train.py"), *QUICK, "plan=true"])
    done = subprocess.run(
        ["bash", "-c", f"{before} {command}"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith(err)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lr.base=10^-3"], "lr.base=10^-3 does not fit: it takes a number above 0"),
        (["--lr=0.1"], "there is no option --lr=0.1: a setting has no dashes: lr=0.1"),
        (["--seed", "3"], "there is no option --seed: a setting has no dashes: seed=..."),
        (["SEED=3"], "did you mean seed?"),
        (["learning-rate=3"], "did you mean lr.base?"),
        (["n_heads=2"], "did you mean model.num_heads?"),
        (["gpu=1"], "did you mean device?"),
        (["experiment=g_stack"], "did you mean experiment=recipe/g_stack?"),
        (["-m", "seed=range(5,0)"], "seed=range(5,0) gives no value"),
        (["-m", "experiment=glob(recipe/*)"], "a glob looks into no folder"),
        (["-m", "seed=1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=two"], "n_jobs=two"),
        (["-m", "seed=1,2", "hydra/launcher=slurm", "hydra.launcher.cpus_per_task=a"], "have a c"),
        (["data.files=[a,b]"], "data.files=['a', 'b'] is not for data=pydocs"),
    ],
)
def test_first_tries_are_answered_with_what_to_write(
    train: Command, arguments: list[str], said: str
) -> None:
    if "hydra/launcher=slurm" in arguments:
        pytest.importorskip("submitit")
    done = train(*arguments, "plan=true")
    assert done.status == 1
    assert done.err.splitlines()[0].startswith("error: ")
    assert said in done.err
