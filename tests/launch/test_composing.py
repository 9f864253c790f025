"""A user's own files of settings: what a broken one is answered with."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..helpers import ROOT

HEADER = b"# @package _global_\n"
# The file's content, and what the line of the error says about it.
BROKEN = {
    "tab": (HEADER + b"\tseed: 3\n", "tab.yaml, line 2: a tab"),
    "twice": (HEADER + b"seed: 3\nseed: 4\n", "twice.yaml, line 3: seed is given twice"),
    "bracket": (HEADER + b"model: {dim: 8\n", "bracket.yaml, line 3: expected ',' or '}'"),
    "itself": (HEADER + b"defaults:\n  - itself\n", "itself.yaml includes itself"),
    "type": (HEADER + b"model:\n  dim: abc\n", "conf/experiment/type.yaml: model.dim=abc"),
    "mark": (b"\xef\xbb\xbf" + HEADER + b"seed: 3\n", "mark.yaml starts with a byte order mark"),
    "bare": (b"seed: 3\n", "bare.yaml does not begin with '# @package _global_'"),
    "empty": (b"", "empty.yaml is empty"),
    "items": (HEADER + b"- a\n", "experiment/items"),
    "text": (b"hello\n", "text.yaml does not begin with"),
    "latin": (HEADER + b"seed: 3 # \xe9\n", "latin.yaml, line 2: this is not UTF-8"),
    "slash": (HEADER + b"defaults:\n  - override freeze: none\n", "override /freeze"),
    "key": (HEADER + b"modle:\n  dim: 8\n", "no setting modle; did you mean model?"),
    "number": (HEADER + b"lr: 0.1\n", "lr=0.1 does not fit: it takes settings of its own: lr.base"),
    "choice": (HEADER + b"model: standard\n", "defaults: [override /model: standard]"),
    "deep": (HEADER + b"lr: {factor: 1}\n", "lr.factor=1 does not fit: it takes settings of its"),
    "dots": (HEADER + b"lr.factor.new: 2\n", "is written in a file as lr: {factor: {new: ...}}"),
    "pairs": (HEADER + b"- seed: 1\n", "settings are lines of 'name: value'"),
    "steps": (HEADER + b"freeze: {steps: {existing: 0}}\n", "it takes a list, as in"),
    "own": (HEADER + b"experiment: original\n", "in the list of defaults: - override /experiment"),
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The script and its settings, for a user to add files to."""
    shutil.copytree(ROOT / "conf", tmp_path / "conf", ignore=shutil.ignore_patterns("local"))
    shutil.copy(ROOT / "train.py", tmp_path)
    return tmp_path


def errors(checkout: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[str]:
    """The lines on stderr of a command that fails."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "train.py", *arguments, "plan=true", "data.samples=64"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_experiment_is_named_with_what_is_wrong(
    name: str, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, expected = BROKEN[name]
    (checkout / "conf" / "experiment" / f"{name}.yaml").write_bytes(content)
    (line,) = errors(checkout, monkeypatch, f"experiment={name}")
    assert line.startswith("error: ")
    assert expected in line


def test_local_settings_that_are_commented_out_are_named(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "conf" / "local").mkdir()
    (checkout / "conf" / "local" / "default.yaml").write_text("# device: cuda\n")
    (line,) = errors(checkout, monkeypatch)
    assert "conf/local/default.yaml does not begin with" in line


def test_a_sweep_names_every_broken_experiment(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tab", "type", "bare"):
        (checkout / "conf" / "experiment" / f"{name}.yaml").write_bytes(BROKEN[name][0])
    lines = errors(checkout, monkeypatch, "-m", "experiment=original,tab,type,bare")
    assert len(lines) == 3
