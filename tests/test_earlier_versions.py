"""What an earlier version left is still read: a study's folder, its weights, its store.

`fixtures/earlier` was made by the version before the package was laid out in wings, from the text
beside it, on one thread. Folders in it are not those of any machine.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from .helpers import ROOT

EARLIER = ROOT / "tests" / "fixtures" / "earlier"
RUNS = ("0_fea6c4", "1_9f7746")


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may write to, and the present folder while it runs."""
    folder = tmp_path / "earlier"
    shutil.copytree(EARLIER, folder)
    monkeypatch.chdir(folder)
    return folder


def record(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def test_its_records_are_read(earlier: Path) -> None:
    from proglayer import results

    frames = results.load(earlier / "study")
    assert len(frames.runs) == 2
    assert set(frames.runs["status"]) == {"completed"}
    for name in RUNS:
        run = frames.runs[frames.runs["seed"].eq(7) & frames.runs["run"].str.contains(name)]
        assert len(run) == 1
        phases = record(earlier / "study" / name)["phases"]
        last = phases[-1]["best"]
        assert run["last_accuracy_percent"].item() == last["validation_accuracy_percent"]
        assert run["last_perplexity"].item() == last["validation_perplexity"]
    assert len(frames.epochs) == 12


def test_its_report_is_written(earlier: Path) -> None:
    from proglayer.report import write_report

    page = write_report([earlier / "study"], earlier / "report")
    assert page.exists()


@pytest.mark.parametrize("name", RUNS)
def test_its_weights_are_read(earlier: Path, name: str) -> None:
    from proglayer import load_run

    model = load_run(earlier / "study" / name)
    assert len(model.layers) == 4
    hidden = model(torch.zeros(1, 8, dtype=torch.long))
    assert all(torch.isfinite(exit_ntd).all() for exit_ntd in hidden)


@pytest.mark.parametrize("name", RUNS)
def test_its_store_is_read_so_that_nothing_is_trained_again(
    earlier: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from proglayer.config import from_plain
    from proglayer.run import experiment, machine
    from proglayer.store.trajectory import Machine

    before = record(earlier / "study" / name)
    monkeypatch.setenv("PROGLAYER_STAGES", str(earlier / "stages"))
    # The key names the kind of machine, which is hardly this one's.
    monkeypatch.setattr(machine, "describe_machine", lambda _: Machine(**before["machine"]))
    folder = earlier / "again"
    folder.mkdir()
    experiment.run(from_plain(before["config"]), folder)
    now = record(folder)
    for old, new in zip(before["phases"], now["phases"], strict=True):
        assert new["work"]["epochs_trained"] == 0
        assert new["stage"] == old["stage"]
        # What that version did not know of is added, and nothing else.
        assert new["best"] | old["best"] == new["best"]
        assert [a | b for a, b in zip(new["exits"], old["exits"], strict=True)] == new["exits"]
        assert new["best"].keys() - old["best"].keys() == {"validation_bits_per_byte"}
