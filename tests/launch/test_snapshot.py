"""Copies of the code and of `conf/` from which queued jobs run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from proglayer.config import ConfigError
from proglayer.launch import snapshot
from proglayer.launch.snapshot import changed_files, snapshot_code
from proglayer.run import code
from proglayer.run.record import GitState

from ..helpers import ROOT

GIT = GitState(commit="0123456789ab", changed=False)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small package where packages are installed, with those of others beside it."""
    site = tmp_path / "site-packages"
    for file in ("proglayer/model.py", "proglayer/page.css", "proglayer/__pycache__/model.pyc",
                 "hydra_plugins/proglayer_engines.py", "hydra_plugins/another/launcher.py",
                 "torch/nn.py"):  # fmt: skip
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text("")
    monkeypatch.setattr(snapshot, "PACKAGE", site / "proglayer")
    monkeypatch.setattr(snapshot, "git_state", lambda: GIT)
    return site


def test_only_what_is_ours_is_copied(site: Path, tmp_path: Path) -> None:
    there = snapshot_code(tmp_path / "kept")
    assert sorted(str(p.relative_to(there)) for p in there.rglob("*") if p.is_file()) == [
        "hydra_plugins/proglayer_engines.py",
        "origin.json",
        "proglayer/model.py",
        "proglayer/page.css",
    ]


def test_a_copy_is_named_by_its_content_and_stays_as_it_is(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = snapshot_code(tmp_path / "kept")
    assert snapshot_code(tmp_path / "kept") == one
    (site / "proglayer/model.py").write_text("edited = True")
    other = snapshot_code(tmp_path / "kept")
    monkeypatch.setattr(snapshot, "git_state", lambda: None)
    assert snapshot_code(tmp_path / "kept") not in (one, other)
    assert (one / "proglayer/model.py").read_text() == ""
    assert (other / "proglayer/model.py").read_text() == "edited = True"
    assert len(list((tmp_path / "kept").iterdir())) == 3


def test_the_copy_knows_what_has_changed_since(site: Path, tmp_path: Path) -> None:
    there = snapshot_code(tmp_path / "kept")
    assert changed_files(there / "proglayer") == []
    (site / "proglayer/model.py").unlink()
    (site / "proglayer/page.css").write_text("p {}")
    (site / "hydra_plugins/proglayer_new.py").write_text("")
    assert changed_files(there / "proglayer") == [
        "proglayer/model.py", "proglayer/page.css", "hydra_plugins/proglayer_new.py"
    ]  # fmt: skip
    assert code.origin() is None
    assert changed_files() == []


def test_a_process_that_imports_from_the_copy_has_its_code_and_its_git_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "git_state", lambda: GIT)
    there = snapshot_code(tmp_path / "kept")
    asked = (
        "import json, proglayer, hydra_plugins.proglayer_engines as engines;"
        "from proglayer.run import code;"
        "print(json.dumps([proglayer.__file__, engines.__file__, code.git_state().model_dump()]))"
    )
    # From the checkout's folder, which Python would otherwise prefer.
    done = subprocess.run(
        [sys.executable, "-c", asked], cwd=ROOT, check=True, capture_output=True, text=True,
        env={"PYTHONPATH": str(there), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    package, plugins, git = json.loads(done.stdout)
    assert Path(package).is_relative_to(there)
    assert Path(plugins).is_relative_to(there)
    assert git == GIT.model_dump()


def test_a_copy_that_cannot_be_made_names_the_folder(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("a file")
    with pytest.raises(ConfigError, match=r"kept.*hydra\.sweep\.dir"):
        snapshot_code(tmp_path / "kept")
