"""Engines that are not here, and what is told of them before anything is left."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ..helpers import SHORT, Command


def test_an_engine_that_is_missing_says_what_to_install(
    train: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, choice in ("ray", "hydra/launcher=ray"), ("optuna", "hydra/sweeper=optuna"):
        monkeypatch.setitem(sys.modules, module, None)
        done = train("-m", *SHORT, "seed=1,2", choice)
        assert done.status == 1
        install = f"pip install -c constraints.txt -e '.[{module}]'"
        assert done.err == f"error: {choice} is not installed: {install}\n"


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
