"""What a start leaves behind, and what a sweep says and does before and after its jobs."""

from __future__ import annotations

from pathlib import Path

import pytest

from .test_train import SHORT, Command, results, train  # noqa: F401 (a fixture)

# One epoch of a run that takes a moment.
QUICK = (*SHORT, "phase.max_epochs=1")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("given", ["plan=true", "model.num_heads=3", "data.samples=1000000"])
def test_a_start_that_trains_nothing_takes_away_only_what_it_made(
    train: Command,  # noqa: F811
    tmp_path: Path,
    given: str,
) -> None:
    (tmp_path / "other.log").write_text("a user's own")
    train(*QUICK[1:], given, "hydra.run.dir=.")
    assert list(contents(tmp_path)) == ["other.log"]
    # Nor does it take a folder that was there and empty.
    (tmp_path / "empty").mkdir()
    train(*QUICK[1:], given, "hydra.run.dir=empty")
    train(*QUICK[1:], given, "hydra.run.dir=new")
    assert (tmp_path / "empty").is_dir()
    assert not (tmp_path / "new").exists()


def test_a_mistake_leaves_a_finished_run_in_the_same_folder(
    train: Command,  # noqa: F811
    tmp_path: Path,
) -> None:
    assert train(*QUICK, "hydra.run.dir=run").status == 0
    before = contents(tmp_path / "run")
    assert train(*QUICK, "model.num_heads=3", "hydra.run.dir=run").status == 1
    after = contents(tmp_path / "run")
    assert after.keys() == before.keys()
    assert after["train.log"] == before["train.log"]
