"""Engines of others that run a sweep: what is ours of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ..helpers import SHORT, Command


def test_an_engine_that_is_missing_says_what_to_install(
    train: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    done = train("-m", *SHORT, "seed=1,2", "hydra/launcher=ray")
    assert done.status == 1
    assert done.err == (
        "error: hydra/launcher=ray is not installed: pip install -c constraints.txt -e '.[ray]'\n"
    )


def test_slurm_that_does_not_answer_is_told_before_anything_is_left(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for searched in ("seed=1,2",), ("hydra/sweeper=optuna", "lr.base=interval(1e-4,1e-2)"):
        done = train("-m", *SHORT, *searched, "hydra/launcher=slurm", "hydra.sweep.dir=s")
        assert done.status == 1
        (line,) = done.err.splitlines()
        assert line.startswith("error: hydra/launcher=slurm: no Slurm answers here (")
        assert "squeue" in line
        assert not (tmp_path / "s").exists()
        assert not list(tmp_path.rglob("*.db"))
