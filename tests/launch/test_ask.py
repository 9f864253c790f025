"""What a user asks for: the command line, and mistakes in it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from proglayer.config import to_config
from proglayer.errors import ConfigError
from proglayer.launch.ask import check_arguments, in_one_line

from ..helpers import ROOT, Command, composed


def refusal(*overrides: str) -> str:
    """What composing and judging these overrides comes to."""
    try:
        to_config(composed(*overrides))
    except Exception as error:
        return in_one_line(error, overrides)
    return ""


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("-plan=true", "a setting has no dashes: plan=true"),
        ("-phase.max_epochs=1", "a setting has no dashes: phase.max_epochs=1"),
        ("--seed", "there is no option --seed: a setting has no dashes: seed=..."),
        ("--verbose", "there is no option --verbose"),
        ("--learning_rate", "a setting has no dashes: lr.base=..."),
        ("--trainer.accelerator=gpu", "a setting has no dashes: device=..."),
        ("--hydra.run.dir=x", "a setting has no dashes: hydra.run.dir=x"),
        ("--experimental-rerun=words.pickle", "--experimental-rerun is not taken"),
        ("hydra.launcher=joblib", "it is chosen with a slash: hydra/launcher=joblib"),
        ("lr=1e-3", "it takes one of conf/lr; did you mean lr.base=1e-3?"),
        ("+experiment=wider", "the group has a choice already: leave out the +"),
        ("model=null", "model=null: it takes one of conf/model"),
        ("data.path=~/x", "Hydra cannot read this: a setting is name=value"),
        ("seed", "Hydra cannot read this"),
        ("hydra/job_logging=disabled", "has no effect here: leave it out"),
    ],
)
def test_an_argument_that_is_no_setting_is_refused_in_a_line(argument: str, said: str) -> None:
    for others in ([], ["seed=1"]):
        with pytest.raises(ConfigError) as refused:
            check_arguments([*others, argument])
        assert said in str(refused.value)
        assert str(refused.value).count("\n") == 0


def test_options_may_stand_anywhere() -> None:
    assert check_arguments(["seed=1", "-m", "lr.base=2", "--config-dir", "x"]) == [
        "-m", "--config-dir", "x", "seed=1", "lr.base=2"
    ]  # fmt: skip


def test_an_option_that_means_nothing_is_refused_without_a_traceback(train: Command) -> None:
    for options in (["--resolve"], ["--shell-completion"], ["--config-dir=nowhere"], ["-sed=1"]):
        done = train(*options, "plan=true")
        assert done.status == 1
        assert done.err.startswith("error: ")
        assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sed=1", "there is no setting sed; did you mean seed?"),
        ("+trainer.max_epochs=3", "no setting trainer.max_epochs; did you mean phase.max_epochs?"),
        ("modl.dim=3", "there is no setting modl.dim; did you mean model.dim?"),
        ("lr={bas: 1}", "there is no setting lr.bas; did you mean lr.base?"),
        ("lr.factor.new.x=1", "did you mean lr.factor.new?"),
        ("hydra.launcher.jobs=2", "there is no setting hydra.launcher.jobs"),
        ("model=standart", "model has no choice standart; did you mean model=standard?"),
        ("hydra/launcher=submitit_slurm", "did you mean hydra/launcher=slurm?"),
        ("experiment=g_stack", "did you mean experiment=recipe/...?"),
        ("lr.base=1,2", "Ambiguous value for argument 'lr.base=1,2'"),
        ("lr.base=${nope}", "lr.base: Interpolation key 'nope' not found"),
        ("+seed=3", "already at 'seed'"),
        # of other tools
        ("max_epochs=3", "did you mean phase.max_epochs?"),
        ("optimizer.lr=1e-3", "did you mean lr.base?"),
        ("SEED=3", "did you mean seed?"),
        ("block_size=64", "did you mean data.seq_len?"),
        ("bf16=true", "did you mean precision?"),
        ("per_device_train_batch_size=8", "did you mean phase.batch_size?"),
        ("gradient_accumulation_steps=2", "did you mean phase.accumulate?"),
        ("trainer.accelerator=gpu", "did you mean device?"),
        ("fast_dev_run=true", "did you mean plan?"),
        ("ckpt_path=a/last.ckpt", "did you mean hydra.run.dir?"),
        ("max_steps=9", "did you mean phase.epoch_steps?"),
        ("gradient_checkpointing=true", "did you mean model.checkpoint_activations?"),
        ("model=gpt2", "did you mean model=causal_lm?"),
        ("save_steps=500", "did you mean checkpoint_every_s?"),
        ("train_file=a.txt", "did you mean data.files?"),
    ],
)
def test_a_mistake_is_one_line_with_the_nearest_name(override: str, said: str) -> None:
    assert said in refusal(override)
    assert refusal(override).count("\n") == 0


HEADER = b"# @package _global_\n"
# The content of a file of conf/experiment, and what is said of it.
BROKEN = {
    "tab": (HEADER + b"\tseed: 3\n", "tab.yaml, line 2: found character '\\t'"),
    "bracket": (HEADER + b"model: {dim: 8\n", "bracket.yaml, line 3: expected ',' or '}'"),
    "type": (HEADER + b"model:\n  dim: abc\n", "model.dim=abc should be a valid integer"),
    "bare": (b"seed: 3\n", "such a file begins with the line '# @package _global_'"),
    "key": (HEADER + b"modle:\n  dim: 8\n", "no setting modle.dim; did you mean model.dim?"),
    "number": (HEADER + b"lr: 0.1\n", "lr=0.1 should be settings"),
    "slash": (HEADER + b"defaults:\n  - override freeze: none\n", "freeze"),
    "itself": (HEADER + b"defaults:\n  - itself\n", "the settings cannot be composed: "),
    "latin": (
        HEADER + b"seed: 3 # \xe9\n",
        "a file of settings is not in UTF-8, in the line that begins with 'seed: 3 # é'",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_of_settings_is_one_line(name: str, tmp_path: Path) -> None:
    content, said = BROKEN[name]
    shutil.copytree(ROOT / "conf", tmp_path / "conf", ignore=shutil.ignore_patterns("local"))
    (tmp_path / "conf" / "experiment" / f"{name}.yaml").write_bytes(content)
    line = ""
    try:
        with initialize_config_dir(str(tmp_path / "conf"), version_base="1.3"):
            to_config(compose("config", overrides=[f"experiment={name}"]))
    except Exception as error:
        line = in_one_line(error)
    assert said in line
    assert line.count("\n") == 0
