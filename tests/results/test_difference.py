"""Two runs side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

from proglayer.results.__main__ import main
from proglayer.results.show import difference
from proglayer.run.record import GitState

from .test_results import settings, write_run


def rows_of(folder: Path) -> dict[tuple[str, str], tuple[str, ...]]:
    """What differs between the runs a and b: part and name -> each value, and the change."""
    rows = difference(folder / "a", folder / "b").records
    return {(row["part"], row["name"]): (row["a"], row["b"], row["change"]) for row in rows}


def test_settings_and_figures_that_differ_are_named(tmp_path: Path) -> None:
    write_run(tmp_path / "a", perplexities=(980.0, 970.0))
    write_run(
        tmp_path / "b",
        model="deep_supervision",
        plain=settings("model=deep_supervision", "lr.base=2e-3"),
        perplexities=(980.0, 975.0, 960.0),
    )
    figures = rows_of(tmp_path)
    assert {name: each for (part, name), each in figures.items() if part == "setting"} == {
        "model": ("standard", "deep_supervision", ""),
        "lr.base": ("0.001", "0.002", ""),
        "model.exit_weights": ("last", "uniform", ""),
    }
    assert figures["phase 1", "validation_perplexity"] == ("980", "980", "+0")
    assert figures["phase 2", "validation_perplexity"] == ("970", "975", "+5")
    assert figures["phase 2", "stage"] == ("000000000000", "000000000000", "the same")
    assert figures["phase 3", "validation_perplexity"] == ("", "960", "")
    assert ("phase 1", "test_loss") not in figures, "neither run has it"


def test_the_code_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, commit in (("a", "a" * 40), ("b", "b" * 40)):
        write_run(tmp_path / name, git=GitState(commit=commit, changed=False))
    assert main(["--diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    out = capsys.readouterr().out
    assert f"git diff {'a' * 12} {'b' * 12}" in out
    assert "no setting differs" in out
    assert [name for part, name in rows_of(tmp_path) if part == "code"] == ["git_commit"]


def test_a_run_that_has_not_ended_is_compared_as_far_as_it_is(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", status="failed")
    assert rows_of(tmp_path)["run", "status"] == ("completed", "failed", "")


def test_what_is_no_single_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (1, 2):
        write_run(tmp_path / "sweep" / str(seed), seed=seed)
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "cut")
    record = tmp_path / "cut" / "run.json"
    record.write_bytes(record.read_bytes()[:200])
    one = str(tmp_path / "sweep" / "1")
    for other, problem in (
        ("sweep", "holds 2 runs (1, 2, ...): name one of them"),
        ("empty", "no run in"),
        ("gone", "there is no folder"),
        ("cut", "run.json"),
    ):
        assert main(["--diff", one, str(tmp_path / other)]) == 2
        error = capsys.readouterr().err
        assert problem in error
        assert error.count("\n") == 1
    with pytest.raises(SystemExit):
        main([one, "--diff", one, one])
    with pytest.raises(SystemExit):
        main([])
