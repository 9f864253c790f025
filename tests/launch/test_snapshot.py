"""Copies of the code and of `conf/` from which queued jobs run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from proglayer.launch import snapshot
from proglayer.store.stages import StoreError

from ..helpers import ROOT

GIT = {"commit": "0123456789ab", "changed": False, "difference": None}


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    folder = tmp_path / "conf"
    (folder / "lr").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 1\n")
    (folder / "lr/reduced.yaml").write_text("base: 0.1\n")
    (folder / "corpus.bin").write_bytes(bytes(1000))
    return folder


def take(into: Path, conf: Path, git: dict[str, Any] | None = GIT) -> Path:
    return snapshot.take(into, {"conf-0": conf}, ROOT / "hydra_plugins", git)


def test_a_copy_is_named_by_its_content_and_stays_as_it_is(tmp_path: Path, conf: Path) -> None:
    one = take(tmp_path / "kept", conf)
    assert take(tmp_path / "kept", conf) == one
    (conf / "lr/reduced.yaml").write_text("base: 0.2\n")
    other = take(tmp_path / "kept", conf)
    assert take(tmp_path / "kept", conf, None) not in (one, other)
    assert (one / "conf-0/lr/reduced.yaml").read_text() == "base: 0.1\n"
    assert (other / "conf-0/lr/reduced.yaml").read_text() == "base: 0.2\n"
    assert len(list((tmp_path / "kept").iterdir())) == 3
    assert not (one / "conf-0/corpus.bin").exists()


def test_the_copy_tells_what_has_changed_since(tmp_path: Path, conf: Path) -> None:
    there = take(tmp_path / "kept", conf)
    assert snapshot.changes(there / "proglayer") == []
    (conf / "config.yaml").write_text("seed: 2\n")
    (conf / "lr/reduced.yaml").unlink()
    (conf / "lr/new.yaml").write_text("base: 1\n")
    (conf / "corpus.bin").write_bytes(b"another")
    told = snapshot.changes(there / "proglayer")
    assert told == ["conf/config.yaml", "conf/lr/new.yaml", "conf/lr/reduced.yaml"]
    assert snapshot.origin() is None
    assert snapshot.changes() == []


def test_a_process_that_imports_from_the_copy_has_its_code_and_its_git_state(
    tmp_path: Path, conf: Path
) -> None:
    there = take(tmp_path / "kept", conf)
    asked = (
        "import json, proglayer, hydra_plugins.proglayer_engines as engines;"
        "from proglayer.run import code;"
        "print(json.dumps([proglayer.__file__, engines.__file__, code.git_state()]))"
    )
    # From the checkout's folder, which Python would otherwise prefer.
    done = subprocess.run(
        [sys.executable, "-c", asked], cwd=ROOT, check=True, capture_output=True, text=True,
        env={"PYTHONPATH": str(there), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    package, plugins, git = json.loads(done.stdout)
    assert Path(package).is_relative_to(there)
    assert Path(plugins).is_relative_to(there)
    assert git == GIT


def test_what_is_installed_beside_us_is_not_copied(
    tmp_path: Path, conf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site-packages"
    for file in ("proglayer/model.py", "proglayer/page.css", "proglayer/__pycache__/model.pyc",
                 "hydra_plugins/proglayer_engines.py", "hydra_plugins/another/launcher.py",
                 "torch/nn.py"):  # fmt: skip
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text("")
    monkeypatch.setattr(snapshot, "PACKAGE", site / "proglayer")
    there = snapshot.take(tmp_path / "kept", {}, site / "hydra_plugins", None)
    assert sorted(str(p.relative_to(there)) for p in there.rglob("*") if p.is_file()) == [
        "hydra_plugins/proglayer_engines.py",
        "origin.json",
        "proglayer/model.py",
        "proglayer/page.css",
    ]


def test_a_copy_that_cannot_be_made_says_where(tmp_path: Path, conf: Path) -> None:
    (tmp_path / "kept").write_text("a file")
    with pytest.raises(StoreError, match=r"kept.*hydra\.sweep\.dir"):
        take(tmp_path / "kept", conf)


def test_jobs_compose_from_the_copy_whatever_becomes_of_the_search_path(
    tmp_path: Path, conf: Path
) -> None:
    """The files of `conf/`, and those of a folder that `hydra.searchpath` adds."""
    from hydra import initialize_config_dir
    from hydra._internal.callbacks import Callbacks
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import HydraContext, RunMode

    from proglayer.launch.common import freeze

    more = tmp_path / "it's more"
    (more / "lr").mkdir(parents=True)
    (more / "lr/mine.yaml").write_text("base: 0.5\n")
    (conf / "config.yaml").write_text("defaults: [{lr: reduced}, _self_]\nseed: 1\n")
    quoted = "file://" + str(more).replace("'", "\\'")
    with initialize_config_dir(str(conf), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None

        class Launcher:
            config = hydra.compose_config(
                "config", [f"hydra.searchpath=['{quoted}']", "lr=mine"], RunMode.MULTIRUN
            )
            hydra_context = HydraContext(hydra.config_loader, Callbacks(None))

        config, context, code = freeze(Launcher(), tmp_path / "kept")  # type: ignore[arg-type]
        (more / "lr/mine.yaml").unlink()
        (conf / "config.yaml").write_text("broken: [")
        (conf / "lr/reduced.yaml").unlink()
        for overrides, rate in (["lr=mine"], 0.5), (["lr=reduced"], 0.1):
            job = context.config_loader.load_sweep_config(config, overrides)
            assert (job.lr.base, job.seed) == (rate, 1)
    assert len(snapshot.changes(code / "proglayer")) == 3
