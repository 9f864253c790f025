"""Settings: composition, types, rules, and what a mistake is answered."""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from pydantic import ValidationError

from proglayer.config import (
    Config,
    ConfigError,
    FreezeStep,
    flat_settings,
    nearest_setting,
    setting_names,
    store_dir,
    to_config,
)
from proglayer.launch.ask import in_one_line
from proglayer.training.plan import open_checkpoint, plan

from .helpers import composed, config, experiments


def plain(settings: DictConfig) -> dict[str, Any]:
    """What Hydra composed, as plain data."""
    return OmegaConf.to_container(settings)  # type: ignore[return-value]


def leaves(settings: Config) -> dict[str, Any]:
    """Every setting that holds no others, with its value."""
    return dict(flat_settings(settings.model_dump(mode="json")))


@pytest.mark.parametrize("experiment", experiments())
def test_experiments_leave_data_model_and_seed_alone(experiment: str) -> None:
    others = ("data=text", "data.files=[a.txt]", "seed=5", "model=deep_supervision", "lr.base=0.5")
    settings = config(f"experiment={experiment}", *others)
    found = settings.data.source, settings.model.exit_weights, settings.seed, settings.lr.base
    assert found == ("text", "uniform", 5, 0.5)


def test_the_command_line_beats_the_experiment_and_the_experiment_the_group() -> None:
    assert config("experiment=longer_training").phase.patience == 5
    assert config("experiment=longer_training", "phase.patience=2").phase.patience == 2
    assert config("experiment=gradual_unfreezing", "freeze=none").freeze.steps == (
        FreezeStep(existing="all", embedding=True, head=True),
    )


def test_settings_are_frozen_and_survive_json() -> None:
    settings = config("experiment=gradual_unfreezing", "model.exit_weights=[1,2,3,4]")
    with pytest.raises(ValidationError, match="frozen"):
        settings.seed = 1  # type: ignore[misc]
    written = settings.model_dump(mode="json")
    assert written == json.loads(settings.model_dump_json())
    assert Config.model_validate(written) == settings
    hash(settings)


def test_every_setting_has_a_value_in_the_files() -> None:
    choices = (), ("data=text",), ("data=hub",), ("model=causal_lm",)
    given = {name for each in choices for name, _ in flat_settings(plain(composed(*each)))}
    assert given == set(setting_names())


MISTAKES = {
    "added_layers=-2": "added_layers=-2 should be a number of layers, or a list of one for each",
    "added_layers=0": "added_layers=0 adds nothing",
    "phase.accumulate=3": "phase.accumulate=3 does not divide phase.batch_size=64",
    "model.num_heads=3": "model.num_heads=3 does not divide model.dim=64",
    "model.dim=12": "rotary embedding takes even heads",
    "model.exit_weights=most": "should be uniform, linear, cumulative, last, or a list",
    "model.exit_weights=[1,-1]": "or a list of numbers from 0",
    "data=text": "data.files is empty",
    "data=hub": "data.repository is empty",
    "phase.grown.exit_weights=most": "phase.grown.exit_weights=most should be uniform",
    "growth.noise=2": "growth.noise=2 should be less than or equal to 1",
    "growth.noise=0.5": "changes nothing with growth.init=random",
    "freeze.steps=[{existing: 3, embedding: false, head: true}]": "leaves none of 3 existing",
    "freeze.steps=[{existing: 1, head: true}]": "freeze.steps[0].embedding has no value",
    "freeze.steps=[{existing: some, embedding: false, head: true}]": "from 0, or all",
    "lr.base=nan": "lr.base=nan",
    "seed=true": "seed=true should be neither true nor false",
    "lr.base=fast": "lr.base=fast should be a valid number",
    "growth.init=stak": "growth.init=stak should be 'random', 'copy', 'stack'",
    "phase.initial=3": "phase.initial=3 should be settings",
    "+lr.bas=1": "there is no setting lr.bas; did you mean lr.base?",
    "~loss.detach": "loss.detach has no value",
}


@pytest.mark.parametrize(("override", "message"), MISTAKES.items())
def test_a_setting_that_cannot_work_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config(override)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_the_store_may_be_in_the_users_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(store_dir("~/stages")) == "/home/somebody/stages"


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        config("data.seq_len=0", "model.num_heads=5", "lr.base=-1", "added_layers=0", "+sed=1")
    assert len(str(error.value).splitlines()) == 5


def test_an_operator_takes_what_it_can_use() -> None:
    with pytest.raises(ConfigError, match=r"growth.position=bottom does not go with .*stack"):
        config("growth=stack", "growth.position=bottom")


def test_freezing_everything_is_refused() -> None:
    nothing = "freeze.steps=[{existing: 0, embedding: false, head: false}]"
    with pytest.raises(ConfigError, match="freezes everything"):
        plan(config("phase=keep_training", nothing), 100)
    plan(config(nothing), 100)  # a new layer still trains


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("sed", "seed"),
        ("model.dimm", "model.dim"),
        ("patience", "phase.patience"),
        ("lr.factors.head", "lr.factor.head"),
        ("zzz", None),
    ],
)
def test_a_misspelt_key_gets_the_nearest_name(typed: str, meant: str | None) -> None:
    assert nearest_setting(typed) == meant


def test_what_an_interpolation_gives_has_the_type_of_its_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    overrides = ("threads=2", "store.dir=b", "phase.samples=9")
    named = {name for name, _ in flat_settings(plain(composed()))}
    values = {name: v for name, v in leaves(config(*overrides)).items() if name in named}
    overrides = []
    for name, value in values.items():
        if value is not None and not isinstance(value, (list, tuple)):
            monkeypatch.setenv(f"SET_{name}", str(value))
            overrides.append(f"{name}=${{oc.env:'SET_{name}'}}")
    assert len(overrides) > 40
    given = leaves(to_config(composed(*overrides)))
    for name, value in values.items():
        if value is not None:
            assert (given[name], type(given[name])) == (value, type(value)), name


EDGES = ("-inf", "-1", "0", "1e308", "inf", "nan", "null", "''", "[]", "{}", "9" * 400)


@pytest.mark.parametrize("edge", EDGES)
def test_a_value_at_the_edge_is_used_or_refused_in_a_line(edge: str) -> None:
    """Every third setting; PROGLAYER_TEST_EDGES=all tries each of them."""
    names = list(leaves(config()))
    if os.environ.get("PROGLAYER_TEST_EDGES") != "all":
        names = names[EDGES.index(edge) % 3 :: 3]
    for name in names:
        try:
            settings = config(f"{name}={edge}")
        except Exception as error:
            line = in_one_line(error, [f"{name}={edge}"])
            assert name.split(".")[0] in line
            assert len(line) < 300
            continue
        json.dumps(settings.model_dump(mode="json"), allow_nan=False)
        with contextlib.suppress(ConfigError):
            plan(settings, 100, open_checkpoint(settings))


def test_a_variable_that_holds_no_number_is_the_settings_mistake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GIVEN", "some text")
    with pytest.raises(ConfigError, match=r"lr.base=some text should be "):
        to_config(composed("lr.base=${oc.env:GIVEN}"))
