"""What a search draws from, as Hydra's grammar says it."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("optuna")

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from proglayer.errors import ConfigError
from proglayer.launch.space import Space, read_space


class Loader:
    """Of Hydra's loader of configurations, what `glob` needs."""

    def get_group_options(self, group: str, results_filter: Any) -> list[str]:
        return ["deep_supervision", "standard"] if group == "model" else []


def space(*overrides: str) -> Space:
    loader: Any = Loader()
    return read_space(overrides, loader)


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
        (["a=1,2", "b=range(1,1)"], r"^b=range\(1,1\): "),
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
