"""Why a phase is trained afresh: the nearest stored stage, whatever else lies in the store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from proglayer.config import Config
from proglayer.store import nearest
from proglayer.store.nearest import Nearest
from proglayer.store.stages import Machine, Stage, stage_key
from proglayer.store.trajectory import describe
from proglayer.training.plan import plan

from ..helpers import SHORT, TINY, Command, config

MACHINE = Machine("cpu", "a cpu", 2, "2.13.0")


def description(settings: Config, phase: int = 0, corpus: str = "c", **parent: Any) -> Any:
    """What a phase of these settings is stored as."""
    planned = plan(settings, vocab_size=30)[phase]
    return describe(parent.get("parent"), planned.train, corpus, MACHINE)


def stored(store: Path, plain: dict[str, Any]) -> Stage:
    """A stage that holds nothing but its description."""
    stage = Stage(store, stage_key(plain))
    stage.folder.mkdir(parents=True)
    stage.write_json("stage", plain)
    return stage


def settings(*overrides: str) -> Config:
    return config(*TINY, *overrides)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("seed=43",), "seed=42 there, 43 here"),
        (("lr.base=0.02",), "lr=0.01 there, 0.02 here"),
        (("optimizer.beta2=0.99",), "optimizer.beta2=0.999 there, 0.99 here"),
        (("optimizer.decay_norms=false",), "optimizer.decay_norms=the default there, False here"),
        (("optimizer.clip_norm=null",), "optimizer.clip_norm=1.0 there, null here"),
        (("model.norm=pre",), "model.norm=the default there, pre here"),
        (("initial_layers=2",), "layers=3 there, 2 here"),
        (
            ("phase.batch_size=8", "precision=bfloat16"),
            "phase.batch_size=16 there, 8 here; precision=float32 there, bfloat16 here",
        ),
    ],
)
def test_it_names_the_settings_that_differ(
    tmp_path: Path, overrides: tuple[str, ...], said: str
) -> None:
    stored(tmp_path, description(settings()))
    asked = description(settings(*overrides))
    assert Nearest(tmp_path).why_afresh(asked) == said


def test_it_names_what_a_grown_phase_trains_and_where_it_starts(tmp_path: Path) -> None:
    stored(tmp_path, description(settings(), 1, parent=("a" * 32, 2)))
    near = Nearest(tmp_path)
    other_start = description(settings(), 1, parent=("a" * 32, 3))
    assert near.why_afresh(other_start) == "the phase before is another"
    thawed = description(settings("freeze=none"), 1, parent=("a" * 32, 2))
    assert near.why_afresh(thawed) == (
        "freeze=layers 4 there, layers 1, 2, 3, 4 here; lr=frozen there, 0.001 here"
    )
    text = description(settings(), 1, corpus="d", parent=("a" * 32, 2))
    assert near.why_afresh(text) == "data is another"


def test_the_nearest_of_several_is_taken(tmp_path: Path) -> None:
    for overrides in (("seed=1", "lr.base=0.5"), ("seed=1",), ("seed=1", "model.dim=16")):
        stored(tmp_path, description(settings(*overrides)))
    assert Nearest(tmp_path).why_afresh(description(settings())) == "seed=1 there, 42 here"


def test_nothing_alike_says_nothing(tmp_path: Path) -> None:
    asked = description(settings())
    assert Nearest(tmp_path / "none").why_afresh(asked) is None
    stored(tmp_path, asked)
    far = ("seed=1", "lr.base=0.5", "model.dim=16", "phase.batch_size=4", "optimizer.beta1=0.5")
    assert Nearest(tmp_path).why_afresh(description(settings(*far))) is None


def test_what_is_damaged_or_foreign_is_passed_over(tmp_path: Path) -> None:
    cut = stored(tmp_path, description(settings("seed=1"))).path("stage")
    assert cut is not None
    cut.write_bytes(cut.read_bytes()[:100])
    other = stored(tmp_path, description(settings("seed=2"))).path("stage")
    assert other is not None
    other.write_text('{"phase": {"seed": 42}}')
    (tmp_path / ("e" * 32)).mkdir()
    (tmp_path / ("f" * 32)).write_text("a file")
    (tmp_path / ("d" * 32)).symlink_to(tmp_path)
    (tmp_path / "notes").mkdir()
    before = sorted(path.name for path in tmp_path.rglob("*"))
    near = Nearest(tmp_path)
    assert near.why_afresh(description(settings("seed=4"))) is None
    stored(tmp_path, description(settings("seed=3")))
    assert Nearest(tmp_path).why_afresh(description(settings())) == "seed=3 there, 42 here"
    assert set(before) < {path.name for path in tmp_path.rglob("*")}, "nothing is set aside"


def test_a_large_store_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(1, 4):
        stage = stored(tmp_path, description(settings(f"seed={seed}")))
        os.utime(stage.folder, (1e9 - seed, 1e9 - seed))
    monkeypatch.setattr(nearest, "MOST_STAGES", 1)
    asked = description(settings("seed=3", "lr.base=0.5"))
    assert Nearest(tmp_path).why_afresh(asked) == "seed=1 there, 3 here; lr=0.01 there, 0.5 here"


def test_the_plan_says_why(train: Command, tmp_path: Path) -> None:
    fixed = (*SHORT, "threads=1")
    assert "stored" not in train(*fixed, "plan=true").out, "there is no store yet"
    assert train(*fixed).status == 0
    planned = train(*fixed, "plan=true").out
    assert planned.count("2 epochs") == 2
    assert "not stored" not in planned
    changed = (*fixed, "growth=copy")
    assert (
        "phase 2 is not stored; the nearest stage: growth.init=random there, copy here"
        in train(*changed, "plan=true").out
    )
    swept = train("-m", *fixed, "plan=true", "seed=42,43")
    assert swept.status == 0, swept.err
    assert swept.out.count("not stored") == 1, "what follows from phase 1 is not repeated"
    assert "phase 1 is not stored; the nearest stage: seed=42 there, 43 here" in swept.out
