"""Copies of the code from which queued jobs run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from proglayer.errors import ConfigError
from proglayer.launch.snapshot import snapshot_code

from ..helpers import ROOT


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A small package where packages are installed, with another beside it."""
    site = tmp_path / "site-packages"
    for file in ("proglayer/model.py", "proglayer/report/page.css",
                 "proglayer/__pycache__/model.pyc", "torch/nn.py"):  # fmt: skip
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text("")
    return site / "proglayer"


def test_a_copy_holds_the_package_and_is_named_by_its_content(
    package: Path, tmp_path: Path
) -> None:
    one = snapshot_code(tmp_path / "kept", package)
    assert sorted(str(p.relative_to(one)) for p in one.rglob("*") if p.is_file()) == [
        "proglayer/model.py",
        "proglayer/report/page.css",
    ]
    assert snapshot_code(tmp_path / "kept", package) == one
    (package / "model.py").write_text("edited = True")
    other = snapshot_code(tmp_path / "kept", package)
    assert (one / "proglayer/model.py").read_text() == ""
    assert (other / "proglayer/model.py").read_text() == "edited = True"
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_a_process_that_imports_from_the_copy_has_its_code(tmp_path: Path) -> None:
    there = snapshot_code(tmp_path / "kept")
    # From the checkout's folder, which Python would otherwise prefer.
    done = subprocess.run(
        [sys.executable, "-c", "import proglayer; print(proglayer.__file__)"],
        cwd=ROOT, check=True, capture_output=True, text=True,
        env={"PYTHONPATH": str(there), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert Path(done.stdout.strip()).is_relative_to(there)


def test_a_copy_that_cannot_be_made_names_the_folder(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("a file")
    with pytest.raises(ConfigError, match=r"kept.*hydra\.sweep\.dir"):
        snapshot_code(tmp_path / "kept")
