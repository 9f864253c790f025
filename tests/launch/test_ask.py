"""What a user asks for: the command line, several values of a setting, and mistakes in them."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from proglayer.config import to_config
from proglayer.errors import ConfigError
from proglayer.launch.ask import (
    Space,
    check_arguments,
    in_one_line,
    is_kept,
    parse,
    read_space,
    values_of,
)

from ..helpers import ROOT, Command, composed


def refusal(*overrides: str) -> str:
    """What composing and judging these overrides comes to."""
    try:
        to_config(composed(*overrides))
    except Exception as error:
        return in_one_line(error)
    return ""


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("-plan=true", "a setting has no dashes: plan=true"),
        ("-phase.max_epochs=1", "a setting has no dashes: phase.max_epochs=1"),
        ("--seed", "there is no option --seed: a setting has no dashes: seed=..."),
        ("--verbose", "there is no option --verbose"),
        ("--experimental-rerun=words.pickle", "--experimental-rerun is not taken"),
        ("hydra.launcher=joblib", "it is chosen with a slash: hydra/launcher=joblib"),
        (
            "lr=1e-3",
            "files of conf/lr; did you mean lr.base=0.001?",
        ),
        ("model=null", "model takes one of its choices"),
        ("data.path=~/x", "Hydra cannot read this: a setting is name=value"),
        ("seed", "Hydra cannot read this"),
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
        ("modl.dim=3", "there is no setting modl; did you mean model?"),
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
    "key": (HEADER + b"modle:\n  dim: 8\n", "no setting modle; did you mean model?"),
    "number": (HEADER + b"lr: 0.1\n", "lr=0.1 should be settings"),
    "slash": (HEADER + b"defaults:\n  - override freeze: none\n", "freeze"),
    "itself": (HEADER + b"defaults:\n  - itself\n", "the settings cannot be composed: "),
    "latin": (HEADER + b"seed: 3 # \xe9\n", "'utf-8' codec can't decode byte 0xe9"),
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


# --- several values -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed=range(0,1000000000)", "gives more than 10,000 values"),
        ("seed=range(5,0)", "gives no value"),
        ("seed=0,1,0", "seed=0,1,0 gives 0 more than once"),
        ("lr.base=interval(0,1)", "it takes hydra/sweeper=optuna to search an interval"),
    ],
)
def test_values_that_cannot_be_run_are_refused_at_once(text: str, said: str) -> None:
    before = time.monotonic()
    with pytest.raises(ConfigError) as refused:
        values_of(parse([text])[0])
    assert said in str(refused.value)
    assert time.monotonic() - before < 5


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


class Loader:
    """Of Hydra's loader of configurations, what `glob` needs."""

    def get_group_options(self, group: str, results_filter: Any = None) -> list[str]:
        return ["deep_supervision", "standard"] if group == "model" else []


def space(*overrides: str) -> Space:
    loader: Any = Loader()
    return read_space(overrides, loader)


optuna = pytest.importorskip("optuna.distributions")
FloatDistribution, IntDistribution = optuna.FloatDistribution, optuna.IntDistribution
CategoricalDistribution = optuna.CategoricalDistribution


@pytest.mark.parametrize(
    ("text", "distribution", "values"),
    [
        ("interval(1e-4,1e-2)", FloatDistribution(1e-4, 1e-2), None),
        # Hydra makes the ends of an interval real numbers, unless they are to be whole.
        ("interval(1,4)", FloatDistribution(1, 4), None),
        ("float(interval(1,4))", FloatDistribution(1, 4), None),
        ("int(interval(1,4))", IntDistribution(1, 4), [1, 2, 3, 4]),
        ("tag(log,interval(1e-4,1e-2))", FloatDistribution(1e-4, 1e-2, log=True), None),
        ("tag(log,int(interval(1,3)))", IntDistribution(1, 3, log=True), [1, 2, 3]),
        # As in any sweep, the end of a range is not in it.
        ("range(1,5)", IntDistribution(1, 4), [1, 2, 3, 4]),
        ("range(3)", IntDistribution(0, 2), [0, 1, 2]),
        ("range(10,0,-4)", IntDistribution(2, 10, step=4), [10, 6, 2]),
        ("range(0,1,0.25)", FloatDistribution(0, 0.75, step=0.25), [0, 0.25, 0.5, 0.75]),
        ("1,2", CategoricalDistribution([1, 2]), [1, 2]),
        ("a,1.5,true,null", CategoricalDistribution(["a", 1.5, True, "null"]), None),
        ("choice('a,b',[1,2])", CategoricalDistribution(["a\\,b", "[1,2]"]), None),
        ("'1',1", CategoricalDistribution(["'1'", 1]), None),
        ("glob(*)", CategoricalDistribution(["deep_supervision", "standard"]), None),
    ],
)
def test_an_override_is_what_it_says(text: str, distribution: Any, values: list | None) -> None:
    read = space(f"model={text}")
    assert dict(read.distributions) == {"model": distribution}
    if values is not None:
        assert list(read.values["model"]) == values
    elif not isinstance(distribution, CategoricalDistribution):
        assert "model" not in read.values


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["a=interval(2.0,1.0)"], r"^a=interval\(2.0,1.0\): "),
        (["a=tag(log,interval(0.0,1.0))"], r"^a=tag\(log,interval\(0.0,1.0\)\): "),
        (["a=tag(log,range(1,9,2))"], r"^a=tag\(log,range\(1,9,2\)\): "),
        (["a=1,2", "b=range(1,1)"], r"^b=range\(1,1\) gives no value"),
    ],
)
def test_what_nothing_can_be_drawn_from_is_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        space(*overrides)


def test_what_is_said_last_of_a_setting_holds() -> None:
    assert space("a=1,2", "b=1,2", "a=3").given == ["b=1,2", "a=3"]
    assert space("a=3", "a=1,2").given == ["a=1,2"]
    assert space("a=1,2", "+a=3,4").given == ["+a=3,4"]


def test_drawn_values_stand_where_they_were_drawn_from() -> None:
    read = space("a=1,2", "b={c: 1}", "d=interval(0.5,1)", "e=2")
    assert read.drawn({"d": 0.75, "a": 2, "f": "null"}) == (
        "a=2", "b={c: 1}", "d=0.75", "e=2", "f=null"
    )  # fmt: skip
    assert read.first() == ("a=1", "b={c: 1}", "d=0.5", "e=2")
    # What a trial chose itself goes before what was given.
    assert read.drawn({"a": 1, "d": 1, "b": 3}) == ("a=1", "b=3", "d=1", "e=2")
